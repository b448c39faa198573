"""What talking and completing need beside ids: questions that fit, and text as it comes."""

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..chat import Message, render

NO_SYSTEM_PROMPT = (
    "DeepSeek-MoE's chat models were trained without a system prompt, and their authors advise "
    "against one. Say it in your first message instead."
)


def end_ids(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> set[int]:
    """Every id that ends a text: those of the tokenizer, the config and the generation config."""
    named = [tokenizer.eos_token_id, model.config.eos_token_id]
    if model.generation_config is not None:
        named.append(model.generation_config.eos_token_id)
    ids: set[int] = set()
    for some in named:
        ids |= set(some) if isinstance(some, list) else {some}
    return ids - {None}


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
