"""Rows as people have them -> conversations, or what is wrong with them."""

from typing import Any

import pytest
from text_fixtures import assistant, system, user

from deepseek_moe.errors import UserError
from deepseek_moe.training.conversations import BadRow, find_conversation, make_object
from deepseek_moe.training.rows import parse_columns

ASKED = [user("Who?"), assistant("The king.")]
KIND = [system("Be kind."), *ASKED]
PARTS = [{"type": "text", "text": "Wh"}, {"type": "text", "text": "o?"}]


def sharegpt(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": text} for role, text in turns]}


def untrained(*messages: dict[str, str]) -> list[dict[str, Any]]:
    return [message | {"train": False} for message in messages]


@pytest.mark.parametrize(
    ("row", "messages", "unused"),
    [
        ({"instruction": "Who?", "output": "The king."}, ASKED, []),
        ({"prompt": "Who?", "completion": "The king.", "id": 7}, ASKED, ["id"]),
        ({"question": "Who?", "answer": "The king.", "url": "x", "id": None}, ASKED, ["url"]),
        ({"messages": ASKED, "instruction": "a", "output": "b"}, ASKED, ["instruction", "output"]),
        (sharegpt(("human", "Who?"), ("gpt", "The king.")), ASKED, []),
        ({"conversations": ASKED}, ASKED, []),
        ({"messages": [user("Who?") | {"content": PARTS}, ASKED[1]]}, ASKED, []),
        (
            {"messages": [user("Who?") | {"name": "Ann"}, ASKED[1] | {"thinking": "hm"}]},
            ASKED,
            ["messages.name", "messages.thinking"],
        ),
        (
            {"prompt": ASKED[:1], "completion": ASKED[1:]},
            [ASKED[0] | {"train": False}, ASKED[1]],
            [],
        ),
        (
            {"instruction": "Sum", "input": "1, 2", "output": "3"},
            [user("Sum\n1, 2"), assistant("3")],
            [],
        ),
        ({"instruction": "", "input": "Who?", "output": "The king."}, ASKED, []),
        ({"instruction": "Who?", "input": " ", "output": "The king."}, ASKED, []),
        ({"instruction": None, "input": "Who?", "output": "The king."}, ASKED, []),
        ({"input": "Who?", "output": "The king."}, ASKED, []),
        ({"question": "Who?", "answer": "The king.", "output": "x"}, ASKED, ["output"]),
        ({"prompt": "x", "question": "Who?", "answer": "The king."}, ASKED, ["prompt"]),
        (
            {"instruction": "And?", "output": "He slept.", "history": [["Who?", "The king."]]}
            | {"system": "Be brief."},
            [system("Be brief."), *ASKED, user("And?"), assistant("He slept.")],
            [],
        ),
        ({"instruction": "Who?", "output": "The king.", "history": [], "system": ""}, ASKED, []),
        ({"messages": ASKED, "system": "Be brief."}, [system("Be brief."), *ASKED], []),
        ({"messages": KIND, "system": "Be brief."}, KIND, ["system"]),
        ({"messages": KIND, "system": "Be kind."}, KIND, []),
        ({"messages": KIND, "system": " "}, KIND, []),
        (
            {"prompt": [user("And?")], "completion": [assistant("He slept.")]}
            | {"system": "Be kind.", "history": [["Who?", "The king."]]},
            [KIND[0], *untrained(*ASKED, user("And?")), assistant("He slept.")],
            [],
        ),
        (
            {"prompt": [KIND[0], user("And?")], "completion": [assistant("He slept.")]}
            | {"system": "Be brief.", "history": [["Who?", "The king."]]},
            [*untrained(*KIND, user("And?")), assistant("He slept.")],
            ["system"],
        ),
    ],
)
def test_every_form_of_a_row(row, messages, unused):
    assert find_conversation(row, {}) == (messages, unused)


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"trainable": False}])
def test_a_marked_answer_is_context(mark):
    row = {"messages": [user("a"), assistant("wrong") | mark, user("b"), assistant("right")]}
    messages, unused = find_conversation(row, {})
    assert [message.get("train", True) for message in messages] == [True, False, True, True]
    assert unused == []
    row["messages"][1] |= dict.fromkeys(mark, True)
    assert all("train" not in message for message in find_conversation(row, {})[0])


@pytest.mark.parametrize("value", [0, 0.0, False, "0", "0.0", "False"])
@pytest.mark.parametrize("mark", ["weight", "train", "trainable"])
def test_a_marked_row_is_a_bad_row(mark, value):
    pair = {"instruction": "Who?", "output": "The king."}
    for row in (pair, {"messages": ASKED}, {"prompt": ASKED[:1], "completion": ASKED[1:]}):
        with pytest.raises(BadRow, match="the row is marked as not to be trained on"):
            find_conversation(row | {mark: value}, {})
    for other in (1, 1.0, True, "1", "1.0", "true", ""):
        assert find_conversation(pair | {mark: other}, {}) == (ASKED, [])
    for other in (0.5, 70, "part 1", [0]):  # a field that is no mark
        assert find_conversation(pair | {mark: other}, {}) == (ASKED, [mark])


def test_columns_of_other_names():
    columns = parse_columns("instruction=query, output=text,system=persona")
    row = {"query": "Who?", "text": "The king.", "persona": "Be brief.", "output": "?", "n": 1}
    messages, unused = find_conversation(row, columns)
    assert messages == [system("Be brief."), *ASKED]
    assert unused == ["output", "n"]
    with pytest.raises(BadRow, match="no output: found instruction"):
        find_conversation({"query": "Who?"}, columns)


@pytest.mark.parametrize(
    ("columns", "others"),
    [
        ("question=q,answer=a", {"instruction": "x", "output": "y"}),
        ("question=q,answer=a", {"question": "x", "answer": "y"}),
        ("prompt=q,completion=a", {"messages": [user("x"), assistant("y")]}),
        ("answer=a,question=q", {"prompt": "x", "completion": "y", "answer": "z"}),
    ],
)
def test_columns_that_are_named_count_before_others(columns, others):
    row = others | {"q": "Who?", "a": "The king."}
    assert find_conversation(row, parse_columns(columns)) == (ASKED, list(others))


def test_columns_may_swap_names_and_need_not_be_in_every_row():
    columns = parse_columns("instruction=output,output=instruction,input=context")
    row = {"output": "Who?", "instruction": "The king."}
    assert find_conversation(row, columns) == (ASKED, [])
    columns = parse_columns("question=q,answer=a")
    row = {"instruction": "Who?", "output": "The king."}
    assert find_conversation(row, columns) == (ASKED, [])
    assert find_conversation(row | {"q": None}, columns) == (ASKED, [])


@pytest.mark.parametrize(
    "given", ["instruction", "query=output", "output=", "input=a,input=b", "instruction=q,output=q"]
)
def test_columns_that_are_none(given):
    with pytest.raises(UserError, match="write --columns instruction=question,output=answer"):
        parse_columns(given)


def talk(*messages: Any) -> dict[str, Any]:
    return {"messages": list(messages)}


NO_TEXT = [None, "a", {"text": "a"}, {"type": "text"}, {"type": "text", "text": None}]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "a", "id": "b"}, "found text, id; wanted instruction and output, or messages"),
        ({}, "found no field; wanted"),
        ({"instruction": "a"}, "no output: found instruction"),
        ({"instruction": True, "output": "b"}, "instruction is truth value True, wanted text"),
        ({"instruction": "a", "input": 1.5, "output": "b"}, "input is number 1.5, wanted text"),
        ({"instruction": "a", "output": "b\ud800"}, "output has half a character ('\\ud800')"),
        (
            {"instruction": "", "input": "", "output": "b"},
            "instruction is empty, wanted a question",
        ),
        ({"instruction": " \n", "output": "b"}, "instruction is empty, wanted a"),
        ({"instruction": "a", "output": "b", "history": "c"}, "history is text 'c', wanted a list"),
        (
            {"instruction": "a", "output": "b", "history": [["c"]]},
            "history is list [['c']], wanted",
        ),
        ({"instruction": "a", "output": "b", "history": [["c", ""]]}, "turn 1 of history is"),
        ("a", "the row is text 'a', wanted an object"),
        (talk(), "messages is list [], wanted a list of role and content"),
        ({"messages": {"role": "user"}}, "messages is object {'role': 'user'}, wanted a list"),
        (talk("hello"), "message 1 is text 'hello', wanted role and content"),
        (talk(user("a")), "the last message has role 'user', wanted assistant"),
        (talk(assistant("a")), "the first message has role 'assistant', wanted user"),
        (talk(system("a")), "the first message has role None, wanted user"),
        (talk(user(""), assistant("b")), "content of message 1 is empty, wanted text"),
        (talk(user("a"), {"role": "tool", "content": "b"}), "message 2 has role 'tool', wanted"),
        (talk(user("a"), {"role": "assistant"}), "content of message 2 is null, wanted text"),
        (
            talk(user("a"), assistant(" "), user("c"), assistant("d")),
            "content of message 2 is empty",
        ),
        (talk(user("a"), assistant("b") | {"tool_calls": [{}]}), "message 2 has tool_calls, which"),
        (talk(user("a"), assistant("b") | {"weight": 0.5}), "weight of message 2 is number 0.5"),
        (talk(user("a"), assistant("b") | {"weight": 0}), "every answer is marked as not to be"),
        (
            talk({"role": "user", "content": [{"type": "image"}]}, assistant("b")),
            "content of message 1 is list [{'type': 'image'}], wanted text",
        ),
        *(
            (talk(user("a") | {"content": [part]}), "content of message 1 is list")
            for part in NO_TEXT
        ),
        (make_object([("a", 1), ("b", 2), ("a", 3)]), "a occurs twice in the row"),
    ],
)
def test_what_is_wrong_is_said(row, said):
    with pytest.raises(BadRow) as caught:
        find_conversation(row, {})
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)
