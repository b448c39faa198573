"""Prompts from a command line or a file, and their completion in batches that signals can stop."""

import hashlib
import json
import signal
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel

from ..errors import UserError
from .completion_file import CompletionFile
from .generation import Generator, columns
from .sampling import Prompts, Sampler, Sampling


def read_prompts(given: Sequence[str], file: Path | None) -> list[str]:
    """The `given` prompts, then those of `file`, or one default prompt if there are none.

    Each line of the file is a prompt: plain text, a JSON string, or a JSON object with a "prompt".
    Empty lines are skipped.

    Raises:
        UserError: a prompt is empty or not text, or the file cannot be read.
    """
    prompts = list(given)
    if file:
        try:
            lines = file.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file} cannot be read: {error}; give a UTF-8 text file") from error
        prompts += [_parse(line, f"{file} line {n}") for n, line in enumerate(lines, 1) if line]
        if not prompts:
            raise UserError(f"{file} is empty; write one prompt a line")
    return [check_prompt(prompt) for prompt in prompts or ["Once upon a time"]]


def _parse(line: str, where: str) -> str:
    if line[0] not in '{"':
        return line
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        if line[0] == '"':  # plain text may begin with a quotation mark
            return line
        raise UserError(f'{where} is no JSON ({error}); write {{"prompt": "..."}}') from error
    prompt = row.get("prompt") if isinstance(row, dict) else row
    if not isinstance(prompt, str):
        raise UserError(f'{where} has no text under "prompt"; write {{"prompt": "..."}}')
    return prompt


def check_prompt(prompt: str) -> str:
    """Returns `prompt`, or raises a UserError if it is empty or not text."""
    if not prompt.strip():
        raise UserError("the prompt is empty; give it some text")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the prompt {prompt[:40]!a} is not UTF-8; convert it") from error
    return prompt


class TimedGenerator(Generator):
    """A Generator that notes when tokens come: the first one of all, and how fast they come when
    kernels are compiled and a graph is captured. Both happen with the first SETTLING of a batch."""

    SETTLING = 3

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.made, self.settled = 0, 0  # tokens: all, and those after the settling ones
        self.first: float | None = None
        self.seconds = self.settled_seconds = 0.0

    def stream(self, prompts: Prompts, *args: Any, **kwargs: Any) -> Iterator[list[int | None]]:
        return self._noted(super().stream(prompts, *args, **kwargs))

    def _noted(self, steps: Iterator[list[int | None]]) -> Iterator[list[int | None]]:
        start = before = time.perf_counter()
        for number, step in enumerate(steps, 1):
            now, count = time.perf_counter(), sum(token is not None for token in step)
            self.made += count
            self.first = now - start if self.first is None else self.first
            if number > self.SETTLING:
                self.settled += count
                self.settled_seconds += now - before
            self.seconds += now - before
            before = now
            yield step

    def __str__(self) -> str:
        said = f"{self.made} tokens in {self.seconds:.2f} s"
        if self.first is not None:
            said += f", the first after {self.first:.2f} s"
        if self.settled:
            said += f"; then {self.settled / self.settled_seconds:.1f} tokens/s"
        return said


def complete_in_batches(
    generator: Generator,
    prompts: Prompts,
    max_new_tokens: int,
    sample: Sampler,
    stop_ids: Collection[int],
    batch_size: int,
    output: CompletionFile | None = None,
) -> Iterator[tuple[int, list[list[int]]]]:
    """Completes the prompts that `output` does not hold yet, with a progress bar.

    Ctrl-C and SIGTERM end the process, but only between two tokens, and say how to go on.

    Yields:
        For each batch, the index of its first prompt, and the new ids of each of its prompts.
    """
    begin = 0
    if output:
        output.start()
        begin = output.done
    bar = tqdm(total=len(prompts), initial=begin, unit="prompt", disable=len(prompts) <= batch_size)
    with noted_interrupts(signal.SIGINT, signal.SIGTERM) as stopped, bar:
        for at in range(begin, len(prompts), batch_size):
            if isinstance(sample, Sampling) and sample.seed is not None:
                # A seed for each batch, so that its draws do not depend on the batches before.
                digest = hashlib.sha256(f"{sample.seed} {at // batch_size}".encode()).digest()
                seed = int.from_bytes(digest[:8], "big") >> 1
                sample.generator(generator.model.device).manual_seed(seed)
            batch = prompts[at : at + batch_size]
            steps = generator.stream(batch, max_new_tokens, sample, stop_ids)
            new = columns(takewhile(lambda _: not stopped, steps), len(batch))
            if stopped:
                break
            yield at, new
            bar.update(len(batch))
        else:
            return
    if output:
        print(f"stopped: {output}; {output.remedy}", file=sys.stderr)
    sys.exit(128 + stopped[0])


@contextmanager
def noted_interrupts(*numbers: int) -> Iterator[list[int]]:
    """Appends signals of these numbers to the list that it yields, to be looked at between tokens.

    A second signal raises KeyboardInterrupt. The first one does not, because an exception may come
    at any place, and Python drops one that comes in a destructor.
    """
    noted: list[int] = []

    def note(number: int, frame: object) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
