"""Files to rows: every format, and every way in which a row or a file can be wrong."""

import csv
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet
from row_fixtures import ROWS, conversations, lines_of, write_jsonl
from text_fixtures import assistant, system, user

from deepseek_moe.errors import UserError
from deepseek_moe.training.rows import good_rows, read_rows

datasets.disable_progress_bars()

GOOD = {"instruction": "a", "output": "b"}
LONG = GOOD | {"output": "word " * 40_000}  # csv's own limit for a field is 131,072 characters


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., datasets.Dataset]:
    """The good rows of files in `tmp_path`, with a cache of their own."""

    def read(*names: str, skip_bad_rows: bool = False, cache: str = "cache") -> datasets.Dataset:
        paths = [str(tmp_path / name) for name in names]
        return good_rows(read_rows(paths, str(tmp_path / cache)), skip_bad_rows)

    return read


def write_csv(file: Path, rows: list[dict[str, str]]) -> None:
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, ["instruction", "input", "output", "id"])
        writer.writeheader()
        writer.writerows(rows)


WRITERS: dict[str, Callable[[Path, list[Any]], object]] = {
    "array.json": lambda file, rows: file.write_text(json.dumps(rows, indent=1)),
    "array.jsonl": lambda file, rows: file.write_text("\n " + json.dumps(rows)),
    "lines.json": write_jsonl,
    "blank.jsonl": lambda f, rows: f.write_text("\n" + lines_of(rows).replace("\n", "\r\n\r\n")),
    "marked.jsonl": lambda file, rows: file.write_text(lines_of(rows), encoding="utf-8-sig"),
    "LINES.JSONL.GZ": lambda f, rows: f.write_bytes(gzip.compress(lines_of(rows).encode())),
    "array.json.xz": lambda f, rows: f.write_bytes(lzma.compress(json.dumps(rows).encode())),
    "table.parquet": lambda f, rows: parquet.write_table(pa.Table.from_pylist(rows), f),
    "table.csv": write_csv,
}


def contents(rows: datasets.Dataset) -> list[list[dict[str, str]]]:
    return [json.loads(messages) for messages in rows["messages"]]


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_conversations(name, read, tmp_path):
    rows = [*ROWS, LONG]
    WRITERS[name](tmp_path / name, [row | {"id": str(n)} for n, row in enumerate(rows)])
    found = read(name)
    assert contents(found) == conversations(rows)
    assert found.column_names == ["source", "messages", "problem", "unused"]


def test_a_column_that_no_row_has_is_named(tmp_path):
    file, cache = tmp_path / "x.jsonl", str(tmp_path / "cache")
    write_jsonl(file, [GOOD, GOOD | {"context": "c"}, GOOD | {"context": None}])
    assert not any(read_rows([str(file)], cache, {"input": "context"})["problem"])
    with pytest.raises(
        UserError, match=r"no row has contxt, which --columns .* input, but context, "
    ):
        read_rows([str(file)], cache, {"input": "contxt"})


def test_a_field_whose_name_has_half_a_character_is_unused(read, tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps(GOOD | {"\ud800": "a"}))
    assert read("x.jsonl")["unused"][:] == ["\\ud800"]


def test_a_folder_and_several_paths(read, tmp_path):
    folder = tmp_path / "folder"
    (folder / "below").mkdir(parents=True)
    write_jsonl(folder / "b.jsonl", ROWS[2:])
    WRITERS["array.json.xz"](folder / "a.json.xz", ROWS[:2])
    write_jsonl(folder / "below" / "c.jsonl", ROWS)
    (folder / "LICENSE").write_text("not data")
    write_csv(tmp_path / "x.csv", ROWS[:1])
    rows = read("folder", "x.csv")
    assert contents(rows) == conversations([*ROWS, ROWS[0]])
    places = ["a.json.xz row 1", "a.json.xz row 2", "b.jsonl line 1", "b.jsonl line 2"]
    places = [f"{folder}/{place}" for place in places] + [f"{tmp_path}/x.csv line 2"]
    assert rows["source"][:] == places


@pytest.mark.parametrize("name", ["lines.json", "table.parquet"])
def test_messages_win_and_null_is_absent(name, read, tmp_path):
    """A table has all columns in all rows."""
    talks = [
        [user("a"), assistant("b")],
        [system("Hm."), user("a"), assistant("b"), user("c"), assistant("d")],
    ]
    extra = [[message | {"weight": 1} for message in talk] for talk in talks]
    rows = [
        {"messages": extra[0], "instruction": None, "output": None},
        {"messages": extra[1], "instruction": "x", "output": "y"},
        {"messages": None, "instruction": "x", "output": "y"},
    ]
    WRITERS[name](tmp_path / name, rows)
    assert contents(read(name)) == [*talks, [user("x"), assistant("y")]]


def test_a_dataset_of_the_hub(monkeypatch, tmp_path):
    def load_dataset(name: str, split: str, cache_dir: str) -> datasets.Dataset:
        if name != "own/data":
            raise ValueError("two\nlines")
        assert (split, cache_dir) == ("train", str(tmp_path))
        return datasets.Dataset.from_list([*ROWS, ROWS[0] | {"output": " "}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = read_rows(["own/data"], str(tmp_path))
    with pytest.raises(UserError, match="1 of 5 rows are bad: own/data row 5: output is empty"):
        good_rows(rows)
    assert contents(good_rows(rows, skip_bad_rows=True)) == conversations(ROWS)
    with pytest.raises(UserError, match=r"^no/data is no file here and .*: two lines; check"):
        read_rows(["no/data"])


BAD_ROWS: list[tuple[Any, str]] = [
    ({"instruction": "a", "output": None}, "no output: found instruction"),
    ({"instruction": "a", "output": " \n\t"}, "output is empty, wanted text"),
    ("a", "the row is text 'a', wanted an object"),
]
BAD_LINES = [
    (b'{"instruction": "a", "output": "b"', "invalid JSON (Expecting ',' delimiter at column"),
    (b"hello", "invalid JSON (Expecting value at column 1), wanted an object on one line"),
    (b'{"instruction": "a", "output": "\xff"}', "byte 33 is not UTF-8 (convert it), wanted"),
    (b'{"output": "b", "instruction": "a", "output": "c"}', "output occurs twice in the row"),
    (b'{"messages": [{"role": "user", "role": "a"}]}', "role occurs twice in message 1"),
    (b"[" * 100_000, "invalid JSON (maximum recursion depth exceeded"),
    (b"9" * 5_000, "invalid JSON (Exceeds the limit"),
]


@pytest.mark.parametrize("form", ["line", "row"])
def test_each_bad_row_is_named_with_its_place(form, tmp_path):
    bad = [(json.dumps(row).encode(), said) for row, said in BAD_ROWS]
    bad += BAD_LINES if form == "line" else []
    good = (json.dumps(GOOD).encode(), "")
    texts, said = zip(good, *bad, good, strict=True)
    file = tmp_path / "x.json"
    file.write_bytes(b"\n".join(texts) if form == "line" else b"[" + b",\n".join(texts) + b"]")
    found = read_rows([str(file)], str(tmp_path / "cache"))
    assert found["source"][:] == [f"{file} {form} {n}" for n in range(1, len(texts) + 1)]
    for problem, wanted in zip(found["problem"], said, strict=True):
        assert problem.startswith(wanted) and bool(problem) == bool(wanted)
        assert "\n" not in problem
    assert contents(good_rows(found, skip_bad_rows=True)) == conversations([GOOD, GOOD])


def test_bad_rows_of_tables(read, tmp_path):
    (tmp_path / "x.csv").write_text(
        'instruction,output\n"two\nlines",b\n\na,b, and c\nq, \na\na,"b, and c"\n'
    )
    with pytest.raises(UserError) as caught:
        read("x.csv")
    file = f"{tmp_path}/x.csv"
    wanted = "wanted 2 as in the header (fields with commas need quotes)"
    assert f"3 of 5 rows are bad: {file} line 5: found 3 fields, {wanted}; " in str(caught.value)
    assert f"{file} line 6: output is empty, wanted text; " in str(caught.value)
    assert f"{file} line 7: found 1 fields, {wanted}; mend" in str(caught.value)
    assert read("x.csv", skip_bad_rows=True)["source"][:] == [f"{file} line 2", f"{file} line 8"]


def test_the_first_bad_rows_are_named_and_all_counted(read, tmp_path):
    def error(**options: Any) -> str:
        with pytest.raises(UserError) as caught:
            read("x.parquet", **options)
        return str(caught.value)

    table = {"instruction": ["a"] * 2000, "output": ["b"] + [" "] * 1999}
    parquet.write_table(pa.table(table), tmp_path / "x.parquet")
    named = [f"{tmp_path}/x.parquet row {n}: output is empty, wanted text" for n in (2, 3, 4)]
    assert error() == (
        f"1,999 of 2,000 rows are bad: {'; '.join(named)}; and 1,996 more; mend them or skip them "
        "with --skip_bad_rows True"
    )
    parquet.write_table(pa.table(table).slice(1), tmp_path / "x.parquet")
    assert error(skip_bad_rows=True).startswith("1,999 of 1,999 rows are bad: ")
    assert error().endswith("; give rows with instruction and output, or with messages")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.jsonl", b" \n\n", "has no rows"),
        ("x.json", b"[]", "has no rows"),
        ("x.csv", b"", "has no rows"),
        ("x.csv", b"instruction,output\n", "has no rows"),
        ("x.json", b'\n[{"instruction": "a",\n "output": }]', "Expecting value: line 3 column 12"),
        ("x.json", b'["\xff"]', "is not UTF-8 (invalid start byte); convert it"),
        ("x.json", b"[" * 100_000, "cannot be read: maximum recursion depth"),
        ("x.csv", b"instruction,output,output\na,b,c\n", "the column output occurs twice"),
        ("x.csv", b'instruction,output\n"a,b', "cannot be read: unexpected end of data"),
        ("x.parquet", b"no table at all", "cannot be read: Parquet magic bytes not found"),
        ("x.jsonl.gz", b"not compressed", "cannot be read: Not a gzipped file"),
        ("x.jsonl.gz", gzip.compress(b"{}\n" * 9, mtime=0)[:-9], "cannot be read: Compressed file"),
        ("x.txt", b"hello", "is of no known kind; give .json, .jsonl, .csv, .parquet, or"),
    ],
)
def test_a_file_that_cannot_be_read(name, content, said, read, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(name, skip_bad_rows=True)
    assert str(caught.value).startswith(f"{tmp_path / name} ") and said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_paths_that_hold_nothing_and_a_cache_that_cannot_be_written(read, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty has no data files"):
        read("empty")
    for name in ("data/train.jsonl", "no such thing", str(tmp_path / "a" / "b")):
        with pytest.raises(UserError, match=f"^{name} does not exist; give a file"):
            read_rows([name])
    write_jsonl(tmp_path / "x.jsonl", ROWS)
    (tmp_path / "taken").write_text("a file where a folder should be")
    with pytest.raises(UserError, match=r"cannot be written to the cache: .*--cache_dir"):
        read("x.jsonl", cache="taken")


def test_a_name_may_hold_half_a_character(read: Any, tmp_path: Path) -> None:
    """Names of fields and files go into messages, and with the rows into a file of UTF-8."""
    odd = "\udcff"
    (tmp_path / f"{odd}.json").write_text(json.dumps([GOOD | {odd: 1}, {odd: 1}]))
    with pytest.raises(UserError, match=r"\\udcff\.json row 2: found \\udcff; wanted"):
        read(f"{odd}.json")
    assert read(f"{odd}.json", skip_bad_rows=True)["unused"] == [r"\udcff"]
