"""Files to examples, every way a row can be wrong, packing, batches, and equal losses packed."""

import csv
import gzip
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from text_fixtures import BUNDLED, assistant, system, tokenizer_of, user
from torch.nn import functional as F

from deepseek_moe import DeepseekForCausalLM
from deepseek_moe.chat import render
from deepseek_moe.data import (
    PACKED,
    Collator,
    Report,
    fingerprint,
    load_examples,
    pack,
    pack_lengths,
    show,
    split,
)
from deepseek_moe.errors import UserError
from deepseek_moe.tokenization_deepseek import BOS, EOS

datasets.disable_progress_bars()

TOKENIZER = tokenizer_of(BUNDLED)
ROWS = [
    {"instruction": "Say hello.", "input": "", "output": "Hello, you!"},
    {"instruction": "Count,\nplease", "input": '1, 2, "3"', "output": "4\n5"},
    {"instruction": "Führer?", "input": "  ", "output": "你好 🎉"},
    {"instruction": f"type {EOS}", "input": "", "output": f"{BOS}no{EOS}"},
]
GOOD = {"instruction": "a", "output": "b"}


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., tuple[datasets.Dataset, Report]]:
    """`load_examples` of files in `tmp_path`, with a cache of its own."""

    def load(*names: str, max_length: int = 256, **options: Any) -> tuple[Any, Report]:
        options = {"cache_dir": str(tmp_path / "cache")} | options
        paths = [str(tmp_path / name) for name in names]
        return load_examples(paths, TOKENIZER, max_length, **options)

    return load


def lines_of(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_jsonl(file: Path, rows: list[Any]) -> None:
    file.write_text(lines_of(rows), encoding="utf-8")


def write_csv(file: Path, rows: list[dict[str, str]]) -> None:
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


WRITERS: dict[str, Callable[[Path, list[Any]], object]] = {
    "array.json": lambda file, rows: file.write_text(json.dumps(rows, indent=1)),
    "array.jsonl": lambda file, rows: file.write_text("\n " + json.dumps(rows)),
    "lines.json": write_jsonl,
    "lines.jsonl": write_jsonl,
    "blank.jsonl": lambda f, rows: f.write_text("\n" + lines_of(rows).replace("\n", "\r\n\r\n")),
    "marked.jsonl": lambda file, rows: file.write_text(lines_of(rows), encoding="utf-8-sig"),
    "lines.jsonl.xz": lambda f, rows: f.write_bytes(lzma.compress(lines_of(rows).encode())),
    "LINES.JSONL.GZ": lambda f, rows: f.write_bytes(gzip.compress(lines_of(rows).encode())),
    "array.json.xz": lambda f, rows: f.write_bytes(lzma.compress(json.dumps(rows).encode())),
    "table.parquet": lambda f, rows: parquet.write_table(pa.Table.from_pylist(rows), f),
    "table.csv": write_csv,
}


def contents(examples: datasets.Dataset) -> list[tuple[list[int], list[int]]]:
    return list(zip(examples["input_ids"], examples["trained"], strict=True))


def rendered(rows: list[dict[str, str]]) -> list[tuple[list[int], list[int]]]:
    questions = [
        row["instruction"] + ("\n" + row["input"] if row.get("input", "").strip() else "")
        for row in rows
    ]
    return [
        render(TOKENIZER, [user(question), assistant(row["output"])])
        for question, row in zip(questions, rows, strict=True)
    ]


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_what_chat_renders(name: str, load: Any, tmp_path: Path) -> None:
    rows = [row | {"story": "of no account", "id": str(n)} for n, row in enumerate(ROWS)]
    WRITERS[name](tmp_path / name, rows)
    examples, report = load(name)
    assert contents(examples) == rendered(ROWS)
    assert examples.column_names == ["input_ids", "trained", "length", "source"]
    assert examples["length"][:] == [len(ids) for ids in examples["input_ids"]]
    assert report == Report(
        rows=4,
        bad=0,
        dropped=0,
        cut=0,
        kept=4,
        tokens=sum(examples["length"]),
        trained=sum(map(sum, examples["trained"])),
        max_length=256,
    )


def test_a_folder_and_several_paths(load: Any, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "below").mkdir(parents=True)
    write_jsonl(folder / "b.jsonl", ROWS[2:])
    WRITERS["lines.jsonl.xz"](folder / "a.jsonl.xz", ROWS[:2])
    write_jsonl(folder / "below" / "c.jsonl", ROWS)
    (folder / "LICENSE").write_text("not data")
    write_csv(tmp_path / "x.csv", ROWS[:1])
    examples, _ = load("folder", "x.csv")
    assert contents(examples) == rendered([*ROWS, ROWS[0]])
    assert [source.removeprefix(str(tmp_path)) for source in examples["source"]] == [
        "/folder/a.jsonl.xz line 1",
        "/folder/a.jsonl.xz line 2",
        "/folder/b.jsonl line 1",
        "/folder/b.jsonl line 2",
        "/x.csv line 2",
    ]


def test_conversations(load: Any, tmp_path: Path) -> None:
    talks = [
        [user("a"), assistant("b")],
        [system("Hm."), user("a"), assistant("b"), user("c"), assistant("d")],
    ]
    extra = [[message | {"weight": 1} for message in talk] for talk in talks]
    # `messages` wins, and null is absent: a table has all columns in all rows.
    rows = [
        {"messages": extra[0], "instruction": None, "output": None},
        {"messages": extra[1], "instruction": "x", "output": "y"},
        {"messages": None, "instruction": "x", "output": "y"},
    ]
    expected = [render(TOKENIZER, talk) for talk in [*talks, [user("x"), assistant("y")]]]
    write_jsonl(tmp_path / "talks.jsonl", rows)
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "talks.parquet")
    for name in ("talks.jsonl", "talks.parquet"):
        assert contents(load(name)[0]) == expected


def test_a_dataset_of_the_hub(load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def load_dataset(name: str, split: str, cache_dir: str) -> datasets.Dataset:
        asked.append((name, split, cache_dir))
        return datasets.Dataset.from_list([*ROWS, ROWS[0] | {"output": " "}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    cache = str(tmp_path / "cache")
    with pytest.raises(UserError, match="1 of 5 rows are bad: own/data row 5: output is empty"):
        load_examples(["own/data"], TOKENIZER, 256, cache_dir=cache)
    examples, _ = load_examples(["own/data"], TOKENIZER, 256, cache_dir=cache, skip_bad_rows=True)
    assert asked == 2 * [("own/data", "train", cache)]
    assert contents(examples) == rendered(ROWS)
    assert examples["source"][3] == "own/data row 4"


def test_a_dataset_that_the_hub_does_not_give(
    load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def load_dataset(*args: Any, **kwargs: Any) -> None:
        raise ValueError("two\nlines")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"^own/data is no file here and .*: two; check the name"):
        load_examples(["own/data"], TOKENIZER, 256)


def talk(*messages: Any) -> dict[str, Any]:
    return {"messages": list(messages)}


BAD_ROWS: list[tuple[Any, str]] = [
    ({"question": "a", "answer": "b"}, "no instruction: found question, answer, wanted"),
    ({"instruction": "a", "response": "b"}, "no output: found instruction, response, wanted"),
    ({}, "no instruction: found no field, wanted"),
    ({"instruction": "a", "output": None}, "output is null, wanted text"),
    ({"instruction": "a", "output": ""}, "output is empty, wanted an answer"),
    ({"instruction": "a", "output": " \n\t"}, "output is empty, wanted an answer"),
    ({"instruction": "a", "output": 3}, "output is number 3, wanted text"),
    ({"instruction": True, "output": "b"}, "instruction is truth value True, wanted text"),
    ({"instruction": ["a"], "output": "b"}, "instruction is list ['a'], wanted text"),
    ({"instruction": "a", "input": 1.5, "output": "b"}, "input is number 1.5, wanted text"),
    ({"instruction": "a", "output": "b\ud800"}, "output has half a character ('\\ud800'), wanted"),
    (["a", "b"], "found list ['a', 'b'], wanted an object"),
    ("a", "found text 'a', wanted an object"),
    (talk(), "messages is list [], wanted a list of role and content"),
    ({"messages": "hello"}, "messages is text 'hello', wanted a list"),
    ({"messages": {"role": "user"}}, "messages is object {'role': 'user'}, wanted a list"),
    (talk("hello"), "message 1 is text 'hello', wanted role and content"),
    (talk(user("a")), "the last message has role 'user', wanted assistant"),
    (talk(user("a"), {"role": "gpt", "content": "b"}), "message 2 has role 'gpt', wanted user"),
    (talk({"content": "b"}), "message 1 has role None, wanted user, assistant or system"),
    (talk({"role": ["user"], "content": "b"}), "message 1 has role ['user'], wanted"),
    (talk(user("a"), {"role": "assistant"}), "content of message 2 is null, wanted text"),
    (talk(user("a"), assistant(7)), "content of message 2 is number 7, wanted text"),
    (talk(user("a"), assistant(" "), user("c"), assistant("d")), "content of message 2 is empty"),
    (talk(user([{"type": "text"}]), assistant("b")), "content of message 1 is list [{'type"),
]


def escaped(row: Any) -> str:
    return json.dumps(row)  # a lone surrogate only exists as an escape


@pytest.mark.parametrize(("row", "said"), BAD_ROWS)
@pytest.mark.parametrize("form", ["lines", "array"])
def test_a_bad_row_is_named_with_its_place(
    form: str, row: Any, said: str, load: Any, tmp_path: Path
) -> None:
    if form == "lines":
        text, place = f"{escaped(GOOD)}\n\n{escaped(row)}\n{escaped(GOOD)}\n", "line 3"
    else:
        text, place = f"[{escaped(GOOD)},\n{escaped(GOOD)},{escaped(row)}]", "row 3"
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError) as caught:
        load("x.json")
    message = str(caught.value)
    assert message.startswith(f"1 of 3 rows are bad: {tmp_path}/x.json {place}: {said}")
    assert message.endswith("; mend them or skip them with --skip_bad_rows True")
    assert "\n" not in message
    examples, report = load("x.json", skip_bad_rows=True)
    assert contents(examples) == rendered([GOOD, GOOD])
    assert (report.rows, report.bad, report.kept) == (3, 1, 2)
    assert "1 bad rows skipped" in str(report)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"instruction": "a", "output": "b"', "invalid JSON (Expecting ',' delimiter at column"),
        (b"{'instruction': 'a'}", "invalid JSON (Expecting property name enclosed in double"),
        (b"hello", "invalid JSON (Expecting value at column 1), wanted an object on one line"),
        (b'{"instruction": "a", "output": "\xff"}', "byte 33 is not UTF-8, wanted a JSON object"),
        (b"[" * 100_000, "invalid JSON (maximum recursion depth exceeded"),
        (b"9" * 5_000, "invalid JSON (Exceeds the limit"),
    ],
)
def test_a_line_that_is_not_json(line: bytes, said: str, load: Any, tmp_path: Path) -> None:
    good = json.dumps(GOOD).encode()
    (tmp_path / "x.jsonl").write_bytes(b"\n".join([good, line, good]))
    with pytest.raises(UserError) as caught:
        load("x.jsonl")
    assert f"1 of 3 rows are bad: {tmp_path}/x.jsonl line 2: {said}" in str(caught.value)
    assert load("x.jsonl", skip_bad_rows=True)[1].kept == 2


def test_bad_rows_of_tables(load: Any, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(
        'instruction,output\n"two\nlines",b\n\na,b, and c\nq, \na\na,"b, and c"\n'
    )
    with pytest.raises(UserError) as caught:
        load("x.csv")
    file = f"{tmp_path}/x.csv"
    wanted = "wanted 2 as in the header (fields with commas need quotes)"
    assert f"3 of 5 rows are bad: {file} line 5: found 3 fields, {wanted}; " in str(caught.value)
    assert f"{file} line 6: output is empty, wanted an answer; " in str(caught.value)
    assert f"{file} line 7: found 1 fields, {wanted}; mend" in str(caught.value)
    examples, _ = load("x.csv", skip_bad_rows=True)
    assert examples["source"][:] == [f"{file} line 2", f"{file} line 8"]
    table = pa.table({"instruction": ["a"] * 2000, "output": range(2000)})
    parquet.write_table(table, f"{file}.parquet")
    with pytest.raises(UserError, match=r"2,000 of 2,000 .*\.parquet row 1: output is number 0"):
        load("x.csv.parquet")


def test_a_long_field_of_a_table(load: Any, tmp_path: Path) -> None:
    write_csv(tmp_path / "x.csv", [GOOD | {"output": "word " * 40_000}])
    assert load("x.csv")[1].cut == 1  # not refused: csv's own limit is 131,072 characters


def test_the_first_bad_rows_are_named_and_all_counted(load: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "x.jsonl", [GOOD, *[{"n": n} for n in range(1200)]])
    with pytest.raises(UserError) as caught:
        load("x.jsonl")
    message = str(caught.value)
    assert message.startswith("1,200 of 1,201 rows are bad: ")
    assert [f"line {n}:" in message for n in (1, 2, 3, 4, 5)] == [False, True, True, True, False]
    assert "; and 1,197 more; " in message


def test_rows_that_are_all_bad_cannot_be_skipped(load: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "x.jsonl", [{"question": "a", "answer": "b"}] * 2)
    with pytest.raises(
        UserError, match=r"^2 of 2 rows are bad: .*found question, answer"
    ) as caught:
        load("x.jsonl", skip_bad_rows=True)
    assert "--skip_bad_rows" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.jsonl", b"", "has no rows"),
        ("x.jsonl", b" \n\n", "has no rows"),
        ("x.json", b"[]", "has no rows"),
        ("x.csv", b"", "has no rows"),
        ("x.csv", b"instruction,output\n", "has no rows"),
        ("x.json", b'\n[{"instruction": "a",\n "output": }]', "Expecting value: line 3 column 12"),
        ("x.json", b"[1]\n[2]", "Extra data: line 2 column 1"),
        ("x.json", b'["\xff"]', "is not UTF-8 (invalid start byte); convert it"),
        ("x.json", b"[" * 100_000, "cannot be read: maximum recursion depth"),
        ("x.csv", "instruction,output\nü,b".encode("latin-1"), "is not UTF-8"),
        ("x.csv", b'instruction,output\n"a,b', "cannot be read: unexpected end of data"),
        ("x.parquet", b"no table at all", "cannot be read: Parquet magic bytes not found"),
        ("x.jsonl.xz", b"not compressed", "cannot be read: Input format not supported"),
        ("x.jsonl.gz", b"not compressed", "cannot be read: Not a gzipped file"),
        ("x.jsonl.xz", lzma.compress(b"{}\n" * 999)[:-20], "cannot be read: Compressed file ended"),
        ("x.jsonl.gz", gzip.compress(b"{}\n" * 999)[:-9], "cannot be read: Compressed file ended"),
        ("x.txt", b"hello", "is of no known kind; give .json, .jsonl, .csv, .parquet, or"),
        ("x", b"hello", "is of no known kind"),
    ],
)
def test_a_file_that_cannot_be_read(
    name: str, content: bytes, said: str, load: Any, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        load(name, skip_bad_rows=True)
    assert str(caught.value).startswith(f"{tmp_path / name} ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_paths_that_hold_nothing(load: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty has no data files"):
        load("empty")
    for name in ("data/train.jsonl", "no such thing", str(tmp_path / "a" / "b")):
        with pytest.raises(UserError, match=f"^{name} does not exist; give a file"):
            load_examples([name], TOKENIZER, 256)


def test_a_cache_that_cannot_be_written(load: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "x.jsonl", ROWS)
    (tmp_path / "taken").write_text("a file where a folder should be")
    with pytest.raises(UserError, match=r"cannot be written to the cache: .*--cache_dir"):
        load("x.jsonl", cache_dir=str(tmp_path / "taken"))


def test_cut_and_dropped_rows_are_counted(load: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "x.jsonl", ROWS)
    whole = rendered(ROWS)
    prompts = [mask.index(1) for _, mask in whole]
    for max_length in range(min(prompts) + 1, max(len(ids) for ids, _ in whole) + 1):
        examples, report = load("x.jsonl", max_length=max_length)
        kept = [n for n in range(4) if prompts[n] < max_length]
        assert contents(examples) == [
            (whole[n][0][:max_length], whole[n][1][:max_length]) for n in kept
        ]
        assert report.cut == sum(len(whole[n][0]) > max_length for n in kept)
        assert report.dropped == 4 - len(kept)
        assert report.kept == len(kept)
        assert report.tokens == sum(examples["length"])
        assert report.trained == sum(map(sum, examples["trained"]))
        assert (f"; {report.cut} cut to {max_length} tokens" in str(report)) == bool(report.cut)
    for max_length in (1, min(prompts)):
        with pytest.raises(UserError, match=f"model_max_length {max_length}: .*raise"):
            load("x.jsonl", max_length=max_length)
    with pytest.raises(UserError, match="model_max_length is 0"):
        load("x.jsonl", max_length=0)


def test_a_report_reads_well() -> None:
    counts = {"rows": 9000, "bad": 1, "dropped": 12, "cut": 30, "kept": 8987}
    report = Report(**counts, tokens=123456, trained=7890, max_length=1024)
    assert str(report) == (
        "8,987 of 9,000 rows, 7,890 of 123,456 tokens trained on; 1 bad rows skipped; "
        "30 cut to 1,024 tokens, so without EOS; 12 dropped (no answer within 1,024 tokens)"
    )


def test_a_second_start_reads_the_cache_and_a_changed_file_does_not(
    load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "x.jsonl", ROWS * 5)

    def start() -> tuple[list[str], str]:
        train, rest = split(load("x.jsonl")[0], 0.2, seed=1)
        packed = pack(train, 256)
        files = [one["filename"] for part in (train, rest, packed) for one in part.cache_files]
        return files, fingerprint(packed)

    first = start()
    assert first[0]
    with monkeypatch.context() as patch:
        patch.setattr("deepseek_moe.data._rows_of", None)
        patch.setattr("deepseek_moe.data.chat.render", None)
        patch.setattr("deepseek_moe.data._join", lambda *args: None)
        assert start() == first
    write_jsonl(tmp_path / "x.jsonl", ROWS * 6)
    assert load("x.jsonl")[1].rows == 24


def test_processes_do_not_change_the_examples(load: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "x.jsonl", ROWS * 3)
    assert contents(load("x.jsonl", num_proc=2)[0]) == rendered(ROWS * 3)


def test_split(load: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "x.jsonl", ROWS * 5)
    examples, _ = load("x.jsonl")
    train, evaluation = split(examples, 0.1, seed=3)
    assert (len(train), len(evaluation)) == (18, 2)
    assert sorted([*train["source"], *evaluation["source"]]) == sorted(examples["source"])
    assert split(examples, 0.1, seed=3)[1]["source"][:] == evaluation["source"][:]
    assert any(
        split(examples, 0.1, seed)[1]["source"][:] != evaluation["source"][:] for seed in range(3)
    )
    assert len(split(examples, 0.001, seed=0)[1]) == 1
    for fraction in (0, 1, 1.5, -0.1, float("nan")):
        with pytest.raises(UserError, match=r"eval_fraction is .*; it must be above 0"):
            split(examples, fraction, seed=0)
    with pytest.raises(UserError, match=r"eval_fraction 0.5 of 1 examples leaves none to train"):
        split(examples.select([0]), 0.5, seed=0)


def test_a_fingerprint_is_the_same_on_every_machine() -> None:
    rows = [{"input_ids": [0, 5, 1], "trained": [0, 1, 1]}, {"input_ids": [7], "trained": [1]}]
    assert fingerprint(datasets.Dataset.from_list(rows)) == "ad2a151578e82b7b"


def test_fingerprint_is_of_contents_alone(load: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "x.jsonl", ROWS)
    examples, _ = load("x.jsonl")
    print_ = fingerprint(examples)
    WRITERS["table.parquet"](tmp_path / "y.parquet", ROWS)
    assert fingerprint(load("y.parquet", cache_dir=str(tmp_path / "other"))[0]) == print_
    rows = examples.to_list()
    assert fingerprint(datasets.Dataset.from_list(rows, examples.features)) == print_
    assert fingerprint(examples.select([1, 0, 2, 3])) != print_
    assert fingerprint(examples.select(range(3))) != print_
    for column in ("input_ids", "trained"):
        changed = json.loads(json.dumps(rows))
        changed[3][column][-2] ^= 1
        assert fingerprint(datasets.Dataset.from_list(changed, examples.features)) != print_
    moved = json.loads(json.dumps(rows))  # the same ids and masks on end, divided otherwise
    for column in ("input_ids", "trained"):
        moved[2][column].append(moved[3][column].pop(0))
    assert fingerprint(datasets.Dataset.from_list(moved, examples.features)) != print_


@pytest.mark.parametrize("seed", range(20))
def test_packing_loses_splits_and_overfills_nothing(seed: int) -> None:
    dice = random.Random(seed)
    limit = dice.choice([1, 7, 64, 1024])
    lengths = [dice.randint(1, limit) for _ in range(dice.choice([1, 2, 50, 2000]))]
    rows = pack_lengths(lengths, limit)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    filled = [sum(lengths[index] for index in row) for row in rows]
    assert max(filled) <= limit
    assert rows == pack_lengths(list(lengths), limit)
    # No two rows would fit into one, so at most twice the rows of any packing are used.
    assert len(rows) == 1 or sum(sorted(filled)[:2]) > limit


def test_packing_is_tight_and_fast() -> None:
    dice = random.Random(0)
    lengths = [dice.randint(20, 1024) for _ in range(100_000)]
    rows = pack_lengths(lengths, 1024)
    assert len(rows) < 1.02 * sum(lengths) / 1024
    assert pack_lengths([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]


def test_packed_rows_hold_their_examples_whole(load: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "x.jsonl", ROWS * 5)
    examples, _ = load("x.jsonl", max_length=64)
    for dataset in (examples, examples.select(range(19, 2, -2)), split(examples, 0.3, 0)[0]):
        packed = pack(dataset, 64)
        assert packed.features == PACKED
        found = []
        for row in packed:
            assert row["length"] == sum(row["lengths"]) == len(row["input_ids"]) <= 64
            starts = np.cumsum([0, *row["lengths"]])
            for source, start, end in zip(row["sources"], starts, starts[1:], strict=False):
                found.append((source, row["input_ids"][start:end], row["trained"][start:end]))
        expected = [(row["source"], row["input_ids"], row["trained"]) for row in dataset]
        assert sorted(found) == sorted(expected)
        assert len(packed) < len(dataset)


def make(lengths: list[int], seed: int = 0, vocab: int = 96) -> list[dict[str, Any]]:
    """Examples of random ids, with the pad id 1 (the EOS) among them and at their end."""
    dice = random.Random(seed)
    return [
        {
            "input_ids": [0, *dice.choices(range(1, vocab), k=length - 2), 1],
            "trained": [0, *dice.choices([0, 1], k=length - 2), 1],
            "length": length,
            "source": f"x line {number}",
        }
        for number, length in enumerate(lengths, 1)
    ]


def packed_rows(examples: list[dict[str, Any]], max_length: int) -> list[dict[str, Any]]:
    return pack(datasets.Dataset.from_list(examples), max_length).to_list()


def test_a_padded_batch() -> None:
    examples = [
        {"input_ids": [0, 5, 1, 6, 1], "trained": [0, 0, 1, 1, 1], "length": 5, "source": "x 1"},
        {"input_ids": [0, 7, 1], "trained": [0, 1, 1], "length": 3, "source": "x 2"},
    ]
    batch = Collator(pad_token_id=1, packing=False)(examples)
    assert batch.pop("sources") == ["x 1", "x 2"]
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[0, 5, 1, 6, 1], [0, 7, 1, 1, 1]],
        "labels": [[-100, -100, 1, 6, 1], [-100, 7, 1, -100, -100]],  # EOS is pad, and trained on
        "sequence_ids": [[0] * 5, [1, 1, 1, -1, -1]],
    }
    assert {value.dtype for value in batch.values()} == {torch.int64}
    wide = Collator(pad_token_id=1, packing=False, pad_to_multiple_of=4)(examples)
    assert wide["input_ids"].shape == wide["labels"].shape == wide["sequence_ids"].shape == (2, 8)
    assert (wide["labels"][:, 5:] == -100).all()


def test_a_packed_batch() -> None:
    rows = [
        {
            "input_ids": [0, 5, 1, 0, 6, 1],
            "trained": [0, 1, 1, 0, 0, 1],
            "lengths": [3, 3],
            "length": 6,
            "sources": ["x 1", "x 2"],
        },
        {
            "input_ids": [0, 7, 8, 1],
            "trained": [0, 0, 1, 1],
            "lengths": [4],
            "length": 4,
            "sources": ["x 3"],
        },
    ]
    batch = Collator(pad_token_id=1, packing=True)(rows)
    bounds = [batch.pop(f"cu_seq_lens_{x}") for x in "qk"]
    assert [bound.tolist() for bound in bounds] == [[0, 3, 6, 10, 12]] * 2
    assert {bound.dtype for bound in bounds} == {torch.int32}
    assert [batch.pop(f"max_length_{x}") for x in "qk"] == [4, 4]
    assert batch.pop("sources") == ["x 1", "x 2", "x 3"]
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[0, 5, 1, 0, 6, 1], [0, 7, 8, 1, 1, 1]],
        "labels": [[-100, 5, 1, -100, -100, 1], [-100, -100, 8, 1, -100, -100]],
        "sequence_ids": [[0, 0, 0, 1, 1, 1], [2, 2, 2, 2, -1, -1]],
        "position_ids": [[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 0, 1]],
    }
    assert {value.dtype for value in batch.values()} == {torch.int64}
    wide = Collator(pad_token_id=1, packing=True, pad_to_multiple_of=8)(rows)
    assert wide["cu_seq_lens_q"].tolist() == [0, 3, 6, 8, 12, 16]


def test_batches_of_real_examples_train_on_every_eos(load: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "x.jsonl", ROWS * 3)
    examples, report = load("x.jsonl")
    assert TOKENIZER.pad_token_id == TOKENIZER.eos_token_id
    for packing, rows in ((False, examples), (True, pack(examples, 128))):
        batch = Collator(TOKENIZER.pad_token_id, packing)(rows.to_list())
        assert (batch["labels"] == TOKENIZER.eos_token_id).sum() == 12
        assert (batch["labels"] >= 0).sum() == report.trained
        assert (batch["sequence_ids"] >= 0).sum() == report.tokens
        assert len(batch["sources"]) == batch["sequence_ids"].max() + 1 == 12


def test_a_label_across_a_border_is_refused() -> None:
    for row in packed_rows(make([4, 4]), 8):
        row["trained"][4] = 1
        with pytest.raises(AssertionError):
            Collator(1, packing=True)([row])


def losses(model: DeepseekForCausalLM, batch: dict[str, Any]) -> dict[str, float]:
    """The mean loss of each example, from the logits."""
    given = {key: batch[key] for key in ("input_ids", "position_ids") if key in batch}
    with torch.no_grad():
        logits_BLV = model(**given, use_cache=False).logits
    labels_BL = batch["labels"][:, 1:]
    loss_BL = F.cross_entropy(logits_BLV[:, :-1].transpose(1, 2), labels_BL, reduction="none")
    counted_BL = labels_BL != -100
    owner_BL = batch["sequence_ids"][:, 1:]
    return {
        source: loss_BL[counted_BL & (owner_BL == number)].mean().item()
        for number, source in enumerate(batch["sources"])
    }


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_losses_are_equal_alone_padded_and_packed(
    attention: str, tiny_model: Callable[..., DeepseekForCausalLM]
) -> None:
    model = tiny_model()
    model.set_attn_implementation(attention)
    dice = random.Random(1)
    examples = make([dice.randint(2, 40) for _ in range(24)])
    alone: dict[str, float] = {}
    for example in examples:
        alone |= losses(model, Collator(1, packing=False)([example]))
    assert len({round(loss, 3) for loss in alone.values()}) > 20
    assert losses(model, Collator(1, packing=False)(examples)) == pytest.approx(alone, abs=1e-5)
    rows = packed_rows(examples, 64)
    assert any(len(row["lengths"]) > 2 for row in rows)
    for multiple in (None, 64):  # 64: every row has a tail unless it is full
        batch = Collator(1, True, pad_to_multiple_of=multiple)(rows)
        assert losses(model, batch) == pytest.approx(alone, abs=1e-5)
    # So that the equality above means something: without positions examples see each other.
    del batch["position_ids"]
    assert losses(model, batch) != pytest.approx(alone, abs=1e-2)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_of_a_padded_batch_equal_those_of_each_example(
    attention: str, tiny_model: Callable[..., DeepseekForCausalLM]
) -> None:
    model = tiny_model()
    model.set_attn_implementation(attention)
    examples = make([3, 17, 9, 30])
    with torch.no_grad():
        together = model(Collator(1, False, 8)(examples)["input_ids"]).logits
        for row, example in zip(together, examples, strict=True):
            alone = model(torch.tensor([example["input_ids"]])).logits[0]
            torch.testing.assert_close(row[: example["length"]], alone, atol=1e-5, rtol=0)


def test_show_marks_what_is_trained_on() -> None:
    messages = [user("Wie?"), assistant("So 🎉"), user("Und?"), assistant("Nein.")]
    ids, trained = render(TOKENIZER, messages)
    assert show(TOKENIZER, ids, trained, colour=False) == (
        f"{BOS}User: Wie?\n\nAssistant:⟦ So 🎉{EOS}⟧User: Und?\n\nAssistant:⟦ Nein.{EOS}⟧"
    )
    green, red, off = "\033[32m", "\033[31m", "\033[0m"
    assert show(TOKENIZER, ids, trained, colour=True) == (
        f"{red}{BOS}User: Wie?\n\nAssistant:{off}{green} So 🎉{EOS}{off}"
        f"{red}User: Und?\n\nAssistant:{off}{green} Nein.{EOS}{off}"
    )


DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.mark.skipif(not DATA.is_dir(), reason="the real data is not in ../shared/data")
def test_real_data(tmp_path: Path) -> None:
    cache = str(tmp_path)
    paths = [str(DATA / "fairytaleqa" / "val.jsonl.xz"), str(DATA / "self_instruct")]
    examples, report = load_examples(paths, TOKENIZER, 1024, cache_dir=cache)
    assert report.rows == 1025 + 427
    assert report.bad == 0
    assert report.kept == len(examples) > 1400
    with pytest.raises(UserError, match=r"1,319 of 1,319 rows are bad: .*found question, answer"):
        load_examples([str(DATA / "gsm8k" / "test.jsonl")], TOKENIZER, 1024, cache_dir=cache)
