"""How likely a model finds continuations of contexts.

The engine reads a context that several continuations share only once: they go on from copies of its
keys and values. The plain way, its twin, reads each whole text by the model's own forward. Both
compute the logits of no token that was not asked for.

Letters: P pairs, R tokens whose logits are asked for, D hidden, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import chain
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from ..decode.batch import evaluating
from ..decode.decoder import StaticCache
from ..decode.engine import CACHE_BLOCK, Engine
from ..decode.generation import Generator
from ..decode.reading import Text, read_texts
from ..errors import RunError
from ..memory import free_memory
from ..perplexity import PIECE

MOST = 65536  # tokens of a batch on a GPU, with what pads them: 15 GB of cache with the 16B model
MOST_ON_CPU = 8192


class Pair(NamedTuple):
    """Ids of a context, at least one, and of what follows it. All but the last are read."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    @property
    def read(self) -> tuple[int, ...]:
        return (self.context + self.continuation)[:-1]


Answer = tuple[float, bool]
"""The sum of the log-probabilities (nats) of a continuation's tokens, and whether each of them is
the likeliest one."""


def score(generator: Generator, pairs: Sequence[Pair]) -> Iterator[tuple[int, Answer]]:
    """The number of each pair and its answer, batch by batch, the longest first.

    Raises:
        UnsupportedModel: the generator's engine does not compute the model as it is now.
        RunError: logits are NaN.
    """
    empty = [p for p, pair in enumerate(pairs) if not pair.continuation]
    yield from ((p, (0.0, True)) for p in empty)
    most = batch_tokens(generator.model)
    for numbers in _batches(pairs, most):
        yield from zip(numbers, _score_batch(generator, [pairs[p] for p in numbers]), strict=True)


def batch_tokens(model: PreTrainedModel) -> int:
    """How many tokens go together: those whose cache takes a quarter of the free memory."""
    if model.device.type != "cuda":
        return MOST_ON_CPU
    one = StaticCache(model, slots=1, capacity=1)
    bytes_each = sum(part.nbytes for layer in one.layers for part in layer)
    return min(MOST, free_memory(model.device) // 4 // bytes_each)


def _batches(pairs: Sequence[Pair], most: int) -> Iterator[list[int]]:
    """The numbers of pairs that go together: as many as `most` tokens hold, padded to the longest
    of them, but at least one. Those of one context stand side by side."""
    length: dict[tuple[int, ...], int] = {}
    for pair in pairs:
        length[pair.context] = max(length.get(pair.context, 0), len(pair.read))
    order = [p for p in range(len(pairs)) if pairs[p].continuation]
    order.sort(key=lambda p: (-length[pairs[p].context], pairs[p].context, -len(pairs[p].read)))
    batch, longest = [], 0
    for p in order:
        longest = max(longest, len(pairs[p].read))
        if batch and (len(batch) + 1) * longest > most:
            yield batch
            batch, longest = [], len(pairs[p].read)
        batch.append(p)
    if batch:
        yield batch


@torch.inference_mode()
def _score_batch(generator: Generator, pairs: Sequence[Pair]) -> list[Answer]:
    engine, model = generator.engine, generator.model
    if engine is not None:
        engine.refresh()
    with nullcontext() if engine is None else engine.on_device():
        read = _read_plainly(model, pairs) if engine is None else _read_in_engine(engine, pairs)
        logits_of = model.lm_head if engine is None else engine.decoder.logits
        x_RD, *numbers = read
        target_R, owner_R = torch.tensor(numbers, device=x_RD.device)
        sums_P2 = torch.zeros(len(pairs), 2, dtype=torch.float64, device=x_RD.device)
        pieces = (one.split(PIECE) for one in (x_RD, target_R, owner_R))
        for x_D, ids, owners in zip(*pieces, strict=True):
            logits = logits_of(x_D).float()
            logs = -F.cross_entropy(logits, ids, reduction="none")
            found = torch.stack([logs, logits.argmax(-1) != ids], -1)
            sums_P2.index_add_(0, owners, found.double())
    answers = [(nats, others == 0) for nats, others in sums_P2.tolist()]
    if any(math.isnan(nats) for nats, _ in answers):
        raise RunError(
            "the model's logits are NaN: its weights are broken, or their products overflow "
            "float16; try --dtype bfloat16, or get the checkpoint anew"
        )
    return answers


Read = tuple[Tensor, list[int], list[int]]
"""Hidden states [R, D], which the head takes, and of each the id that follows and its pair."""


def _read_plainly(model: PreTrainedModel, pairs: Sequence[Pair]) -> Read:
    rows = {text: row for row, text in enumerate(dict.fromkeys(pair.read for pair in pairs))}
    ids_BL = pad_sequence([torch.tensor(text) for text in rows], batch_first=True)
    with evaluating(model):  # what pads a text comes after it, and is not seen
        hidden_BLD = model.model(ids_BL.to(model.device), use_cache=False).last_hidden_state
    parts = [hidden_BLD[rows[one.read], len(one.context) - 1 : len(one.read)] for one in pairs]
    target = [token for pair in pairs for token in pair.continuation]
    return torch.cat(parts), target, [p for p, pair in enumerate(pairs) for _ in pair.continuation]


def _read_in_engine(engine: Engine, pairs: Sequence[Pair]) -> Read:
    """The contexts, each in the slot of its first pair, and then the rest of all continuations."""
    first: dict[tuple[int, ...], int] = {}  # the pair in whose slot a context is read
    for p, pair in enumerate(pairs):
        first.setdefault(pair.context, p)
    blocks = -(-max(len(pair.read) for pair in pairs) // CACHE_BLOCK)
    cache = StaticCache(engine.model, len(pairs), blocks * CACHE_BLOCK)
    texts = [Text(context, slot, wanted=1) for context, slot in first.items()]
    after_CD = torch.cat([*read_texts(engine.decoder, cache, texts, engine.chunk)])
    copies = [(p, first[pair.context]) for p, pair in enumerate(pairs) if first[pair.context] != p]
    to_slot, from_slot = torch.tensor(copies, device=engine.device).long().view(-1, 2).T
    longest = max(map(len, first))
    for part in chain.from_iterable(cache.layers):  # [slots, heads, capacity, width]
        part[to_slot, :, :longest] = part[from_slot, :, :longest]
    number = {context: c for c, context in enumerate(first)}
    states = [after_CD[[number[pair.context] for pair in pairs]]]
    rest = [p for p, pair in enumerate(pairs) if len(pair.continuation) > 1]
    texts = [
        Text(ids[:-1], p, len(context), wanted=len(ids) - 1)
        for p in rest
        for context, ids in [pairs[p]]
    ]
    states += read_texts(engine.decoder, cache, texts, engine.chunk)
    target = [pair.continuation[0] for pair in pairs]
    target += [token for p in rest for token in pairs[p].continuation[1:]]
    owner = [*range(len(pairs)), *(p for p in rest for _ in pairs[p].continuation[1:])]
    return torch.cat(states), target, owner
