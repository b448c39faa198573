"""A row of data -> a conversation for `chat.render`, or what is wrong with the row.

People write the same things under different names:

    messages              a list of role (user, assistant, system) and content
    conversations         the same as from (human, gpt, system) and value, as in ShareGPT
    instruction, output   with input, which follows the instruction on a new line
    prompt, completion    texts, or lists of messages, of which the prompt is not trained on
    question, answer

All may have `system` beside them, which messages with a system message of their own leave unused,
and the pairs `history` (earlier pairs of question and answer).
A form that is named by --columns counts before all others, messages before pairs, and pairs as in
this list, whole ones first. A null counts as absent, and an input without its question is one.

An answer that is marked by `weight` 0, `train` false or `trainable` false is not trained on. Beside
the fields of a row, such a mark is for all of its answers, and the row is a bad row.
"""

import reprlib
from collections.abc import Iterable, Mapping, Set
from typing import Any

from ..chat import Message

PAIRS = (("instruction", "output"), ("prompt", "completion"), ("question", "answer"))
LISTS = ("messages", "conversations")
BESIDE = ("input", "history", "system")
FIELDS = (*LISTS, *(name for pair in PAIRS for name in pair), *BESIDE)
ROLES = {"human": "user", "gpt": "assistant"}  # of ShareGPT
MARKS = ("weight", "train", "trainable")
SAID = {"0": False, "0.0": False, "false": False, "": True, "1": True, "1.0": True, "true": True}
KEYS = {"role", "from", "content", "value", "tool_calls", "function_call", *MARKS}


class BadRow(ValueError):
    """Says what was found in a row, and what was wanted."""


class RepeatedField(dict):
    """An object of JSON in which a name occurs twice, `name`. One of the two values is lost."""

    name: str


def make_object(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, for json's `object_pairs_hook`."""
    pairs = list(pairs)
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        made = RepeatedField(made)
        made.name = next(name for name in names if names.count(name) > 1)
    return made


def find_conversation(row: Any, columns: Mapping[str, str]) -> tuple[list[Message], list[str]]:
    """The conversation of a row, and the names of the fields that it does not use.

    Args:
        columns: names of FIELDS, and the names that the row has for them.

    Raises:
        BadRow: the row is no conversation that ends with an answer to train on.
    """
    if isinstance(row, BadRow):
        raise row
    row = _object(row, "the row", "an object with instruction and output")
    row = {name: value for name, value in row.items() if value is not None}
    given = {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}
    found = {name: value for name, value in row.items() if name not in columns.values()} | given
    forms = given.keys() - set(BESIDE) or found.keys()
    name = next((name for name in LISTS if name in forms), None)
    if name is None:
        messages, used = _pair(found, forms)
    else:
        messages, used = _messages(found[name], name), [name]
    system = _system(found)
    if messages[0]["role"] != "system":
        messages = [*system, *messages]
    if not system or messages[0]["content"] == system[0]["content"]:
        used.append("system")
    _check_order(messages)
    marks = {name: _mark(found[name]) for name in MARKS if name in found}
    if False in marks.values():
        raise BadRow("the row is marked as not to be trained on")
    used += [name for name, mark in marks.items() if mark is not None]
    used = {columns[field] if field in given else field for field in used}
    unused = [field for field in row if field not in used]
    if name is not None:
        keys = {key for message in found[name] for key in message if message[key] is not None}
        unused += [f"{columns.get(name, name)}.{key}" for key in sorted(keys - KEYS)]
    return messages, unused


def _pair(row: Mapping[str, Any], forms: Set[str]) -> tuple[list[Message], list[str]]:
    """The messages of a pair, without `system`, and the names of the fields that they are from.

    It is the pair among `forms` of which the row lacks the least.
    """
    names = min(PAIRS, key=lambda pair: (forms.isdisjoint(pair), len(set(pair) - row.keys())))
    if row.keys().isdisjoint(names):
        fields = ", ".join(map(str, row)) or "no field"
        raise BadRow(f"found {fields}; wanted instruction and output, or messages")
    question, answer = names
    for name in names:
        if name not in row and (name == answer or "input" not in row):
            raise BadRow(f"no {name}: found {', '.join(map(str, row))}")
    messages = _history(row.get("history"))
    if isinstance(row.get(question), list):  # as in TRL
        before = _messages(row[question], question)
        at = int(before[0]["role"] == "system")
        before[at:at] = messages
        before = [message | {"train": False} for message in before]
        return [*before, *_messages(row[answer], answer)], [*names, "history"]
    texts = [_text(row[name], name) for name in (question, "input") if name in row]
    asked = "\n".join(text for text in texts if text.strip())
    if not asked:
        raise BadRow(f"{question} is empty, wanted a question")
    messages.append({"role": "user", "content": asked})
    content = _text(row[answer], answer, not_empty=True)
    messages.append({"role": "assistant", "content": content})
    return messages, [*names, "input", "history"]


def _system(row: Mapping[str, Any]) -> list[Message]:
    text = _text(row.get("system", ""), "system")
    return [{"role": "system", "content": text}] if text.strip() else []


def _history(value: Any) -> list[Message]:
    pairs = [] if value in (None, "") else value
    if not isinstance(pairs, list) or any(not isinstance(p, list) or len(p) != 2 for p in pairs):
        raise BadRow(f"history is {_name(value)}, wanted a list of [question, answer]")
    return [
        {"role": role, "content": _text(text, f"turn {number} of history", not_empty=True)}
        for number, pair in enumerate(pairs, 1)
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def _messages(value: Any, field: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise BadRow(f"{field} is {_name(value)}, wanted a list of role and content")
    return [_message(message, number) for number, message in enumerate(value, 1)]


def _message(message: Any, number: int) -> Message:
    message = _object(message, f"message {number}", "role and content")
    role = message.get("role") or message.get("from")
    role = ROLES.get(role, role) if isinstance(role, str) else role
    if role not in ("user", "assistant", "system"):
        raise BadRow(
            f"message {number} has role {reprlib.repr(role)}, wanted user, assistant or system"
        )
    for name in ("tool_calls", "function_call"):
        if message.get(name):
            raise BadRow(f"message {number} has {name}, which this model's chats do not know")
    content = message.get("value") if message.get("content") is None else message["content"]
    content = _text(content, f"content of message {number}", not_empty=role != "system")
    made = {"role": role, "content": content}
    for name in MARKS:
        if (mark := message.get(name)) is not None:
            if _mark(mark) is None:
                raise BadRow(f"{name} of message {number} is {_name(mark)}, wanted 0 or 1")
            if role == "assistant" and not _mark(mark):
                made["train"] = False
    return made


def _mark(value: Any) -> bool | None:
    """Whether a mark says to train, as a number, truth value or text; None if it says neither."""
    if isinstance(value, str):  # as in CSV
        return SAID.get(value.strip().lower())
    return bool(value) if value in (0, 1) else None


def _check_order(messages: list[Message]) -> None:
    """The first message (but for a system prompt) asks, and the last answers."""
    roles = [message["role"] for message in messages]
    first = next((role for role in roles if role != "system"), None)
    if first != "user":
        raise BadRow(f"the first message has role {reprlib.repr(first)}, wanted user (a question)")
    if roles[-1] != "assistant":
        raise BadRow(f"the last message has role {reprlib.repr(roles[-1])}, wanted assistant")
    if not any(m.get("train", True) for m in messages if m["role"] == "assistant"):
        raise BadRow("every answer is marked as not to be trained on")


def _object(value: Any, what: str, wanted: str) -> Mapping[str, Any]:
    if isinstance(value, RepeatedField):
        raise BadRow(f"{value.name} occurs twice in {what}, wanted each name once")
    if not isinstance(value, dict):
        raise BadRow(f"{what} is {_name(value)}, wanted {wanted}")
    return value


def _text(value: Any, what: str, not_empty: bool = False) -> str:
    if isinstance(value, list) and value and all(_is_text_part(part) for part in value):
        value = "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise BadRow(f"{what} is {_name(value)}, wanted text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"{what} has half a character ({value[error.start]!a}), wanted text") from None
    if not_empty and not value.strip():
        raise BadRow(f"{what} is empty, wanted text")
    return value


def _is_text_part(part: Any) -> bool:
    is_text = isinstance(part, dict) and part.get("type") == "text"
    return is_text and isinstance(part.get("text"), str)


def _name(value: Any) -> str:
    if value is None:
        return "null"
    kinds = {str: "text", bool: "truth value", int: "number", float: "number", dict: "object"}
    return f"{kinds.get(type(value), type(value).__name__)} {reprlib.repr(value)}"
