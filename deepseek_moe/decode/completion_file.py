"""A file of completions that grows batch by batch, and that a repeated command goes on with.

It holds JSON lines of a prompt and its completion each, in the order of the prompts. FILE.run.json
beside it says what they were made with, so that nothing made otherwise gets in between.
"""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from ..errors import RunError, UserError
from ..files import check_writable, lock, write_aside

HASHED = (
    "model",
    "tokenizer",
    "prompts",
)
"""Settings that are stored as hashes: messages only name them."""


class CompletionFile:
    """What `file` holds of the completions of `prompts` with these `settings`.

    Args:
        settings: all that decides the completions, as JSON values.
        batch_size: a repeated command goes on after the last whole batch of this size.
        overwrite: begin anew, whatever is there.

    Raises:
        UserError: something else is there, or no file can be.
    """

    def __init__(
        self,
        file: Path,
        prompts: Sequence[str],
        settings: dict[str, Any],
        batch_size: int,
        overwrite: bool = False,
    ) -> None:
        self.file = check_writable(file)
        self.note = self.file.with_name(f"{self.file.name}.run.json")
        self.prompts, self.settings, self.batch_size = prompts, settings, batch_size
        self.overwrite = overwrite
        self.done = 0  # prompts whose completions are in the file
        self._size = 0  # bytes of these
        self._stream: IO[bytes] | None = None
        if not overwrite:
            self._find()

    @property
    def finished(self) -> bool:
        return self.done == len(self.prompts)

    @property
    def remedy(self) -> str:
        """How to go on after an interruption."""
        return f"repeat the command{' without --overwrite' if self.overwrite else ''} to go on"

    def start(self) -> None:
        """Claims the file for this process, and cuts off what an interrupted write left.

        Raises:
            UserError: another process is writing to it, or it cannot be written.
        """
        try:
            self._stream = self.file.open("a+b", buffering=0)
            lock(self._stream)
            if not self.overwrite:  # it may have grown since it was looked at
                self._find()
            self._stream.truncate(self._size)
            content = json.dumps({"settings": self.settings}, indent=2)
            write_aside(self.note, content + "\n")
        except BlockingIOError as error:
            raise UserError(
                f"another process is writing to {self.file}; wait for it, end it, or give another "
                "--output_file"
            ) from error
        except OSError as error:
            raise UserError(
                f"{self.file} cannot be written: {error.strerror}; give another --output_file"
            ) from error

    def add(self, completions: Sequence[str]) -> None:
        """Appends those of the next prompts, and returns when they are on the disk.

        Raises:
            RunError: they cannot be written. What was there before stays.
        """
        pairs = zip(self.prompts[self.done :], completions, strict=False)
        rows = [json.dumps(self._row(*pair), ensure_ascii=False) + "\n" for pair in pairs]
        data = memoryview("".join(rows).encode())
        left = data
        try:
            while left:  # a disk that becomes full takes a part first
                left = left[self._stream.write(left) :]
            os.fsync(self._stream.fileno())
        except OSError as error:
            with suppress(OSError):
                self._stream.truncate(self._size)
            raise RunError(
                f"{self.file} cannot be written: {error.strerror}; {self}: make room and "
                f"{self.remedy}"
            ) from error
        self.done, self._size = self.done + len(rows), self._size + len(data)

    def __str__(self) -> str:
        return f"{self.done} of {len(self.prompts)} completions are in {self.file}"

    @staticmethod
    def _row(prompt: str, completion: str) -> dict[str, str]:
        return {"prompt": prompt, "completion": completion}

    def _find(self) -> None:
        """Counts the completions that are there. Those after the last whole batch are made again,
        so that batches, and what is drawn for them, are those of an uninterrupted run."""
        data = self._read()
        if not data and not self.note.exists():
            return
        found = self._read_note()
        if data:
            self._refuse_others(found)
        lines = data.split(b"\n")[:-1]  # what follows the last line break is half of a line
        for number, line in enumerate(lines):
            if not self._is_of(line, number):
                raise UserError(
                    f"{self.file} line {number + 1} is not what this command wrote there; give "
                    "another --output_file, or add --overwrite to begin anew"
                )
        self.done = len(lines)
        if not self.finished:
            self.done -= self.done % self.batch_size
        self._size = sum(len(line) + 1 for line in lines[: self.done])

    def _read(self) -> bytes:
        if self._stream is None:
            return self.file.read_bytes() if self.file.exists() else b""
        # To open the file once more and close it would give up the lock of this process.
        self._stream.seek(0)
        return self._stream.readall()

    def _read_note(self) -> dict[str, Any]:
        try:
            return dict(json.loads(self.note.read_text(encoding="utf-8"))["settings"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            here = self.note if self.note.exists() else self.file
            raise UserError(
                f"{here} is there already, and is not of an interrupted run; give another "
                "--output_file, or add --overwrite"
            ) from error

    def _refuse_others(self, found: dict[str, Any]) -> None:
        keys = list(dict.fromkeys([*found, *self.settings]))
        differ = [key for key in keys if found.get(key) != self.settings.get(key)]
        if differ:
            shown = [
                f"other {key}" if key in HASHED
                else f"{key}: {found.get(key)} there, {self.settings.get(key)} now"
                for key in differ
            ]  # fmt: skip
            raise UserError(
                f"{self.file} holds completions of another command ({'; '.join(shown)}); repeat "
                "that one, give another --output_file, or add --overwrite"
            )

    def _is_of(self, line: bytes, number: int) -> bool:
        try:
            row = json.loads(line)
        except ValueError:
            return False
        if number >= len(self.prompts) or not isinstance(row, dict):
            return False
        completion = row.get("completion")
        return isinstance(completion, str) and row == self._row(self.prompts[number], completion)
