"""What holds for whatever people bring: rows, conversations, lengths, logits, prompts, options.

.ci/run draws the same cases each time. FAULT_TIMES=50 draws fifty times as many, and other ones.
"""

import json
import math
from contextlib import redirect_stderr
from io import BytesIO, StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fault_fixtures import TIMES
from finetune_options import OPTIONS, parse_options
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from text_fixtures import BUNDLED, assistant, system, tokenizer_of, user

from deepseek_moe.chat import render
from deepseek_moe.decode.prompts import read_prompts
from deepseek_moe.decode.sampling import Sampling
from deepseek_moe.decode.texts import TextStream, render_within
from deepseek_moe.errors import UserError
from deepseek_moe.model.tokenization_deepseek import BOS, EOS
from deepseek_moe.training.conversations import FIELDS, KEYS, BadRow, find_conversation
from deepseek_moe.training.examples import IGNORED, Collator
from deepseek_moe.training.packed_rows import pack_lengths
from deepseek_moe.training.rows import READERS

pytestmark = pytest.mark.slow
CASES = 2_300
"""Of each property below."""
TOKENIZER = tokenizer_of(BUNDLED)
many = settings(
    max_examples=CASES * TIMES,
    derandomize=TIMES == 1,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

# Words that mean something to the code that reads them, among any others.
WORDS = (" ", "User: ", "\n\n", "Assistant:", BOS, EOS, "\ufeff", '"', "{", "é", "🎉", "\0")
TEXT = st.lists(st.sampled_from(WORDS) | st.text(max_size=8), max_size=5).map("".join)
FULL = TEXT.filter(str.strip)
ROLES = ("user", "assistant", "system", "human", "gpt", "tool")
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.just("\ud800")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("properties")


# --- Rows


def objects(values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Objects of JSON, most of whose names mean something in a row or a message."""
    names = st.sampled_from([*FIELDS, *sorted(KEYS)]) | st.text(max_size=3)
    return st.dictionaries(names, values | st.sampled_from(ROLES), max_size=5)


MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(ROLES), "content": TEXT},
        optional=dict.fromkeys(("weight", "train", "value", "tool_calls"), SCALARS),
    ),
    max_size=4,
)
VALUES = st.recursive(
    SCALARS | MESSAGES,
    lambda inner: st.lists(inner, max_size=3) | objects(inner),
    max_leaves=6,
)


@many
@given(objects(VALUES) | VALUES)
def test_any_row_is_a_conversation_or_bad(row: Any) -> None:
    try:
        messages, unused = find_conversation(row, {})
    except BadRow as error:
        assert str(error)
        return
    roles = [message["role"] for message in messages]
    asked = roles[roles[0] == "system" :]
    assert set(roles) <= {"user", "assistant", "system"}
    assert (asked[0], roles[-1]) == ("user", "assistant")
    assert all(m["content"].strip() for m in messages if m["role"] != "system")
    assert any(m["role"] == "assistant" and m.get("train", True) for m in messages)
    assert all(name.startswith(tuple(row)) for name in unused)
    assert find_conversation({"messages": messages}, {}) == (messages, [])
    assert json.loads(json.dumps(messages)) == messages
    render(TOKENIZER, messages)


TURNS = st.lists(st.tuples(FULL, FULL), min_size=1, max_size=3)
FORMS = ("messages", "conversations", "instruction", "prompt", "question", "lists")


@many
@given(TURNS, TEXT, st.sampled_from(FORMS), st.booleans())
def test_every_form_of_a_conversation_is_the_same_one(
    turns: list[tuple[str, str]], said: str, form: str, renamed: bool
) -> None:
    messages = [made for turn in turns for made in (user(turn[0]), assistant(turn[1]))]
    *history, (question, answer) = turns
    row: dict[str, Any] = {"history": [list(turn) for turn in history], "system": said}
    if form == "messages":
        row = {"messages": messages, "system": said}
    elif form == "conversations":
        names = {"user": "human", "assistant": "gpt"}
        shared = [{"from": names[m["role"]], "value": m["content"]} for m in messages]
        row = {"conversations": shared, "system": said}
    elif form == "lists":
        row |= {"prompt": [user(question)], "completion": [assistant(answer)]}
    else:
        ends = {"instruction": "output", "prompt": "completion", "question": "answer"}[form]
        row |= {form: question, ends: answer}
    columns = {name: f"my {name}" for name in row} if renamed else {}
    row = {columns.get(name, name): value for name, value in row.items()}
    found, unused = find_conversation(row, columns)
    expected = [system(said)] * bool(said.strip()) + messages
    assert [{"role": m["role"], "content": m["content"]} for m in found] == expected
    assert not unused


@many
@given(
    st.lists(st.dictionaries(TEXT, SCALARS, max_size=3), min_size=1, max_size=3),
    st.booleans(),
    st.sampled_from("\n \r"),
)
def test_an_array_and_lines_hold_the_same_rows(rows: list[Any], mark: bool, blank: str) -> None:
    lines = [json.dumps(row) for row in rows]
    texts = (blank + "[" + ",\n".join(lines) + "]", f"{blank}\n".join(["", *lines]))
    for text in texts:
        data = (b"\xef\xbb\xbf" if mark else b"") + text.encode()
        read = [row for _, row in READERS[".json"](BytesIO(data))]
        assert json.dumps(read) == json.dumps(rows)


# --- The renderer and its mask


def expected_text(messages: list[dict[str, str]]) -> str:
    forms = {"user": "User: {}\n\n", "assistant": "Assistant: {}" + EOS, "system": "{}\n\n"}
    return BOS + "".join(forms[m["role"]].replace("{}", m["content"], 1) for m in messages)


@many
@given(TURNS, TEXT)
def test_the_mask_is_the_answers_with_their_end(turns: list[tuple[str, str]], said: str) -> None:
    messages = [system(said)] * bool(said)
    messages += [made for turn in turns for made in (user(turn[0]), assistant(turn[1]))]
    ids, mask = render(TOKENIZER, messages)
    assert TOKENIZER.decode(ids, clean_up_tokenization_spaces=False) == expected_text(messages)
    trained = [token for token, one in zip(ids, mask, strict=True) if one]
    answers = "".join(f" {answer}{EOS}" for _, answer in turns)
    assert TOKENIZER.decode(trained, clean_up_tokenization_spaces=False) == answers
    # Nobody begins or ends a turn by typing the name of a special token.
    assert (ids.count(TOKENIZER.bos_token_id), ids.count(TOKENIZER.eos_token_id)) == (1, len(turns))
    asked, _ = render(TOKENIZER, messages[:-1], add_generation_prompt=True)
    assert asked == ids[: len(asked)] and mask[len(asked) :] == [1] * (len(ids) - len(asked))
    room = len(ids) // 2
    within, dropped = render_within(TOKENIZER, messages[:-1], room)
    assert within == render(TOKENIZER, messages[dropped:-1], add_generation_prompt=True)[0]
    assert len(within) <= room or dropped == len(messages) - 2


@many
@given(TEXT)
def test_a_stream_of_ids_gives_the_text(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False, split_special_tokens=True)
    stream = TextStream(TOKENIZER)
    assert "".join(map(stream.add, ids)) == text


# --- Packing and batches


@many
@given(st.lists(st.integers(1, 40), max_size=40), st.integers(0, 20))
def test_packing_is_the_best_fit(lengths: list[int], more: int) -> None:
    most = max(lengths, default=1) + more
    rows = pack_lengths(lengths, most)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else most) - length)
    assert sorted(most - sum(lengths[i] for i in row) for row in rows) == sorted(rooms)


ROW = st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=1, max_size=3)


@many
@given(st.lists(ROW, min_size=1, max_size=3))
def test_a_batch_of_packed_rows_holds_each_example(rows: list[list[list[bool]]]) -> None:
    features, number = [], 0
    for masks in rows:
        trained = [int(one and place > 0) for mask in masks for place, one in enumerate(mask)]
        ids = list(range(number, number + len(trained)))
        number += len(trained)
        lengths = [len(mask) for mask in masks]
        features.append({"input_ids": ids, "trained": trained, "lengths": lengths})
        features[-1] |= {"length": len(ids), "sources": ["x"] * len(masks)}
    batch = Collator(999, packing=True)(features)
    B, L = batch["input_ids"].shape
    bounds = batch["cu_seq_lens_q"].tolist()
    assert (bounds[0], bounds[-1]) == (0, B * L)
    assert batch["max_length_q"] == max(np.diff(bounds))
    seen = 0
    for b, row in enumerate(features):
        place = 0
        for length in row["lengths"]:
            assert b * L + place in bounds and b * L + place + length in bounds
            for i in range(length):
                token, at = row["input_ids"][place], (b, place)
                assert batch["input_ids"][at] == token
                assert batch["labels"][at] == (token if row["trained"][place] else IGNORED)
                assert (batch["position_ids"][at], batch["sequence_ids"][at]) == (i, seen)
                place += 1
            seen += 1
        for name, filler in (("input_ids", 999), ("labels", IGNORED), ("sequence_ids", -1)):
            assert (batch[name][b, place:] == filler).all()
    assert len(batch["sources"]) == seen


# --- Sampling

LOGITS = st.dictionaries(st.integers(-200, 200), st.booleans(), min_size=1, max_size=12)
OPTIONS_OF_DRAWS = {
    "temperature": st.floats(0.05, 20),
    "top_k": st.integers(0, 15),
    "top_p": st.floats(0.01, 1),
    "min_p": st.floats(0, 1),
    "repetition_penalty": st.floats(0.5, 2),
    "seed": st.integers(0, 2**63 - 1),
}


@many
@given(LOGITS, st.fixed_dictionaries(OPTIONS_OF_DRAWS))
def test_the_distribution_is_what_the_options_say(
    seen_by: dict[int, bool], options: dict[str, Any]
) -> None:
    sample, penalty = Sampling(**options), options["repetition_penalty"]
    V, logits, seen = len(seen_by), [one / 4 for one in seen_by], [*seen_by.values()]
    tensors = torch.tensor([logits]), torch.tensor([seen])
    weights, ids = sample.distribution(*tensors)
    ids = torch.arange(V)[None] if ids is None else ids
    found = torch.zeros(V, dtype=torch.float64).scatter(0, ids[0], weights[0].double())
    found /= found.sum()

    x = [v * penalty if v < 0 else v / penalty for v in logits]
    x = [(a if s else b) / sample.temperature for a, b, s in zip(x, logits, seen, strict=True)]
    order = sorted(range(V), key=lambda i: -x[i])
    assume(all(x[a] - x[b] > 1e-4 for a, b in pairwise(order)))
    order = order[: sample.top_k or V]
    e = [math.exp(x[i] - max(x)) for i in order]
    before, kept = 0.0, {}
    for i, one in zip(order, e, strict=True):
        # What is nearly equal may be told apart in the other way in fp32.
        least = sample.min_p * e[0]
        assume(abs(before - sample.top_p) > 1e-5 and abs(one - least) > 1e-5 * e[0])
        if before < sample.top_p and one >= least:
            kept[i] = one
        before += one / sum(e)
    wanted = [kept.get(i, 0.0) / sum(kept.values()) for i in range(V)]
    assert found.tolist() == pytest.approx(wanted, rel=1e-3, abs=1e-6)
    token = sample(*tensors).item()
    assert found[token] > 0
    assert Sampling(**options)(*tensors).item() == token


# --- Prompts and options


@many
@given(st.lists(st.tuples(FULL, st.sampled_from(("plain", "text", "object"))), max_size=4), TEXT)
def test_a_file_of_prompts_is_read_as_it_was_written(
    folder: Path, prompts: list[tuple[str, str]], more: str
) -> None:
    lines, expected = [], [prompt for prompt, _ in prompts]
    for prompt, form in prompts:
        plain = prompt.splitlines() == [prompt] and prompt[0] not in '{"\ufeff'
        row = prompt if form == "text" else {"prompt": prompt, "more": more}
        lines.append(prompt if plain and form == "plain" else json.dumps(row))
    file = folder / "prompts"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert not prompts or read_prompts(["given"], file) == ["given", *expected]


@many
@given(st.lists(st.sampled_from([b"\n", b'"', b'{"prompt": ', b"[" * 5000]) | st.binary()))
def test_any_file_of_prompts_is_read_or_named(folder: Path, parts: list[bytes]) -> None:
    file = folder / "any prompts"
    file.write_bytes(b"".join(parts))
    try:
        prompts = read_prompts([], file)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert prompts and all(prompt.strip() for prompt in prompts)


NUMBERS = ("1", "0", "-1", "8", "4", "0.5", "1e400", "nan", "1_000", "٣", "9" * 20)
ANY_VALUE = st.sampled_from([*NUMBERS, "True", "no", "steps", "linear", "--", "--bits"])
ANY_VALUE |= st.text(max_size=4)


@many
@given(st.dictionaries(st.sampled_from(sorted(OPTIONS)), ANY_VALUE, max_size=4))
def test_options_are_read_as_what_they_are_or_refused(values: dict[str, str]) -> None:
    values = {"data_path": "x", "output_dir": "y"} | values
    said = StringIO()
    try:
        with redirect_stderr(said):
            found = parse_options([f"--{name}={value}" for name, value in values.items()])
    except SystemExit as left:
        assert left.code == 2
        assert said.getvalue().startswith("error: ") and said.getvalue().count("\n") == 1
        return
    assert found.keys() == values.keys()
    for name, value in found.items():
        _, kind, _, _, choices, least = OPTIONS[name]
        wanted = [values[name]] if kind is list else values[name]
        wanted = value if kind is bool else kind(wanted)
        assert value == wanted or math.isnan(value)
        assert not choices or value in choices
        assert least is None or value >= least
        assert kind is not bool or type(value) is bool
