"""Files -> checked rows: each is a conversation, or says what is wrong with it, and where it is.

conversations.py says what a row may look like.
"""

import csv
import gzip
import hashlib
import io
import json
import lzma
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import numpy as np
from datasets import Dataset, Features, Value
from datasets.exceptions import DatasetGenerationError
from pyarrow import parquet

from ..errors import UserError, as_user_error, first_words
from .conversations import FIELDS, BadRow, find_conversation, make_object

FORMAT_VERSION = 3
"""Part of the names of cache files. Raise it whenever the same data becomes other rows, examples or
packed rows, so that old caches are not read."""

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")  # as in checkpoint.py
SHOWN = 3  # bad rows that an error names
SHOWN_FIELDS = 20

CHECKED = Features({name: Value("string") for name in ("source", "messages", "problem", "unused")})

Rows = Iterator[tuple[str, Any]]
"""The place in the file, and the row as parsed, or a BadRow that says why it was not parsed."""


def read_rows(
    paths: Sequence[str], cache_dir: str | None = None, columns: Mapping[str, str] | None = None
) -> Dataset:
    """Every row of all paths, parsed and checked, bad ones too. Files are read once, and then found
    in the cache.

    Args:
        paths: files (JSON array, JSON lines, CSV, each also as .gz or .xz; parquet), folders of
            them (without their subfolders), or hub ids of datasets with a train split.
        cache_dir: as for `datasets.load_dataset`.
        columns: as for `find_conversation`.

    Returns:
        The columns source ("FILE line N"), messages (a conversation, as JSON), problem (empty for a
        good row) and unused (the names of the fields that were not used, a line each).

    Raises:
        UserError: a path does not exist, a file cannot be read or has no rows, or no row has a
            field that `columns` names.
    """
    found = [source for path in paths for source in _find_sources(path, cache_dir)]
    columns = tuple(sorted((columns or {}).items()))
    with unwrap_cache_error():
        return Dataset.from_generator(
            _checked_rows,
            features=CHECKED,
            cache_dir=cache_dir,
            # Lists would be divided among processes.
            gen_kwargs={"found": tuple(found), "columns": columns},
            fingerprint=digest(FORMAT_VERSION, [_identity(one) for _, one in found], columns),
        )


def good_rows(rows: Dataset, skip_bad_rows: bool = False) -> Dataset:
    """The rows of `read_rows` without a problem.

    Raises:
        UserError: there are bad rows that must not be skipped, or all are bad. It names the first
            few with their places.
    """
    is_bad = column(rows, "problem") != ""
    bad = np.flatnonzero(is_bad)
    if not len(bad):
        return rows
    if skip_bad_rows and not is_bad.all():
        return rows.select(np.flatnonzero(~is_bad))
    found = [f"{row['source']}: {row['problem']}" for row in rows.select(bad[:SHOWN])]
    if len(bad) > SHOWN:
        found.append(f"and {len(bad) - SHOWN:,} more")
    remedy = "mend them or skip them with --skip_bad_rows True"
    if is_bad.all():
        remedy = "give rows with instruction and output, or with messages"
    raise UserError(f"{len(bad):,} of {len(rows):,} rows are bad: {'; '.join(found)}; {remedy}")


# --- From files to rows


def _find_sources(path: str, cache_dir: str | None) -> list[tuple[str, Path | Dataset]]:
    """The files at a path, or the dataset of a hub id. Each comes with its name for messages."""
    file = Path(path).expanduser()
    kinds = ", ".join(READERS)
    if file.is_dir():
        files = [one for one in sorted(file.iterdir()) if one.is_file() and _reader(one)]
        if not files:
            raise UserError(f"{path} has no data files; give a folder with files of {kinds}")
        return [(str(one), one) for one in files]
    if file.exists():
        if not _reader(file):
            raise UserError(f"{path} is of no known kind; give {kinds}, or these with .gz or .xz")
        return [(path, file)]
    if _reader(file) or not HUB_ID.fullmatch(path):
        raise UserError(f"{path} does not exist; give a file, a folder or a hub id OWNER/NAME")
    what = f"{path} is no file here and could not be loaded as a dataset of the hub"
    with as_user_error(what, "check the name and the network"):
        return [(path, datasets.load_dataset(path, split="train", cache_dir=cache_dir))]


def _identity(source: Path | Dataset) -> tuple[Any, ...]:
    if isinstance(source, Dataset):
        return ("hub", cache_key(source))
    status = source.stat()
    return (str(source.resolve()), status.st_size, status.st_mtime_ns)


def _checked_rows(
    found: Sequence[tuple[str, Path | Dataset]], columns: Sequence[tuple[str, str]]
) -> Iterator[dict[str, str]]:
    seen: set[str] = set()
    for name, source in found:
        place = None
        for place, row in _rows_of(name, source):
            messages, problem, unused = [], "", []
            seen.update(row if isinstance(row, dict) else ())
            try:
                messages, unused = find_conversation(row, dict(columns))
            except BadRow as error:
                problem = str(error)
            yield {
                "source": _writable(f"{name} {place}"),
                "messages": json.dumps(messages, ensure_ascii=False),
                "problem": _writable(problem),
                "unused": _writable("\n".join(unused)),
            }
        if place is None:
            raise UserError(f"{name} has no rows; give a file with some")
    for ours, theirs in columns:
        if theirs not in seen:
            fields = ", ".join(sorted(seen)[:SHOWN_FIELDS]) or "no field"
            raise UserError(
                f"no row has {theirs}, which --columns gives for {ours}, but {fields}; "
                "mend the name"
            )


def _writable(text: str) -> str:
    """`text`, with halves of characters in names of files or fields escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def _rows_of(name: str, source: Path | Dataset) -> Rows:
    if isinstance(source, Dataset):
        yield from _numbered(source)
        return
    with as_user_error(f"{name} cannot be read", "mend or replace it"):
        try:
            with OPENERS.get(source.suffix.lower(), open)(source, "rb") as stream:
                yield from _reader(source)(stream)
        except UnicodeDecodeError as error:
            raise UserError(f"{name} is not UTF-8 ({error.reason}); convert it") from error


def _numbered(rows: Iterable[Any]) -> Rows:
    return ((f"row {number}", row) for number, row in enumerate(rows, 1))


def _json_rows(stream: BinaryIO) -> Rows:
    """The rows of one JSON array, or of lines of JSON. The first character tells which it is."""
    first = True
    for number, line in enumerate(stream, 1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")  # Windows marks UTF-8 with it
        if not line.strip():
            continue
        if first and line.lstrip().startswith(b"["):
            whole = b"\n" * (number - 1) + line + stream.read()  # errors name the line
            yield from _numbered(json.loads(whole.decode(), object_pairs_hook=make_object))
            return
        first = False
        try:
            row = json.loads(line.decode(), object_pairs_hook=make_object)
        except UnicodeDecodeError as error:
            row = BadRow(f"byte {error.start + 1} is not UTF-8 (convert it), wanted a JSON object")
        except json.JSONDecodeError as error:
            row = BadRow(
                f"invalid JSON ({error.msg} at column {error.colno}), wanted an object on one line"
            )
        except (ValueError, RecursionError) as error:  # a huge number, or too deep
            row = BadRow(f"invalid JSON ({error}), wanted an object on one line")
        yield f"line {number}", row


def _csv_rows(stream: BinaryIO) -> Rows:
    csv.field_size_limit(2**31 - 1)  # the default refuses long answers
    reader = csv.reader(io.TextIOWrapper(stream, "utf-8-sig", newline=""), strict=True)
    header = next(reader, [])
    _refuse_twice(header)
    line = reader.line_num + 1
    for fields in reader:
        if len(fields) == len(header):
            yield f"line {line}", dict(zip(header, fields, strict=True))
        elif fields:
            found = f"found {len(fields)} fields, wanted {len(header)} as in the header"
            yield f"line {line}", BadRow(f"{found} (fields with commas need quotes)")
        line = reader.line_num + 1


def _parquet_rows(stream: BinaryIO) -> Rows:
    file = parquet.ParquetFile(stream)
    _refuse_twice(file.schema_arrow.names)
    batches = file.iter_batches(batch_size=1000)
    return _numbered(chain.from_iterable(batch.to_pylist() for batch in batches))


def _refuse_twice(names: Sequence[str]) -> None:
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ValueError(f"the column {twice[0]} occurs twice")


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


# --- What others need too


def parse_columns(given: str) -> dict[str, str]:
    """What `--columns instruction=question,output=answer` says: our names, and those of the data.

    Raises:
        UserError: it says nothing of the kind, or gives a name twice or one that is not of FIELDS.
    """
    columns = {}
    for pair in filter(None, given.split(",")):
        ours, equals, theirs = (part.strip() for part in pair.partition("="))
        if not equals or not theirs or ours not in FIELDS or ours in columns:
            raise UserError(
                f"--columns {pair!r} is no name of {', '.join(FIELDS)} with the name that your "
                "data has for it; write --columns instruction=question,output=answer"
            )
        if theirs in columns.values():
            raise UserError(
                f"--columns gives {theirs} two names; "
                "write --columns instruction=question,output=answer"
            )
        columns[ours] = theirs
    return columns


@contextmanager
def unwrap_cache_error() -> Iterator[None]:
    """Brings out the UserError, or makes one of the OSError, that `datasets` has wrapped while it
    filled its cache."""
    try:
        yield
    except (DatasetGenerationError, OSError) as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else error
        if isinstance(cause, UserError):
            raise cause from None
        if isinstance(cause, OSError):
            raise UserError(
                f"the examples cannot be written to the cache: {first_words(cause)}; "
                "make room or give another --cache_dir"
            ) from error
        raise


def unused_fields(rows: Dataset) -> list[str]:
    """The names of the fields that were used in no row in which they are."""
    return sorted({name for names in set(column(rows, "unused")) for name in names.splitlines()})


def column(dataset: Dataset, name: str) -> np.ndarray:
    """A whole column by way of arrow, which is much faster than row by row."""
    return dataset.select_columns(name).with_format("arrow")[:][name].to_numpy()


def cache_key(dataset: Dataset) -> str:
    """The name by which `datasets` knows the contents of a dataset in its cache.

    It is private (Dataset.__init__ in datasets/arrow_dataset.py). Nothing public tells apart two
    selections of the same file.
    """
    return dataset._fingerprint


def digest(*parts: object) -> str:
    """A name for a cache file, equal for equal `parts`."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()
