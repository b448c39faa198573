"""The chat format: messages to ids, and which of them are trained on.

    <BOS>User: {question}

    Assistant: {answer}<EOS>User: {question}

    Assistant:

Training and chatting both use `render`, so that the model is asked in the words in which it was
taught. The Jinja template for other engines (CHAT_TEMPLATE in model/chat_format.py, and
chat_template.jinja in checkpoints) gives the same ids, which tests/test_chat.py compares.
A checkpoint whose template writes something else is asked, and taught, in the words of that one
(chat_template.py).
"""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from . import chat_template
from .errors import UserError
from .model.chat_format import writes_this_format

Message = dict[str, Any]


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    add_generation_prompt: bool = False,
) -> tuple[list[int], list[int]]:
    """A conversation as ids, and a mask of the ids to train on (1 for answers and their EOS).

    Questions and answers are encoded apart, so that the mask is exact. In this family's own format,
    special tokens in them are encoded as ordinary text, so that nobody can end a turn by typing
    one. With another template, a message that spells one is refused.

    Args:
        messages: dicts of `role` (user or assistant; system works too)
            and `content`, which is text, or a list of text parts, which are joined. An answer with
            `train` False is not trained on.
        add_generation_prompt: end with the words that ask for an answer.

    Raises:
        UserError: a role is unknown, a content is not text, the tokenizer lacks BOS or EOS, or its
            template does not tell where the answers are.
    """
    messages = [
        {**message, "content": _text_of(message.get("content"), f"message {number}")}
        for number, message in enumerate(messages, 1)
    ]
    if has_own_template(tokenizer):
        pieces = _by_template(tokenizer, messages, add_generation_prompt)
    else:
        if tokenizer.bos_token is None or tokenizer.eos_token is None:
            raise UserError(
                "the tokenizer has no BOS or no EOS, which a conversation needs; name both"
            )
        pieces = _family_format(messages, tokenizer.bos_token, tokenizer.eos_token)
        if add_generation_prompt:
            pieces.append(("Assistant:", False, 0))
    ids, mask = [], []
    for text, with_special_tokens, trained in pieces:
        new = tokenizer.encode(
            text,
            add_special_tokens=False,
            split_special_tokens=not with_special_tokens,
            verbose=False,
        )
        ids.extend(new)
        mask.extend([trained] * len(new))
    return ids, mask


Piece = tuple[str, bool, int]
"""A text, whether special tokens are meant by their names in it, and whether it is trained on."""


def has_own_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer has a chat template that writes another format than this family's."""
    if not tokenizer.chat_template:
        return False
    named = {"bos_token": "", "eos_token": ""} | tokenizer.special_tokens_map
    template = chat_template.template_of(tokenizer)
    return not writes_this_format(template, named["bos_token"], named["eos_token"])


def _family_format(messages: Sequence[Message], bos: str, eos: str) -> list[Piece]:
    pieces = [(bos, True, 0)]
    for number, message in enumerate(messages, 1):
        role, content = message.get("role"), message["content"]
        trained = _is_trained(message)
        if role == "user":
            pieces.append((f"User: {content}\n\n", False, 0))
        elif role == "assistant":
            pieces.append(("Assistant:", False, 0))
            pieces.append((f" {content}", False, trained))
            pieces.append((eos, True, trained))
        elif role == "system":
            pieces.append((f"{content}\n\n", False, 0))
        else:
            raise UserError(f"message {number} has role {role!r}; use user, assistant or system")
    return pieces


def _by_template(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], add_generation_prompt: bool
) -> list[Piece]:
    chat_template.refuse_special_tokens(tokenizer, messages)
    text = chat_template.write(tokenizer, messages, add_generation_prompt)
    try:
        spans = chat_template.find_answers(tokenizer, messages, text)
    except UserError:
        if not add_generation_prompt:
            raise
        return [(text, True, 0)]  # nothing is trained on, so that the answers need not be found
    pieces, at = [], 0
    answers = [message for message in messages if message.get("role") == "assistant"]
    for (start, end), answer in zip(spans, answers, strict=True):
        pieces.append((text[at:start], True, 0))
        pieces.append((text[start:end], True, _is_trained(answer)))
        at = end
    return [*pieces, (text[at:], True, 0)]


def _is_trained(answer: Message) -> int:
    """1, or 0 if `train` is false. A null counts as absent."""
    return int(answer.get("train") is None or bool(answer["train"]))


def _text_of(content: Any, where: str) -> str:
    """The text of a content, as a string or as OpenAI's list of parts.

    Raises:
        UserError: it has other parts than text, is nothing of the kind, or has half a character,
            of which no tokenizer can make ids.
    """
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise UserError(f"{where} has content {part!r}; it must be text")
        if not isinstance(part.get("text"), str):
            raise UserError(f"{where} has content {part.get('text')!r}; it must be text")
    text = "".join(part["text"] for part in parts)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = text[error.start]
        raise UserError(f"{where} has half a character ({found!a}); it must be text") from error
    return text
