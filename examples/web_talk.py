"""What web_chat.py does beside its page: answers in a tab's conversation, and their experts."""

import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from conversation import Conversation
from transformers import PreTrainedTokenizerBase

from deepseek_moe import Generator
from deepseek_moe.chat import Message
from deepseek_moe.decode.sampling import Sampling
from deepseek_moe.decode.texts import TextStream
from deepseek_moe.errors import UserError, as_user_error, first_words
from deepseek_moe.experts import coloured_text, heatmap
from deepseek_moe.experts.measure import picked_experts, router_profile

SHOWN_EVERY = 0.05  # seconds; to send each token would hold up an engine that makes hundreds


@dataclass
class Talk:
    """The conversation of one browser tab.

    Attributes:
        messages: of the conversation, the last answer as far as it has come.
        ids: what the model has last seen and made: a prompt, and from `begin` on its answer.
        question: what is asked, after the first `kept` messages.
        stopped: whether the answer shall end now.
    """

    messages: list[Message] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    begin: int = 0
    question: str = ""
    kept: int = 0
    stopped: bool = False

    def ask(self, question: str) -> None:
        self.question, self.kept, self.stopped = question, len(self.messages), False

    def retry(self) -> None:
        """Asks the last question again. The old answer stays until there is a new one."""
        self.ask(self.messages[-2]["content"] if self.messages else "")
        self.kept = max(0, self.kept - 2)

    def stop(self) -> None:
        self.stopped = True

    def clear(self) -> None:
        self.messages, self.ids = [], []

    @property
    def shown(self) -> list[Message]:
        """What the page shows before the answer begins."""
        asked = [{"role": "user", "content": self.question}] if self.question else []
        return self.messages[: self.kept] + asked


class Answerer:
    """The model behind the page. It does one thing at a time.

    Args:
        name: of the model, as it is shown.
        options: the arguments of `Sampling` that the page does not set.
    """

    def __init__(
        self,
        generator: Generator,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        options: dict[str, Any],
    ) -> None:
        self.generator, self.tokenizer, self.name = generator, tokenizer, name
        self.options = options
        self.closed = False  # ends the answer that is being made
        self.sample = Sampling(**options)

    def answer(
        self, talk: Talk, temperature: float, top_p: float, top_k: int, max_new_tokens: int
    ) -> Iterator[tuple[list[Message], str, str]]:
        """Answers the question of `talk`.

        An error leaves the conversation as it was, and gives the question back.

        Yields:
            The messages, a line that is said beside them, and the question if it was refused.
        """
        notes: list[str] = []
        try:
            with as_user_error("a setting is no number", "give a number"):
                settings = {"temperature": float(temperature), "top_p": float(top_p)}
                settings["top_k"], most = int(top_k), int(max_new_tokens)
            sample = self._sampling(self.options | settings)
            talking = Conversation(self.generator, self.tokenizer, most, sample, notes.append)
            talking.messages, shown = talk.messages[: talk.kept], 0.0
            for _ in talking.stream(talk.question, lambda: talk.stopped or self.closed):
                if monotonic() - shown > SHOWN_EVERY:
                    yield talking.messages, " ".join(notes), ""
                    shown = monotonic()
            talk.messages, talk.ids, talk.begin = talking.messages, talking.ids, talking.begin
            yield talk.messages, " ".join(notes), ""
        except Exception as error:  # The next question may be answered.
            yield talk.messages, one_line(error), talk.question

    def _sampling(self, options: dict[str, Any]) -> Sampling:
        """The one before if its options are the same: the engine captures a graph for each."""
        if any(getattr(self.sample, name) != value for name, value in options.items()):
            self.sample = Sampling(**options)
        return self.sample

    def experts_page(self, talk: Talk) -> str:
        """A page in HTML of the experts that the last answer and all before it used.

        It takes one plain forward pass over the ids.

        Raises:
            UserError: the model has no routed experts.
        """
        model, begin = self.generator.model, talk.begin
        picks = picked_experts(model, talk.ids)
        if not picks:
            raise UserError("the model has no routed experts; talk to a mixture of experts")
        num_experts = model.config.n_routed_experts
        parts = {"conversation": 0, "last answer": begin}
        profiles = {
            name: router_profile(picks, num_experts, at, self.name)
            for name, at in parts.items()
            if at < len(talk.ids)
        }
        tokens = texts_of(talk.ids, self.tokenizer)
        text = coloured_text.as_html(tokens, picks, num_experts, begin)
        return heatmap.page(profiles, text)


def texts_of(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each token. A character of several tokens is the text of the first of them."""
    marks = {tokenizer.bos_token_id: "<BOS>", tokenizer.eos_token_id: "<EOS>"}
    stream, texts, first = TextStream(tokenizer), [""] * len(ids), 0
    for at, token in enumerate(ids):
        piece = marks.get(token) or stream.add(token)
        texts[first] += piece
        first = at + 1 if piece else first
    return texts


def one_line(error: Exception) -> str:
    """What the page says about an error. One that is not the user's goes to stderr in full."""
    if not isinstance(error, UserError):
        traceback.print_exception(error)
    return f"error: {first_words(error)}"
