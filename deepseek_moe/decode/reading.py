"""Whole texts through the layers, as many of their tokens at a time as the memory holds."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from ..memory import free_memory
from .decoder import Decoder, StaticCache

LEAST_CHUNK = 256  # below that the weights are read too often


class Text(NamedTuple):
    """Ids that go into a slot of a cache, from the position `start` on. The hidden states of the
    last `wanted` of them are asked for."""

    ids: Sequence[int]
    slot: int
    start: int = 0
    wanted: int = 0


def read_texts(
    decoder: Decoder, cache: StaticCache, texts: Sequence[Text], chunk: int
) -> Iterator[torch.Tensor]:
    """The hidden states [R, D], which `Decoder.logits` takes, that are asked for, in the order of
    the texts. Up to `chunk` tokens go through the layers at once."""
    device = decoder.embedding.device
    if device.type == "cuda":
        chunk = chunk_for(chunk, decoder.bytes_of_prompt, free_memory(device))
    for pieces in _chunks([len(text.ids) for text in texts], chunk):
        parts = []
        for b, start, end in pieces:
            text, at = texts[b], np.arange(start, end)
            is_wanted = at >= len(text.ids) - text.wanted
            parts.append((text.ids[start:end], at + text.start, [text.slot] * len(at), is_wanted))
        rows = np.stack([np.concatenate(part, dtype=np.int32) for part in zip(*parts, strict=True)])
        T = rows.shape[1]
        padded = np.pad(rows[:3], ((0, 0), (0, -T % 4)))  # by 16 bytes, as kernels expect
        ids_T, position_T, slot_T = torch.from_numpy(padded).to(device)[:, :T]
        ends = np.cumsum([end - start for _, start, end in pieces]).tolist()
        asked = np.flatnonzero(rows[3]).tolist()
        some = asked or [T - 1]  # a piece of a long text may only fill the cache
        x_RD = decoder.prefill(ids_T, position_T, slot_T, cache, ends, some)
        if asked:
            yield x_RD


def chunk_for(most: int, bytes_of_token: int, free: int) -> int:
    """How many tokens of prompts go through the layers at once: `most`, or so many that they take
    no more than an eighth of the `free` bytes. The rest is for weights that are dequantised, and
    may lie in pieces that are too small: half a GB was seen to."""
    chunk = most
    while chunk > LEAST_CHUNK and chunk * bytes_of_token > free // 8:
        chunk //= 2
    return chunk


def _chunks(lengths: list[int], chunk: int) -> list[list[tuple[int, int, int]]]:
    """Pieces (prompt, start, end) that go through the layers together: whole prompts of at most
    `chunk` tokens in all, or one piece of a longer prompt."""
    chunks, room = [], 0
    for b, length in enumerate(lengths):
        if length <= room:
            chunks[-1].append((b, 0, length))
            room -= length
            continue
        starts = range(0, length, chunk)
        chunks += [[(b, start, min(start + chunk, length))] for start in starts]
        room = chunk - length if length <= chunk else 0
    return chunks
