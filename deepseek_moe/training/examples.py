"""Checked rows -> examples -> padded or packed batches.

`chat.render` makes what the model reads, in training as in a chat.
"""

import hashlib
import json
import math
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from .. import chat
from ..errors import UserError
from ..model.configuration_deepseek import DeepseekConfig
from .rows import (
    FORMAT_VERSION,
    cache_key,
    column,
    digest,
    good_rows,
    read_rows,
    unused_fields,
    unwrap_cache_error,
)

IGNORED = -100  # a label that the loss leaves out
ROWS_PER_PROCESS = 2000  # for fewer rows, starting a process takes longer than it saves
MAX_PROCESSES = 16

TOKENS = {"input_ids": List(Value("int32")), "trained": List(Value("int8"))}
EXAMPLES = Features(TOKENS | {"length": Value("int32"), "source": Value("string")})


def load_examples(
    paths: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    skip_bad_rows: bool = False,
    cache_dir: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> tuple[Dataset, str]:
    """All rows of all paths, checked, rendered and cut to `max_length` ids, on disk.

    Files are encoded once for a tokenizer, and then found in the cache. Of several processes, one
    must therefore go first. `paths`, `cache_dir` and `columns` are those of `rows.read_rows`.

    Returns:
        The examples (input_ids; trained: 1 for ids to train on; length; source: "FILE line N"), and
        a line that says how many rows are left out or cut, and why.

    Raises:
        UserError: there are unreadable files, bad rows that are not skipped, or no row to train on.
    """
    rows = read_rows(paths, cache_dir, columns)
    good = good_rows(rows, skip_bad_rows)
    spoken = (tokenizer.special_tokens_map, tokenizer.chat_template)
    vocabulary = tokenizer.backend_tokenizer.to_str()
    key = digest(FORMAT_VERSION, cache_key(rows), vocabulary, spoken, max_length)
    encoded = _encode(good, tokenizer, max_length, key)
    answer = column(encoded, "answer")
    kept = np.flatnonzero(answer)
    if not len(kept):
        raise UserError(
            f"no row has an answer within model_max_length {max_length}: their prompts alone are "
            "as long; raise --model_max_length or shorten them"
        )
    tokens = column(encoded, "length")[kept].sum(dtype=np.int64)
    report = f"{len(kept):,} of {len(rows):,} rows, "
    report += f"{answer.sum(dtype=np.int64):,} of {tokens:,} tokens trained on"
    if bad := len(rows) - len(good):
        report += f"; {bad:,} bad rows skipped"
    if cut := column(encoded, "cut")[kept].sum():
        report += f"; {cut:,} cut to {max_length:,} tokens, so without EOS"
    if dropped := len(good) - len(kept):
        report += f"; {dropped:,} dropped (no answer within {max_length:,} tokens)"
    if unused := unused_fields(rows):
        report += f"; fields not used: {', '.join(unused)}"
    examples = encoded.select_columns(list(EXAMPLES))
    return (examples.select(kept) if dropped else examples), report


def _encode(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, key: str
) -> Dataset:
    """Checked rows as EXAMPLES, with answer (how many ids are trained on) and cut (or whole)."""
    processes = min(os.cpu_count() or 1, MAX_PROCESSES, len(rows) // ROWS_PER_PROCESS)
    with unwrap_cache_error():
        return rows.map(
            _encode_batch,
            batched=True,
            fn_kwargs={"tokenizer": tokenizer, "max_length": max_length},
            remove_columns=["messages", "problem", "unused"],
            features=Features(EXAMPLES | {"answer": Value("int32"), "cut": Value("bool")}),
            num_proc=processes if processes > 1 else None,
            new_fingerprint=key,
            desc="Encoding",
        )


def _encode_batch(
    rows: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[str, list[Any]]:
    encoded: dict[str, list[Any]] = defaultdict(list)
    for source, messages in zip(rows["source"], rows["messages"], strict=True):
        try:
            ids, trained = chat.render(tokenizer, json.loads(messages))
        except UserError as error:  # the checkpoint's own template may refuse a conversation
            raise UserError(f"{source}: {error}") from error
        encoded["cut"].append(len(ids) > max_length)
        encoded["input_ids"].append(ids[:max_length])
        encoded["trained"].append(trained[:max_length])
        encoded["length"].append(len(encoded["input_ids"][-1]))
        encoded["answer"].append(sum(encoded["trained"][-1]))
    return encoded


def split(dataset: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Examples to train on and to evaluate on. A random `fraction` of them is held out.

    Raises:
        UserError: none would be left to train on.
    """
    count = math.ceil(fraction * len(dataset))
    if count == len(dataset):
        raise UserError(
            f"eval_fraction {fraction} of {len(dataset)} examples leaves none to train on; "
            "lower it or add data"
        )
    parts = dataset.train_test_split(test_size=count, seed=seed)
    return parts["train"], parts["test"]


def refuse_longer(train: Dataset, evaluation: Dataset | None, config: DeepseekConfig) -> None:
    """Raises a UserError if an example is longer than the model's context."""
    longest = max(int(column(some, "length").max()) for some in (train, evaluation) if some)
    context = config.max_position_embeddings
    if longest > context:
        raise UserError(
            f"a row has {longest:,} tokens, but the model's context is {context:,}; "
            f"--model_max_length {context} cuts such rows"
        )


def refuse_fewer(train: Dataset, batch: int) -> None:
    """Raises a UserError if there are fewer rows than one batch, and only whole batches train."""
    if len(train) < batch:
        raise UserError(
            f"{len(train)} rows are less than a batch of {batch}, which --dataloader_drop_last "
            "drops; leave that out, or lower --per_device_train_batch_size"
        )


def fingerprint(dataset: Dataset) -> str:
    """A hash of the ids and masks in their order. It does not depend on how they were loaded."""
    hashed = hashlib.blake2b(digest_size=8)
    for table in dataset.with_format("arrow").iter(batch_size=1000):
        for name in ("input_ids", "trained"):
            column = table[name].combine_chunks()
            hashed.update(column.value_lengths().to_numpy().astype("<i4").tobytes())
            hashed.update(column.flatten().to_numpy().astype("<i4").tobytes())
    return hashed.hexdigest()


def show(
    tokenizer: PreTrainedTokenizerBase,
    input_ids: Sequence[int],
    trained: Sequence[int],
    colour: bool,
) -> str:
    """The text of ids: trained ones green and others red, or without colour trained ones in ⟦⟧."""
    red, green, off = "\033[31m", "\033[32m", "\033[0m"
    marks = [(red, off), (green, off)] if colour else [("", ""), ("⟦", "⟧")]
    text = ""
    for is_trained, part in groupby(zip(trained, input_ids, strict=True), itemgetter(0)):
        before, after = marks[is_trained]
        text += before + tokenizer.decode([token for _, token in part]) + after
    return text


FLAT = 256
"""A flat row is filled up to a multiple of so many ids, so that shapes come again."""


class Collator:
    """Makes a batch of examples, or of packed rows, padded on the right to the longest row.

    There is no attention mask, because causal attention never looks to the right. Packed rows need
    `use_cache=False`, which Trainer sets: with a cache, transformers overlooks that positions begin
    anew, and an example would see those before it.
    """

    def __init__(self, pad_token_id: int, packing: bool) -> None:
        self.pad_token_id, self.packing = pad_token_id, packing

    def __call__(
        self, features: list[dict[str, Any]], flat: int = 0, most_equal: float = math.inf
    ) -> dict[str, Any]:
        """Tensors [B, L], int64, of examples or (when packing) of rows of `packed_rows.pack`.

        Args:
            flat: if not 0, all rows lie end to end in one packed row, B = 1, which is filled up to
                a multiple of so many ids.
            most_equal: examples of one length stay rows if they are more tokens than this. They
                need no padding, and attention within rows is faster without bounds. Graphs take
                flat rows only, so what a graph may take has to be flat.

        Returns:
            input_ids; labels (IGNORED for ids that are not trained on); sequence_ids (the number of
            the example in this batch, -1 in padding); sources (one for each example); num_tokens.
            In packed rows also position_ids, which begin at 0 in each example, and the arguments of
            varlen attention: cu_seq_lens_q and _k (int32: where each example begins in B*L, then
            B*L), max_length_q and _k. There, the padding of a row counts as one more example.
        """
        num_tokens = sum(row["length"] for row in features)
        width = max(row["length"] for row in features)
        equal = not self.packing and num_tokens == width * len(features)
        flat = 0 if equal and num_tokens > most_equal else flat
        if flat:
            features, width = [_end_to_end(features)], -(-num_tokens // flat) * flat
        shape = (len(features), width)
        ids = np.full(shape, self.pad_token_id, dtype=np.int64)
        labels = np.full(shape, IGNORED, dtype=np.int64)
        sequences = np.full(shape, -1, dtype=np.int64)
        segments, sources = [], []
        for i, row in enumerate(features):
            lengths, length = row.get("lengths", [row["length"]]), row["length"]
            assert self.packing or flat or len(lengths) == 1
            trained = np.asarray(row["trained"], dtype=bool)
            # The first id of an example is never trained on: the id before it is another example's.
            assert not trained[np.cumsum([0, *lengths[:-1]])].any()
            ids[i, :length] = row["input_ids"]
            labels[i, :length] = np.where(trained, ids[i, :length], IGNORED)
            sequences[i, :length] = np.repeat(np.arange(len(lengths)) + len(sources), lengths)
            sources += row.get("sources") or [row["source"]]
            segments += [*lengths, width - length] if length < width else lengths
        batch = {"input_ids": ids, "labels": labels, "sequence_ids": sequences}
        batch = {name: torch.from_numpy(array) for name, array in batch.items()}
        batch |= {"sources": sources, "num_tokens": num_tokens}
        return batch | (_varlen(segments, shape) if self.packing or flat else {})


def _end_to_end(features: list[dict[str, Any]]) -> dict[str, Any]:
    """One packed row of all examples in the rows."""
    ids, trained = ([one for row in features for one in row[n]] for n in ("input_ids", "trained"))
    lengths = [one for row in features for one in row.get("lengths", [row["length"]])]
    sources = [one for row in features for one in row.get("sources") or [row["source"]]]
    found = {"input_ids": ids, "trained": trained, "lengths": lengths, "sources": sources}
    return found | {"length": len(ids)}


def _varlen(segments: list[int], shape: tuple[int, int]) -> dict[str, Any]:
    ends = np.cumsum([0, *segments])
    positions = np.arange(ends[-1]) - np.repeat(ends[:-1], segments)
    bounds, longest = torch.from_numpy(ends.astype(np.int32)), max(segments)
    return {
        "position_ids": torch.from_numpy(positions.reshape(shape)),
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }
