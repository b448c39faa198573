"""Instruction and conversation files -> checked examples -> padded or packed batches.

A row is `{"instruction": ..., "output": ...}`, perhaps with an `input`, which follows the
instruction on a new line; or `{"messages": [{"role": ..., "content": ...}, ...]}`, whose last
message is the assistant's. `messages` wins where a row has both, null counts as absent, other
fields are ignored. What the model reads is made by `chat.render`, for training as for chatting.
"""

import csv
import gzip
import hashlib
import io
import json
import lzma
import math
import os
import reprlib
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, Features, List, Value
from datasets.exceptions import DatasetGenerationError
from pyarrow import parquet
from transformers import PreTrainedTokenizerBase

from . import chat
from .checkpoint import HUB_ID
from .errors import UserError

IGNORED = -100  # the label that no loss counts
SHOWN = 3  # bad rows that an error names
ROWS_PER_PROCESS = 2000  # below, starting a process takes longer than it saves
MAX_PROCESSES = 16

CHECKED = Features({name: Value("string") for name in ("source", "messages", "problem")})
TOKENS = {"input_ids": List(Value("int32")), "trained": List(Value("int8"))}
EXAMPLES = Features(TOKENS | {"length": Value("int32"), "source": Value("string")})
PACKED = Features(
    TOKENS
    | {"lengths": List(Value("int32")), "length": Value("int32"), "sources": List(Value("string"))}
)


@dataclass(frozen=True)
class Report:
    """What became of the rows: rows = bad + dropped + kept, and cut ones are among the kept."""

    rows: int
    bad: int  # left out because of an error
    dropped: int  # left out because the prompt fills max_length: nothing to train on remains
    cut: int  # longer than max_length: their end, the EOS with it, is gone
    kept: int
    tokens: int
    trained: int  # tokens of answers, their EOS included
    max_length: int

    def __str__(self) -> str:
        said = f"{self.kept:,} of {self.rows:,} rows, "
        said += f"{self.trained:,} of {self.tokens:,} tokens trained on"
        if self.bad:
            said += f"; {self.bad:,} bad rows skipped"
        if self.cut:
            said += f"; {self.cut:,} cut to {self.max_length:,} tokens, so without EOS"
        if self.dropped:
            said += f"; {self.dropped:,} dropped (no answer within {self.max_length:,} tokens)"
        return said


def load_examples(
    paths: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    skip_bad_rows: bool = False,
    cache_dir: str | None = None,
    num_proc: int | None = None,
) -> tuple[Dataset, Report]:
    """All rows of all paths, checked, rendered and cut to `max_length` ids, on disk.

    The same files and tokenizer are read and encoded once and then found in the cache, so in a
    launch of several processes let one go first.

    Args:
        paths: files (JSON array, JSON lines, CSV, also .gz or .xz; parquet), folders of them (not
            their subfolders), or hub ids of datasets, of which the train split is taken.
        skip_bad_rows: leave bad rows out instead of stopping.
        cache_dir: as for `datasets.load_dataset`.
        num_proc: processes that encode; by default as many as the rows are worth.

    Returns:
        The examples (input_ids, trained: 1 where trained on, length, source: "FILE line N"), and
        the report.

    Raises:
        UserError: bad rows (the first few, with their place), unreadable files, nothing to train
            on.
    """
    if max_length < 1:
        raise UserError(f"model_max_length is {max_length}; it must be 1 or more")
    found = [source for path in paths for source in _locate(path, cache_dir)]
    code = [Path(module).read_text(encoding="utf-8") for module in (__file__, chat.__file__)]
    key = _digest(code, [_identity(source) for _, source in found])
    with _caching():
        rows = _read(found, key, cache_dir)
    problems = _column(rows, "problem")
    bad = np.flatnonzero(problems != "")
    if len(bad) and (not skip_bad_rows or len(bad) == len(rows)):
        raise _bad_rows(rows, bad)
    good = rows.select(np.flatnonzero(problems == "")) if len(bad) else rows
    encoded = _encode(good, tokenizer, max_length, key, num_proc)
    answer = _column(encoded, "answer")
    kept = np.flatnonzero(answer)
    if not len(kept):
        raise UserError(
            f"no row has an answer within model_max_length {max_length}: their prompts alone are "
            "as long; raise --model_max_length or shorten them"
        )
    report = Report(
        rows=len(rows),
        bad=len(bad),
        dropped=len(good) - len(kept),
        cut=int(_column(encoded, "cut")[kept].sum()),
        kept=len(kept),
        tokens=int(_column(encoded, "length")[kept].sum(dtype=np.int64)),
        trained=int(answer.sum(dtype=np.int64)),
        max_length=max_length,
    )
    examples = encoded.select_columns(list(EXAMPLES))
    return (examples if len(kept) == len(encoded) else examples.select(kept)), report


def split(dataset: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Training and evaluation examples: `fraction` of them, drawn with `seed`, are the latter.

    Raises:
        UserError: no such fraction, or one side would have no example.
    """
    if not 0 < fraction < 1:
        raise UserError(f"eval_fraction is {fraction}; it must be above 0 and below 1")
    count = math.ceil(fraction * len(dataset))
    if count == len(dataset):
        raise UserError(
            f"eval_fraction {fraction} of {len(dataset)} examples leaves none to train on; "
            "lower it or add data"
        )
    parts = dataset.train_test_split(test_size=count, seed=seed)
    return parts["train"], parts["test"]


def fingerprint(dataset: Dataset) -> str:
    """A hash of the ids and masks in their order: equal wherever and however they were loaded."""
    digest = hashlib.blake2b(digest_size=8)
    tables = dataset.select_columns(["input_ids", "trained"]).with_format("arrow")
    for table in tables.iter(batch_size=1000):
        for name in ("input_ids", "trained"):
            column = table[name].combine_chunks()
            digest.update(column.value_lengths().to_numpy().astype("<i4").tobytes())
            digest.update(column.flatten().to_numpy().astype("<i4").tobytes())
    return digest.hexdigest()


def show(
    tokenizer: PreTrainedTokenizerBase,
    input_ids: Sequence[int],
    trained: Sequence[int],
    colour: bool,
) -> str:
    """The text with special tokens; what is trained on green, the rest red.

    Without colour, what is trained on stands between ⟦ and ⟧.
    """
    marks = {1: ("\033[32m", "\033[0m"), 0: ("\033[31m", "\033[0m")}
    if not colour:
        marks = {1: ("⟦", "⟧"), 0: ("", "")}
    mask = np.asarray(trained)
    starts = [0, *np.flatnonzero(np.diff(mask)) + 1, len(mask)]
    pieces = []
    for start, end in pairwise(starts):
        before, after = marks[int(mask[start])]
        pieces.append(before + tokenizer.decode(list(input_ids[start:end])) + after)
    return "".join(pieces)


# --- Batches


def pack_lengths(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Which examples go into one row: each exactly once, at most `max_length` together.

    Best fit, longest first: an example joins the row that it leaves the least room in.
    """
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = defaultdict(list)  # room -> rows
    rooms = 0  # bit n: some row has room for n more
    for index in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        length = lengths[index]
        assert 0 < length <= max_length
        fitting = rooms >> length
        if fitting:
            room = (fitting & -fitting).bit_length() - 1 + length
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, row = max_length, len(rows)
            rows.append([])
        rows[row].append(index)
        with_room[room - length].append(row)
        rooms |= 1 << (room - length)
    return rows


def pack(dataset: Dataset, max_length: int) -> Dataset:
    """Rows of several whole examples, at most `max_length` ids together, on disk as `dataset` is.

    Returns:
        input_ids and trained one after another, lengths (of each example), length (of the row),
        sources (of each example).
    """
    lengths = _column(dataset, "length").tolist()
    plan = Dataset.from_dict({"examples": pack_lengths(lengths, max_length)}).with_format("arrow")
    # _fingerprint is what `datasets` itself names its cache files by.
    key = _digest(dataset._fingerprint, max_length, Path(__file__).read_text(encoding="utf-8"))
    beside = [Path(file["filename"]).parent for file in dataset.cache_files]
    with _caching():
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
    """Packed rows, by moving arrow arrays: through Python's lists it would take minutes."""
    rows = plan["examples"].combine_chunks()
    table = dataset[rows.flatten().to_pylist()].combine_chunks()
    examples = np.cumsum([0, *rows.value_lengths().to_pylist()])
    ids = np.cumsum([0, *table["length"].to_pylist()])[examples]

    def lists(offsets: np.ndarray, values: pa.ChunkedArray) -> pa.Array:
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values.combine_chunks())

    columns = {
        "input_ids": lists(ids, pc.list_flatten(table["input_ids"])),
        "trained": lists(ids, pc.list_flatten(table["trained"])),
        "lengths": lists(examples, table["length"]),
        "length": pa.array(np.diff(ids), pa.int32()),
        "sources": lists(examples, table["source"]),
    }
    return pa.table(columns)


class Collator:
    """Examples, or packed rows of them, as a batch: padded on the right to the longest row.

    There is no attention mask: under causal attention nothing real sees what is right of it.
    Packed rows need a model that uses no cache (`use_cache=False`, which Trainer sets): with one,
    transformers overlooks that positions begin anew, and examples see those before them.
    """

    def __init__(
        self, pad_token_id: int, packing: bool, pad_to_multiple_of: int | None = None
    ) -> None:
        self.pad_token_id = pad_token_id
        self.packing = packing
        self.pad_to_multiple_of = pad_to_multiple_of or 1

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """Tensors [B, L], int64, from rows of `load_examples` or (when packing) of `pack`.

        Returns:
            input_ids; labels, -100 where not trained on; sequence_ids, the number of the example
            in this batch, -1 in padding; sources, one for each example. When packing also
            position_ids from 0 in each example, and what varlen attention takes of them:
            cu_seq_lens_q and cu_seq_lens_k (int32, where each begins in B*L, then B*L) and
            max_length_q and max_length_k. A row's padding counts as one more example there.
        """
        width = max(len(row["input_ids"]) for row in features)
        width = math.ceil(width / self.pad_to_multiple_of) * self.pad_to_multiple_of
        shape = (len(features), width)
        ids = np.full(shape, self.pad_token_id, dtype=np.int64)
        labels = np.full(shape, IGNORED, dtype=np.int64)
        sequences = np.full(shape, -1, dtype=np.int64)
        segments: list[int] = []
        sources: list[str] = []
        for i, row in enumerate(features):
            lengths, length = row.get("lengths", [row["length"]]), row["length"]
            assert self.packing or len(lengths) == 1
            trained = np.asarray(row["trained"], dtype=bool)
            # Or the last token of the example before would be taught to predict it.
            assert not trained[np.cumsum([0, *lengths[:-1]])].any()
            ids[i, :length] = row["input_ids"]
            labels[i, :length] = np.where(trained, ids[i, :length], IGNORED)
            sequences[i, :length] = np.repeat(np.arange(len(lengths)) + len(sources), lengths)
            sources += row.get("sources") or [row["source"]]
            segments += [*lengths, width - length] if length < width else lengths
        batch = {"input_ids": ids, "labels": labels, "sequence_ids": sequences}
        batch = {name: torch.from_numpy(array) for name, array in batch.items()}
        return batch | {"sources": sources} | (_varlen(segments, shape) if self.packing else {})


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


# --- From rows to examples


def _encode(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    key: str,
    num_proc: int | None,
) -> Dataset:
    """Checked rows as EXAMPLES, with answer (how many ids are trained on) and cut."""
    if num_proc is None:
        num_proc = min(os.cpu_count() or 1, MAX_PROCESSES, len(rows) // ROWS_PER_PROCESS)
    with _caching():
        return rows.map(
            _encode_batch,
            batched=True,
            fn_kwargs={"tokenizer": tokenizer, "max_length": max_length},
            remove_columns=["messages", "problem"],
            features=Features(EXAMPLES | {"answer": Value("int32"), "cut": Value("bool")}),
            num_proc=num_proc if num_proc > 1 else None,
            new_fingerprint=_digest(key, tokenizer.backend_tokenizer.to_str(), max_length),
            desc="Encoding",
        )


def _encode_batch(
    rows: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[str, list[Any]]:
    encoded: dict[str, list[Any]] = defaultdict(list)
    for messages in rows["messages"]:
        ids, trained = chat.render(tokenizer, json.loads(messages))
        encoded["cut"].append(len(ids) > max_length)
        encoded["input_ids"].append(ids[:max_length])
        encoded["trained"].append(trained[:max_length])
        encoded["length"].append(len(encoded["input_ids"][-1]))
        encoded["answer"].append(sum(encoded["trained"][-1]))
    return encoded


@contextmanager
def _caching() -> Iterator[None]:
    """Brings out the UserError that `datasets` wraps, and makes one of a full or closed disk."""
    try:
        yield
    except (DatasetGenerationError, OSError) as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else error
        if isinstance(cause, UserError):
            raise cause from None
        if isinstance(cause, OSError):
            raise UserError(
                f"the examples cannot be written to the cache: {_first_line(cause)}; "
                "make room or give another --cache_dir"
            ) from error
        raise


class _BadRow(ValueError):
    """What was found in a row, and what was wanted."""


def _messages(row: Any) -> list[chat.Message]:
    """The row as a conversation that `chat.render` takes, or a _BadRow."""
    if not isinstance(row, dict):
        raise _BadRow(f"found {_name(row)}, wanted an object with instruction and output")
    if row.get("messages") is not None:
        return _checked_messages(row["messages"])
    for field in ("instruction", "output"):
        if field not in row:
            fields = ", ".join(map(str, row)) or "no field"
            raise _BadRow(f"no {field}: found {fields}, wanted instruction and output, or messages")
        _check_text(row[field], field)
    question, extra = row["instruction"], row.get("input")
    if extra is not None:
        _check_text(extra, "input")
        question += f"\n{extra}" if extra.strip() else ""
    _check_answer(row["output"], "output")
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": row["output"]},
    ]


def _checked_messages(messages: Any) -> list[chat.Message]:
    if not isinstance(messages, list) or not messages:
        raise _BadRow(f"messages is {_name(messages)}, wanted a list of role and content")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise _BadRow(f"message {number} is {_name(message)}, wanted role and content")
        role = message.get("role")
        if role not in ("user", "assistant", "system"):
            raise _BadRow(
                f"message {number} has role {reprlib.repr(role)}, wanted user, assistant or system"
            )
        _check_text(message.get("content"), f"content of message {number}")
        if role == "assistant":
            _check_answer(message["content"], f"content of message {number}")
    if role != "assistant":
        raise _BadRow(f"the last message has role {reprlib.repr(role)}, wanted assistant")
    return [{key: message[key] for key in ("role", "content")} for message in messages]


def _check_text(value: Any, what: str) -> None:
    if not isinstance(value, str):
        raise _BadRow(f"{what} is {_name(value)}, wanted text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _BadRow(
            f"{what} has half a character ({value[error.start]!a}), wanted text"
        ) from None


def _check_answer(value: str, what: str) -> None:
    if not value.strip():
        raise _BadRow(f"{what} is empty, wanted an answer")


def _name(value: Any) -> str:
    if value is None:
        return "null"
    kinds = {str: "text", bool: "truth value", int: "number", float: "number", dict: "object"}
    return f"{kinds.get(type(value), type(value).__name__)} {reprlib.repr(value)}"


def _bad_rows(rows: Dataset, bad: np.ndarray) -> UserError:
    some = rows.select(bad[:SHOWN])
    named = [
        f"{place}: {problem}"
        for place, problem in zip(some["source"], some["problem"], strict=True)
    ]
    more = f"; and {len(bad) - len(some):,} more" if len(bad) > len(some) else ""
    remedy = "mend them or skip them with --skip_bad_rows True"
    if len(bad) == len(rows):
        remedy = "give data in one of these forms"
    return UserError(
        f"{len(bad):,} of {len(rows):,} rows are bad: {'; '.join(named)}{more}; {remedy}"
    )


# --- From files to rows

Rows = Iterator[tuple[str, Any]]
"""The place in the file, and the row as parsed; or the _BadRow why it could not be parsed."""


def _locate(path: str, cache_dir: str | None) -> list[tuple[str, Path | Dataset]]:
    """The files of a path, or the dataset of a hub id, each with its name in messages."""
    file = Path(path).expanduser()
    kinds = ", ".join(READERS)
    if file.is_dir():
        files = [one for one in sorted(file.iterdir()) if one.is_file() and _reader(one)]
        if not files:
            raise UserError(f"{path} has no data files; give a folder with files of {kinds}")
        return [(str(one), one) for one in files]
    if not file.exists() and (_reader(file) or not HUB_ID.fullmatch(path)):
        raise UserError(f"{path} does not exist; give a file, a folder or a hub id OWNER/NAME")
    if file.exists():
        if not _reader(file):
            raise UserError(f"{path} is of no known kind; give {kinds}, or these with .gz or .xz")
        return [(path, file)]
    try:
        return [(path, datasets.load_dataset(path, split="train", cache_dir=cache_dir))]
    except Exception as error:  # of many libraries, and of any class
        raise UserError(
            f"{path} is no file here and could not be loaded as a dataset of the hub: "
            f"{_first_line(error)}; check the name and the network"
        ) from error


def _identity(source: Path | Dataset) -> tuple[Any, ...]:
    if isinstance(source, Dataset):
        return ("hub", source._fingerprint)
    status = source.stat()
    return (str(source.resolve()), status.st_size, status.st_mtime_ns)


def _read(found: list[tuple[str, Path | Dataset]], key: str, cache_dir: str | None) -> Dataset:
    """Every row, parsed and checked: source, messages (as JSON) and problem ("" if there is none).

    Bad rows stay in, so that they are found again in the cache.
    """
    return Dataset.from_generator(
        _checked_rows,
        features=CHECKED,
        cache_dir=cache_dir,
        gen_kwargs={"found": tuple(found)},  # a list would be divided among processes
        fingerprint=key,
    )


def _checked_rows(found: Sequence[tuple[str, Path | Dataset]]) -> Iterator[dict[str, str]]:
    for name, source in found:
        empty = True
        for place, row in _rows_of(name, source):
            empty, messages, problem = False, [], ""
            try:
                if isinstance(row, _BadRow):
                    raise row
                messages = _messages(row)
            except _BadRow as error:
                problem = str(error)
            text = json.dumps(messages, ensure_ascii=False)
            yield {"source": f"{name} {place}", "messages": text, "problem": problem}
        if empty:
            raise UserError(f"{name} has no rows; give a file with some")


def _rows_of(name: str, source: Path | Dataset) -> Rows:
    if isinstance(source, Dataset):
        yield from ((f"row {number}", row) for number, row in enumerate(source, 1))
        return
    broken = (OSError, ValueError, EOFError, RecursionError, lzma.LZMAError, zlib.error, csv.Error)
    reader = _reader(source)
    assert reader
    try:
        with OPENERS.get(source.suffix.lower(), open)(source, "rb") as stream:
            yield from reader(stream)
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 ({error.reason}); convert it") from error
    except (*broken, pa.ArrowException) as error:
        raise UserError(
            f"{name} cannot be read: {_first_line(error)}; mend or replace it"
        ) from error


def _json_rows(stream: BinaryIO) -> Rows:
    """Of one array, or of lines with an object each: the first character tells."""
    first = True
    for number, line in enumerate(stream, 1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")  # the mark that Windows puts before UTF-8
        if not line.strip():
            continue
        if first and line.lstrip().startswith(b"["):
            whole = b"\n" * (number - 1) + line + stream.read()  # errors name the line
            for row_number, row in enumerate(json.loads(whole.decode()), 1):
                yield f"row {row_number}", row
            return
        first = False
        try:
            row = json.loads(line.decode())
        except UnicodeDecodeError as error:
            row = _BadRow(f"byte {error.start + 1} is not UTF-8, wanted a JSON object")
        except json.JSONDecodeError as error:
            row = _BadRow(
                f"invalid JSON ({error.msg} at column {error.colno}), wanted an object on one line"
            )
        except (ValueError, RecursionError) as error:  # a huge number, or too deep
            row = _BadRow(f"invalid JSON ({error}), wanted an object on one line")
        yield f"line {number}", row


def _csv_rows(stream: BinaryIO) -> Rows:
    csv.field_size_limit(2**31 - 1)  # for all of Python; the default refuses long answers
    reader = csv.reader(io.TextIOWrapper(stream, "utf-8-sig", newline=""), strict=True)
    header = next(reader, [])
    line = reader.line_num + 1
    for fields in reader:
        if len(fields) == len(header):
            yield f"line {line}", dict(zip(header, fields, strict=True))
        elif fields:
            found = f"found {len(fields)} fields, wanted {len(header)} as in the header"
            yield f"line {line}", _BadRow(f"{found} (fields with commas need quotes)")
        line = reader.line_num + 1


def _parquet_rows(stream: BinaryIO) -> Rows:
    number = 0
    for batch in parquet.ParquetFile(stream).iter_batches(batch_size=1000):
        for row in batch.to_pylist():
            number += 1
            yield f"row {number}", row


OPENERS: dict[str, Callable[..., BinaryIO]] = {".gz": gzip.open, ".xz": lzma.open}
READERS: dict[str, Callable[[BinaryIO], Rows]] = {
    ".json": _json_rows,
    ".jsonl": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}


def _reader(file: Path) -> Callable[[BinaryIO], Rows] | None:
    inner = Path(file.stem) if file.suffix.lower() in OPENERS else file
    return READERS.get(inner.suffix.lower())


# --- Small things


def _column(dataset: Dataset, name: str) -> np.ndarray:
    return dataset.select_columns(name).with_format("arrow")[:][name].to_numpy()


def _digest(*parts: object) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".;:")
