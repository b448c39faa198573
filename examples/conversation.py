"""The conversation of chat.py: its commands, its answers, and its prompt in a terminal."""

import argparse
import json
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.formatted_text import ANSI
from prompt_toolkit.output.defaults import create_output
from shared_options import load_model, sampling_arguments, standard_input
from transformers import PreTrainedTokenizerBase

from deepseek_moe import Generator
from deepseek_moe.bundled import BUNDLED_CHAT_MODEL
from deepseek_moe.chat import Message
from deepseek_moe.decode.prompts import check_prompt, noted_interrupts
from deepseek_moe.decode.sampling import Sampler, Sampling
from deepseek_moe.decode.texts import NO_SYSTEM_PROMPT, TextStream, end_ids, render_within
from deepseek_moe.errors import UserError, as_user_error
from deepseek_moe.files import write_text

HELP = """\
/reset      forget the conversation
/undo       forget the last question and its answer
/retry      ask the last question again
/save FILE  write the conversation as JSON; /save --overwrite FILE if it is there already
/load FILE  go on with a conversation that was saved
/system     about system prompts
/help       this list
/exit       leave
Ctrl-C stops an answer, Ctrl-D leaves."""


def talk(args: argparse.Namespace) -> None:
    """Answers the question of the command line, or each line of stdin."""
    if args.prompt is not None:
        check_prompt(args.prompt)
    else:
        lines = standard_input()
    sample = Sampling(**sampling_arguments(args))
    name = args.model or str(BUNDLED_CHAT_MODEL)
    model, tokenizer = load_model(args, name)
    note(f"talking to {name}" + (f" with {args.adapter}" if args.adapter else ""))
    if named_base(name) and not args.adapter:
        note("by its name it is a base model: it continues texts, and was not taught to chat")
    conversation = Conversation(Generator(model), tokenizer, args.max_new_tokens, sample)
    if args.prompt is not None:
        conversation.ask(args.prompt)
        return
    interactive = lines.isatty()
    for line in typed_lines() if interactive else lines:
        if line.strip() in ("/exit", "/quit"):
            return
        try:
            conversation.turn(line.strip())
        except UserError as error:
            if not interactive:
                raise
            note(f"error: {error}")


def named_base(model: str) -> bool:
    """Whether "base" is a word in the name of a folder or hub id.

    Files do not tell: a base model may have the chat template too, as every checkpoint has that
    this code writes.
    """
    return "base" in re.split("[^a-z0-9]+", Path(model).expanduser().resolve().name.lower())


class Conversation:
    """Messages to and from a model.

    Args:
        tell: takes what is said beside the answers.

    Attributes:
        ids: what the model has last seen and made: a prompt, and from `begin` on its answer.
    """

    def __init__(
        self,
        generator: Generator,
        tokenizer: PreTrainedTokenizerBase,
        max_new_tokens: int,
        sample: Sampler,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self.generator, self.tokenizer, self.sample = generator, tokenizer, sample
        self.max_new_tokens = max_new_tokens
        # An answer may take up to half of the context; the messages before it get the rest.
        self.room = generator.context - min(max_new_tokens, generator.context // 2)
        self.messages: list[Message] = []
        self.dropped = 0
        self.tell = tell or note
        self.ids: list[int] = []
        self.begin = 0

    def turn(self, line: str) -> None:
        """Answers a question, or obeys a /command."""
        command, _, rest = line.partition(" ")
        if command == "/reset":
            self.messages, self.dropped = [], 0
            note("the conversation is forgotten")
        elif command == "/undo":
            note("the last turn is forgotten" if self.messages else "there is nothing to undo")
            del self.messages[-2:]
        elif command == "/retry":
            self.retry()
        elif command == "/save":
            self.save(rest.strip())
        elif command == "/load":
            self.load(rest.strip())
        elif command == "/system":
            note(NO_SYSTEM_PROMPT)
        elif command == "/help":
            note(HELP)
        elif command.startswith("/"):
            raise UserError(f"there is no command {command}; /help lists them")
        elif line:
            self.ask(line)

    def ask(self, question: str) -> None:
        """Prints the answer as it is made. Ctrl-C ends it early and keeps what was printed.

        Raises:
            UserError: the question is refused, and not kept.
        """
        try:
            with noted_interrupts(signal.SIGINT) as interrupted:
                for piece in self.stream(question, lambda: bool(interrupted)):
                    print(piece, end="", flush=True)
        except KeyboardInterrupt:  # pressed again, before the next token
            self.tell(" (stopped)")
        print(flush=True)

    def stream(self, question: str, stopped: Callable[[], bool]) -> Iterator[str]:
        """The answer, a piece for each token. `messages` and `ids` hold it as far as it has come.

        Args:
            stopped: is asked after each token, and ends the answer early.

        Raises:
            UserError: the question is refused, or the model fails. The question is not kept.
        """
        before = self.messages
        asked = [*before, {"role": "user", "content": check_prompt(question)}]
        prompt, dropped = render_within(self.tokenizer, asked, self.room)
        stop = end_ids(self.tokenizer, self.generator.model)
        steps = self.generator.stream([prompt], self.max_new_tokens, self.sample, stop)
        if dropped > self.dropped:
            self.tell(f"the context is full: the oldest {dropped} messages are no longer seen")
        self.dropped = dropped
        answer, text, why = {"role": "assistant", "content": ""}, TextStream(self.tokenizer), ""
        self.messages, self.ids, self.begin = [*asked, answer], [*prompt], len(prompt)
        try:
            for (token,) in steps:
                self.ids.append(token)
                piece = text.add(token)
                piece = piece if answer["content"] else piece.lstrip()
                answer["content"] += piece
                yield piece
                if stopped():
                    why = "stopped"
                    break
        except UserError:
            self.messages = before
            raise
        if not why and len(self.ids) - self.begin == self.max_new_tokens:
            why = f"cut after --max_new_tokens {self.max_new_tokens}"
        if not why and len(self.ids) == self.generator.context:
            why = f"cut: the context of {self.generator.context} tokens is full"
        if why:
            self.tell(f" ({why})")

    def retry(self) -> None:
        """Asks the last question again. If it is refused, the old answer stays."""
        if not self.messages:
            raise UserError("there is no question yet")
        before = self.messages
        self.messages = before[:-2]
        try:
            self.ask(before[-2]["content"])
        except UserError:
            self.messages = before
            raise

    def load(self, name: str) -> None:
        """Takes a conversation of `save` in place of this one."""
        what = f"{name or 'no file'} is no conversation that /save has written"
        with as_user_error(what, "give its file: /load FILE"):
            messages = json.loads(Path(name).expanduser().read_text(encoding="utf-8"))
            roles = [message["role"] for message in messages]
            texts = [message["content"] for message in messages]
            if roles != ["user", "assistant"] * (len(roles) // 2):
                raise ValueError("questions and answers do not take turns")
            if not all(isinstance(text, str) for text in texts):
                raise ValueError("a message is no text")
            "".join(texts).encode()  # raises where a text has half a character
        both = zip(roles, texts, strict=True)
        self.messages = [{"role": role, "content": text} for role, text in both]
        self.dropped = 0
        note(f"{len(messages)} messages are loaded")

    def save(self, name: str) -> None:
        first, _, rest = name.partition(" ")
        overwrite = first == "--overwrite"
        name = rest.strip() if overwrite else name
        if not name:
            raise UserError("/save needs a file name")
        text = json.dumps(self.messages, ensure_ascii=False, indent=2)
        file = write_text(name, text + "\n", overwrite)
        note(f"{len(self.messages)} messages are in {file}")


def typed_lines() -> Iterator[str]:
    """Lines typed in a terminal, with editing and history. Ctrl-C drops a line, Ctrl-D ends."""
    note(HELP)
    session = PromptSession(output=create_output(stdout=sys.stderr))
    while True:
        try:
            yield session.prompt(ANSI("\x1b[1;32m> \x1b[0m"))
        except KeyboardInterrupt:
            continue
        except EOFError:
            return


def note(text: str) -> None:
    """Prints `text` dimmed on stderr."""
    dim, plain = ("\x1b[2m", "\x1b[0m") if sys.stderr.isatty() else ("", "")
    print(f"{dim}{text}{plain}", file=sys.stderr)
