"""The chat format: messages to ids, and ids to text.

    <BOS>User: {question}

    Assistant: {answer}<EOS>User: {question}

    Assistant:

Training and chatting both use `render`, so that the model is asked in the words in which it was
taught. The Jinja template for other engines (CHAT_TEMPLATE in model/tokenization_deepseek.py, and
chat_template.jinja in checkpoints) gives the same ids, which tests/test_chat.py compares.
"""

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from .errors import UserError

Message = dict[str, str]

NO_SYSTEM_PROMPT = (
    "DeepSeek-MoE's chat models were trained without a system prompt, and their authors advise "
    "against one. Say it in your first message instead."
)


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    add_generation_prompt: bool = False,
) -> tuple[list[int], list[int]]:
    """A conversation as ids, and a mask of the ids to train on (1 for answers and their EOS).

    Questions and answers are encoded apart, so that the mask is exact. Special tokens in them are
    encoded as ordinary text, so that nobody can end a turn by typing one.

    Args:
        messages: dicts of `role` (user or assistant; system works too, but see NO_SYSTEM_PROMPT)
            and `content`.
        add_generation_prompt: end with the words that ask for an answer.

    Raises:
        UserError: a role is unknown, a content is not text, or the tokenizer lacks BOS or EOS.
    """
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no BOS or no EOS, which a conversation needs; name both")
    ids, mask = [tokenizer.bos_token_id], [0]

    def add(text: str, trained: int) -> None:
        new = tokenizer.encode(
            text, add_special_tokens=False, split_special_tokens=True, verbose=False
        )
        ids.extend(new)
        mask.extend([trained] * len(new))

    for number, message in enumerate(messages, 1):
        role, content = message.get("role"), message.get("content")
        if not isinstance(content, str):
            raise UserError(f"message {number} has content {content!r}; it must be text")
        if role == "user":
            add(f"User: {content}\n\n", 0)
        elif role == "assistant":
            add("Assistant:", 0)
            add(f" {content}", 1)
            ids.append(tokenizer.eos_token_id)
            mask.append(1)
        elif role == "system":
            add(f"{content}\n\n", 0)
        else:
            raise UserError(f"message {number} has role {role!r}; use user, assistant or system")
    if add_generation_prompt:
        add("Assistant:", 0)
    return ids, mask


def render_within(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], room: int
) -> tuple[list[int], int]:
    """The ids of a conversation that asks for an answer, in at most `room` ids.

    The oldest turns (a question and its answer) are left out as needed. The last question always
    stays, even if it alone exceeds `room`.

    Returns:
        The ids, and how many messages from the start were left out.
    """
    dropped = 0
    ids, _ = render(tokenizer, messages, add_generation_prompt=True)
    while len(ids) > room and dropped < len(messages) - 1:
        dropped += 1
        while messages[dropped]["role"] != "user" and dropped < len(messages) - 1:
            dropped += 1
        ids, _ = render(tokenizer, messages[dropped:], add_generation_prompt=True)
    return ids, dropped


class TextStream:
    """Turns ids into text as they come, in whole characters, since a token may end inside one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer.backend_tokenizer
        self.stream = DecodeStream(skip_special_tokens=True)

    def add(self, token: int) -> str:
        """The text that `token` completes; often empty."""
        return self.stream.step(self.tokenizer, token) or ""
