"""Rows to examples, packed rows and batches; what is cut, counted, cached and shown."""

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from row_fixtures import ROWS, conversations, lines_of, write_jsonl
from text_fixtures import BUNDLED, assistant, tokenizer_of, user

from deepseek_moe.chat import render
from deepseek_moe.errors import UserError
from deepseek_moe.model.tokenization_deepseek import BOS, EOS
from deepseek_moe.training.examples import Collator, fingerprint, load_examples, show, split
from deepseek_moe.training.packed_rows import PACKED, pack, pack_lengths
from deepseek_moe.training.rows import FORMAT_VERSION

datasets.disable_progress_bars()

TOKENIZER = tokenizer_of(BUNDLED)
Load = Callable[..., tuple[datasets.Dataset, str]]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Writes rows to a file, and loads its examples with a cache of their own."""

    def load(
        rows: list[Any], max_length: int = 256, tokenizer: Any = TOKENIZER, **options: Any
    ) -> tuple[datasets.Dataset, str]:
        file, cache = tmp_path / "x.jsonl", tmp_path / "cache"
        if not file.exists() or file.read_text(encoding="utf-8") != lines_of(rows):
            write_jsonl(file, rows)  # with a new date, so that it is read anew
        return load_examples([str(file)], tokenizer, max_length, cache_dir=str(cache), **options)

    return load


def contents(examples: datasets.Dataset) -> list[tuple[list[int], list[int]]]:
    return list(zip(examples["input_ids"], examples["trained"], strict=True))


def rendered(rows: list[dict[str, str]]) -> list[tuple[list[int], list[int]]]:
    return [render(TOKENIZER, conversation) for conversation in conversations(rows)]


def test_examples_are_what_chat_renders(load, monkeypatch, tmp_path):
    monkeypatch.setattr("deepseek_moe.training.examples.ROWS_PER_PROCESS", 2)  # so of several
    rows = [*ROWS[:2], {"question": "a"}, *ROWS[2:]]
    with pytest.raises(UserError, match=r"^1 of 5 rows are bad: .*x\.jsonl line 3: no answer"):
        load(rows)
    examples, report = load(rows, skip_bad_rows=True)
    assert contents(examples) == rendered(ROWS)
    assert examples.column_names == ["input_ids", "trained", "length", "source"]
    assert examples["length"][:] == [len(ids) for ids in examples["input_ids"]]
    assert examples["source"][3] == f"{tmp_path}/x.jsonl line 5"
    assert report.startswith("4 of 5 rows, ") and report.endswith("; 1 bad rows skipped")


def test_a_system_text_is_written_by_the_template_or_refused(load):
    row = {"instruction": "Who?", "output": "The king.", "system": "Be brief."}
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message.role == 'system' %}{{ message.content + '|' }}"
        "{% else %}{{ '<' + message.content + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<' }}{% endif %}"
    )
    (ids,) = load([row], tokenizer=tokenizer)[0]["input_ids"]
    assert tokenizer.decode(ids) == f"Be brief.|<Who?{EOS}<The king.{EOS}"
    tokenizer.chat_template = tokenizer.chat_template.replace("message.content + '|'", "''")
    with pytest.raises(UserError, match=r"x\.jsonl line 1: .* leaves out message 1, .* 'system'"):
        load([row], tokenizer=tokenizer)


def test_cut_and_dropped_rows_are_counted(load):
    whole = rendered(ROWS)
    prompts, lengths = [mask.index(1) for _, mask in whole], [len(ids) for ids, _ in whole]
    borders = {length + more for length in (*prompts, *lengths) for more in (0, 1)}
    for max_length in borders - set(range(min(prompts) + 1)):
        examples, report = load(ROWS, max_length)
        kept = [whole[n] for n in range(4) if prompts[n] < max_length]
        assert contents(examples) == [(ids[:max_length], mask[:max_length]) for ids, mask in kept]
        trained = f"{sum(map(sum, examples['trained']))} of {sum(examples['length'])} tokens"
        said = [f"{len(kept)} of 4 rows, {trained} trained on"]
        if cut := sum(len(ids) > max_length for ids, _ in kept):
            said.append(f"{cut} cut to {max_length} tokens, so without EOS")
        if len(kept) < 4:
            said.append(f"{4 - len(kept)} dropped (no answer within {max_length} tokens)")
        assert report == "; ".join(said)
    for max_length in (1, min(prompts)):
        with pytest.raises(UserError, match=f"model_max_length {max_length}: .*raise"):
            load(ROWS, max_length)


def test_the_cache_is_read_unless_file_tokenizer_or_format_changed(load, monkeypatch):
    def start() -> tuple[list[str], str]:
        train, rest = split(load(ROWS * 5)[0], 0.2, seed=1)
        packed = pack(train, 256)
        files = [one["filename"] for part in (train, rest, packed) for one in part.cache_files]
        return files, fingerprint(packed)

    first = start()
    assert first[0]
    with monkeypatch.context() as patch:
        patch.setattr("deepseek_moe.training.rows._rows_of", None)
        patch.setattr("deepseek_moe.training.examples.chat.render", None)
        patch.setattr("deepseek_moe.training.packed_rows._join", lambda *args: None)
        assert start() == first
    files = load(ROWS * 5)[0].cache_files
    other = copy.deepcopy(TOKENIZER)
    other.eos_token = TOKENIZER.convert_ids_to_tokens(7)
    assert load(ROWS * 5, tokenizer=other)[0].cache_files != files
    with monkeypatch.context() as patch:
        patch.setattr("deepseek_moe.training.examples.FORMAT_VERSION", 0)
        assert load(ROWS * 5)[0].cache_files != files
    assert len(load(ROWS * 6)[0]) == 24


def test_the_format_is_that_of_its_version(load):
    """If this fails, the same files become other examples or packed rows than before.

    Raise FORMAT_VERSION then, so that old caches are not read, and write the new hashes here.
    """
    examples, _ = load(ROWS * 5)
    made = fingerprint(examples), fingerprint(pack(examples, 256))
    assert (FORMAT_VERSION, *made) == (3, "25def8c105c28b5f", "750357ae4a0cebaf")


def test_split(load):
    examples, _ = load(ROWS * 5)
    train, evaluation = split(examples, 0.1, seed=3)
    assert (len(train), len(evaluation)) == (18, 2)
    assert sorted([*train["source"], *evaluation["source"]]) == sorted(examples["source"])
    held_out = [split(examples, 0.1, seed)[1]["source"][:] for seed in (3, 0, 1, 2)]
    assert held_out[0] == evaluation["source"][:] and any(x != held_out[0] for x in held_out)
    assert len(split(examples, 0.001, seed=0)[1]) == 1
    with pytest.raises(UserError, match=r"eval_fraction 0.5 of 1 examples leaves none to train"):
        split(examples.select([0]), 0.5, seed=0)


def test_fingerprint_is_of_contents_alone(load):
    examples, _ = load(ROWS)
    rows = examples.to_list()

    def print_of(rows: list[dict[str, Any]]) -> str:
        return fingerprint(datasets.Dataset.from_list(rows, examples.features))

    assert print_of(rows) == fingerprint(examples)
    other_id, other_mask, divided = (copy.deepcopy(rows) for _ in range(3))
    other_id[3]["input_ids"][-2] ^= 1
    other_mask[3]["trained"][-2] ^= 1
    for column in ("input_ids", "trained"):  # the same ids and masks on end, divided otherwise
        divided[2][column].append(divided[3][column].pop(0))
    swapped = [rows[1], rows[0], *rows[2:]]
    others = [rows[:3], swapped, other_id, other_mask, divided]
    assert len({print_of(one) for one in [rows, *others]}) == 6


@pytest.mark.parametrize("limit", [1, 7, 64, 1024])
@pytest.mark.parametrize("count", [1, 2, 50, 100_000])
def test_packing_is_tight_and_fast_and_loses_and_splits_nothing(limit, count):
    dice = random.Random(limit)
    lengths = [dice.randint(1, limit) for _ in range(count)]
    rows = pack_lengths(lengths, limit)
    assert sorted(index for row in rows for index in row) == list(range(count))
    filled = sorted(sum(lengths[index] for index in row) for row in rows)
    assert filled[-1] <= limit
    # No two rows would fit into one, so at most twice the rows of any packing are used.
    assert len(rows) == 1 or sum(filled[:2]) > limit
    assert count < 100 or len(rows) < 1.02 * sum(lengths) / limit


def test_packed_rows_hold_their_examples_whole(load):
    examples, _ = load(ROWS * 5, max_length=64)
    dataset = examples.select(range(19, 2, -2))
    packed = pack(dataset, 64)
    assert packed.features == PACKED and len(packed) < len(dataset)
    found = []
    for row in packed:
        assert row["length"] == sum(row["lengths"]) == len(row["input_ids"]) <= 64
        starts = np.cumsum([0, *row["lengths"]])
        for source, start, end in zip(row["sources"], starts, starts[1:], strict=False):
            found.append((source, row["input_ids"][start:end], row["trained"][start:end]))
    expected = [(row["source"], row["input_ids"], row["trained"]) for row in dataset]
    assert sorted(found) == sorted(expected)


def example(ids: list[int], trained: list[int], source: str) -> dict[str, Any]:
    return {"input_ids": ids, "trained": trained, "length": len(ids), "source": source}


def test_padded_and_packed_batches():
    """test_trainer.py compares their losses and gradients."""
    examples = [
        example([0, 7, 8, 1], [0, 0, 1, 1], "x 1"),
        example([0, 5, 1], [0, 1, 1], "x 2"),
        example([0, 6, 1], [0, 0, 1], "x 3"),
    ]
    padded = Collator(pad_token_id=1, packing=False)(examples)
    assert padded.keys() == {"input_ids", "labels", "sequence_ids", "sources", "num_tokens"}
    assert padded["labels"].tolist()[0:2] == [[-100, -100, 8, 1], [-100, 5, 1, -100]]
    assert padded["sequence_ids"].tolist() == [[0] * 4, [1, 1, 1, -1], [2, 2, 2, -1]]
    rows = pack(datasets.Dataset.from_list(examples), 6).to_list()
    batch = Collator(pad_token_id=1, packing=True)(rows)
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    lists = {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    assert lists == {
        "input_ids": [[0, 7, 8, 1, 1, 1], [0, 5, 1, 0, 6, 1]],
        # EOS is the pad token too, and trained on
        "labels": [[-100, -100, 8, 1, -100, -100], [-100, 5, 1, -100, -100, 1]],
        "sequence_ids": [[0, 0, 0, 0, -1, -1], [1, 1, 1, 2, 2, 2]],
        "position_ids": [[0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 1, 2]],
        "sources": ["x 1", "x 2", "x 3"],
        "num_tokens": 10,
        "cu_seq_lens_q": [0, 4, 6, 9, 12],
        "cu_seq_lens_k": [0, 4, 6, 9, 12],
        "max_length_q": 4,
        "max_length_k": 4,
    }
    flat = Collator(pad_token_id=1, packing=False)(examples, flat=12)
    assert flat["input_ids"].tolist() == [[0, 7, 8, 1, 0, 5, 1, 0, 6, 1, 1, 1]]
    assert flat["cu_seq_lens_q"].tolist() == [0, 4, 7, 10, 12] and flat["num_tokens"] == 10
    again = Collator(pad_token_id=1, packing=True)(rows, flat=12)
    for name, value in flat.items():
        assert torch.equal(again[name], value) if isinstance(value, torch.Tensor) else value
    equal = [examples[1], examples[2]]
    assert len({one["length"] for one in equal}) == 1
    for most, shape in ((5, (2, 3)), (6, (1, 12))):  # 6 tokens in all
        made = Collator(pad_token_id=1, packing=False)(equal, flat=12, most_equal=most)
        assert made["input_ids"].shape == shape and ("cu_seq_lens_q" in made) == (most == 6)
    assert "cu_seq_lens_q" in Collator(1, packing=False)(examples, flat=12, most_equal=0)
    rows[1]["trained"][3] = 1  # a label across the border of two examples
    with pytest.raises(AssertionError):
        Collator(1, packing=True)(rows)


def test_show_marks_what_is_trained_on():
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
