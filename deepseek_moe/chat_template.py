"""Conversations in the words of a chat template that a checkpoint brings.

A template is a small program (Jinja) that writes a conversation as text. It need not say which part
of the text an answer is. This module finds the answers, so that exactly they are trained on.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

from jinja2 import Environment
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from .errors import UserError, as_user_error

Span = tuple[int, int]
"""The characters from the first number to the one before the second."""


def template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's template; of several, the one that is named default.

    Raises:
        UserError: none of several is named so.
    """
    templates = tokenizer.chat_template
    if isinstance(templates, dict) and "default" not in templates:
        raise UserError(
            f"the checkpoint has the chat templates {', '.join(templates)}, of which none is named "
            "default; name one so, or leave only one as chat_template.jinja"
        )
    return tokenizer.get_chat_template()


def write(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, Any]],
    add_generation_prompt: bool = False,
) -> str:
    """The text of a conversation by the tokenizer's template.

    Raises:
        UserError: the template refuses the conversation, or leaves out a message.
    """
    _refuse_dropped(tokenizer, messages)
    return _write(tokenizer, messages, add_generation_prompt)[0]


def find_answers(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], text: str
) -> list[Span]:
    """Where each answer stands in `text`, the conversation as `write` returns it.

    An answer includes the special token that ends it. If the template has marks of its own
    (`{% generation %}`), they count. Otherwise the conversation is written twice for each answer,
    without it and with it, and `text` must begin with both.

    Raises:
        UserError: the template writes answers in such a way that this cannot be told.
    """
    if _has_marks(template_of(tokenizer)):
        spans = _write(tokenizer, messages, False, marks=True)[1]
        answers = sum(message.get("role") == "assistant" for message in messages)
        if len(spans) != answers:
            raise UserError(
                f"the checkpoint's chat template marks {len(spans)} answers of {answers}; put its "
                "{% generation %} marks around each answer"
            )
        return spans
    special = _special_tokens(tokenizer)
    spans = []
    for number, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        before, _ = _write(tokenizer, messages[:number], add_generation_prompt=True)
        after, _ = _write(tokenizer, messages[: number + 1], add_generation_prompt=False)
        end = max(
            (after.rfind(token) + len(token) for token in special if token in after), default=0
        )
        if not (text.startswith(after) and after.startswith(before) and end > len(before)):
            raise UserError(
                "the checkpoint's chat template does not tell which part of a text an answer is: "
                f"answer {len(spans) + 1} changes when more follows it, or does not end with a "
                "special token; put {% generation %} marks into the template"
            )
        spans.append((len(before), end))
    return spans


def refuse_special_tokens(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]]
) -> None:
    """Raises a UserError if a message spells a special token, with which it could end a turn."""
    special = _special_tokens(tokenizer)
    for number, message in enumerate(messages, 1):
        for token in special:
            if token in message["content"]:
                raise UserError(
                    f"message {number} spells {token}, a special token of this checkpoint's chat "
                    "template; leave it out"
                )


def _refuse_dropped(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]]) -> None:
    """Raises a UserError if the template leaves out a message, as one of a role without a branch.

    It is tried on contents that occur nowhere else, and that a template has no reason to change.
    """
    contents = [f"content {number} of {len(messages)}" for number in range(1, len(messages) + 1)]
    tried = [m | {"content": content} for m, content in zip(messages, contents, strict=True)]
    text, _ = _write(tokenizer, tried, add_generation_prompt=False)
    for number, (message, content) in enumerate(zip(messages, contents, strict=True), 1):
        if message["content"].strip() and content not in text:
            raise UserError(
                f"the checkpoint's chat template leaves out message {number}, which has role "
                f"{message.get('role')!r}; change its role or its place"
            )


@lru_cache(maxsize=8)
def _has_marks(template: str) -> bool:
    """Whether a template says where answers are. Comments do not count."""
    words = [word[1:] for word in Environment().lex(template) if word[1] != "whitespace"]
    return any(
        first[0] == "block_begin" and second == ("name", "generation")
        for first, second in pairwise(words)
    )


def _write(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, Any]],
    add_generation_prompt: bool,
    marks: bool = False,
) -> tuple[str, list[Span]]:
    what = "the checkpoint's chat template refuses the conversation"
    with as_user_error(what, "change its roles or their order"):
        (text,), spans = render_jinja_template(
            conversations=[[dict(message) for message in messages]],
            chat_template=template_of(tokenizer),
            add_generation_prompt=add_generation_prompt,
            return_assistant_tokens_mask=marks,
            **tokenizer.special_tokens_map,
            additional_special_tokens=tokenizer.extra_special_tokens,
        )
        text.encode()  # a template may write half a character
    return text, [tuple(span) for span in spans[0]] if marks else []


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
