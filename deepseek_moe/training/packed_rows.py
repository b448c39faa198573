"""Several whole examples in one row, as many as fit: fewer rows, and hardly any padding."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value

from .examples import TOKENS
from .rows import FORMAT_VERSION, cache_key, column, digest, unwrap_cache_error

PACKED = Features(
    TOKENS
    | {"lengths": List(Value("int32")), "length": Value("int32"), "sources": List(Value("string"))}
)


def pack_lengths(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Rows of indices of examples: each example once, and at most `max_length` ids in a row.

    The longest examples come first, and each joins the row in which it leaves the least room.
    """
    rows: list[list[int]] = []
    with_room: dict[int, list[list[int]]] = defaultdict(list)  # room for so many ids -> rows
    rooms = 0  # bit n is set if some row has room for n more ids
    for index in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        length = lengths[index]
        assert 0 < length <= max_length
        if fitting := rooms >> length:
            room = (fitting & -fitting).bit_length() - 1 + length
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, row = max_length, []
            rows.append(row)
        row.append(index)
        with_room[room - length].append(row)
        rooms |= 1 << (room - length)
    return rows


def pack(dataset: Dataset, max_length: int) -> Dataset:
    """Rows of several whole examples, at most `max_length` ids in each, on disk if `dataset` is.

    Returns:
        input_ids and trained (of all examples in the row), lengths and sources (one for each
        example), length (of the row).
    """
    lengths = column(dataset, "length").tolist()
    plan = Dataset.from_dict({"examples": pack_lengths(lengths, max_length)}).with_format("arrow")
    key = digest(FORMAT_VERSION, cache_key(dataset), max_length)
    beside = [Path(file["filename"]).parent for file in dataset.cache_files]
    with unwrap_cache_error():
        packed = plan.map(
            _join,
            batched=True,
            fn_kwargs={"dataset": dataset.with_format("arrow")},
            remove_columns=["examples"],
            features=PACKED,
            cache_file_name=str(beside[0] / f"packed-{key}.arrow") if beside else None,
            new_fingerprint=key,
            desc="Packing",
        )
    return packed.with_format(None)


def _join(plan: pa.Table, dataset: Dataset) -> pa.Table:
    """The packed rows of a plan. Arrow arrays are moved, since Python's lists take minutes."""
    rows = plan["examples"].combine_chunks()
    table = dataset[rows.flatten().to_pylist()].combine_chunks()
    examples = np.cumsum([0, *rows.value_lengths().to_pylist()])
    ids = np.cumsum([0, *table["length"].to_pylist()])[examples]

    def lists(offsets: np.ndarray, values: pa.ChunkedArray) -> pa.Array:
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values.combine_chunks())

    return pa.table(
        {
            "input_ids": lists(ids, pc.list_flatten(table["input_ids"])),
            "trained": lists(ids, pc.list_flatten(table["trained"])),
            "lengths": lists(examples, table["length"]),
            "length": pa.array(np.diff(ids), pa.int32()),
            "sources": lists(examples, table["source"]),
        }
    )
