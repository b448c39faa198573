"""Rows to examples, packing, batches, and equal losses alone, padded and packed."""

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from row_fixtures import ROWS, conversations, write_jsonl
from text_fixtures import BUNDLED, assistant, tokenizer_of, user
from torch.nn import functional as F

from deepseek_moe import DeepseekForCausalLM
from deepseek_moe.chat import render
from deepseek_moe.errors import UserError
from deepseek_moe.model.tokenization_deepseek import BOS, EOS
from deepseek_moe.training.examples import (
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
from deepseek_moe.training.rows import FORMAT_VERSION

datasets.disable_progress_bars()

TOKENIZER = tokenizer_of(BUNDLED)


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., tuple[datasets.Dataset, Report]]:
    """`load_examples` of files in `tmp_path`, with a cache of its own."""

    def load(*names: str, max_length: int = 256, **options: Any) -> tuple[Any, Report]:
        options = {"cache_dir": str(tmp_path / "cache")} | options
        paths = [str(tmp_path / name) for name in names]
        return load_examples(paths, TOKENIZER, max_length, **options)

    return load


def contents(examples: datasets.Dataset) -> list[tuple[list[int], list[int]]]:
    return list(zip(examples["input_ids"], examples["trained"], strict=True))


def rendered(rows: list[dict[str, str]]) -> list[tuple[list[int], list[int]]]:
    return [render(TOKENIZER, conversation) for conversation in conversations(rows)]


def test_examples_are_what_chat_renders(load: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "x.jsonl", ROWS)
    examples, report = load("x.jsonl")
    assert contents(examples) == rendered(ROWS)
    assert examples.column_names == ["input_ids", "trained", "length", "source"]
    assert examples["length"][:] == [len(ids) for ids in examples["input_ids"]]
    assert examples["source"][3] == f"{tmp_path}/x.jsonl line 4"
    assert (report.rows, report.kept, report.bad, report.dropped, report.cut) == (4, 4, 0, 0, 0)


def test_bad_rows_stop_or_are_counted(load: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "x.jsonl", [*ROWS[:2], {"question": "a"}, *ROWS[2:]])
    with pytest.raises(UserError, match=r"^1 of 5 rows are bad: .*x\.jsonl line 3: no instruction"):
        load("x.jsonl")
    examples, report = load("x.jsonl", skip_bad_rows=True)
    assert contents(examples) == rendered(ROWS)
    assert (report.rows, report.bad, report.kept) == (5, 1, 4)
    assert "1 bad rows skipped" in str(report)


def test_cut_and_dropped_rows_are_counted(load: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "x.jsonl", ROWS)
    whole = rendered(ROWS)
    prompts, lengths = [mask.index(1) for _, mask in whole], [len(ids) for ids, _ in whole]
    borders = {length + more for length in (*prompts, *lengths) for more in (0, 1)}
    for max_length in sorted(borders - set(range(min(prompts) + 1))):
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
        patch.setattr("deepseek_moe.training.rows._rows_of", None)
        patch.setattr("deepseek_moe.training.examples.chat.render", None)
        patch.setattr("deepseek_moe.training.examples._join", lambda *args: None)
        assert start() == first
    write_jsonl(tmp_path / "x.jsonl", ROWS * 6)
    assert load("x.jsonl")[1].rows == 24


def test_examples_of_another_format_or_tokenizer_are_not_read(
    load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "x.jsonl", ROWS)
    files = load("x.jsonl")[0].cache_files
    assert load("x.jsonl")[0].cache_files == files
    other = copy.deepcopy(TOKENIZER)
    other.eos_token = TOKENIZER.convert_ids_to_tokens(7)
    paths, cache = [str(tmp_path / "x.jsonl")], str(tmp_path / "cache")
    assert load_examples(paths, other, 256, cache_dir=cache)[0].cache_files != files
    monkeypatch.setattr("deepseek_moe.training.examples.FORMAT_VERSION", 0)
    assert load("x.jsonl")[0].cache_files != files


def test_the_format_is_that_of_its_version(load: Any, tmp_path: Path) -> None:
    """If this fails, the same files become other examples or packed rows than before.

    Raise FORMAT_VERSION then, so that old caches are not read, and write the new hashes here.
    """
    write_jsonl(tmp_path / "x.jsonl", ROWS * 5)
    examples, _ = load("x.jsonl")
    made = fingerprint(examples), fingerprint(pack(examples, 256))
    assert (FORMAT_VERSION, *made) == (1, "25def8c105c28b5f", "750357ae4a0cebaf")


def test_processes_do_not_change_the_examples(
    load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "x.jsonl", ROWS * 3)
    monkeypatch.setattr("deepseek_moe.training.examples.ROWS_PER_PROCESS", 6)
    assert contents(load("x.jsonl")[0]) == rendered(ROWS * 3)


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


def test_fingerprint_is_of_contents_alone(load: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "x.jsonl", ROWS)
    examples, _ = load("x.jsonl")
    print_ = fingerprint(examples)
    (tmp_path / "y.json").write_text(json.dumps(ROWS))
    assert fingerprint(load("y.json", cache_dir=str(tmp_path / "other"))[0]) == print_
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
    batch = Collator(1, packing=True)(rows)
    assert (batch["sequence_ids"] < 0).any()  # some rows have a tail of padding
    assert losses(model, batch) == pytest.approx(alone, abs=1e-5)
    # The equality can fail: without positions, examples see each other.
    del batch["position_ids"]
    assert losses(model, batch) != pytest.approx(alone, abs=1e-2)


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


DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


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
