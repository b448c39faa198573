"""A file of completions that grows batch by batch, and with which a repeated command goes on.

Each line is a JSON object of a prompt and its completion, in the order of the prompts. A file
FILE.run.json beside it holds the settings that they were made with. A command with other settings
is refused.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from ..checkpoint import find_checkpoint, fingerprint
from ..errors import RunError, UserError
from ..files import check_writable, describe_differences, lock, write_aside
from ..json_file import read_object

HASHED = ("model", "tokenizer", "prompts")


def hash_inputs(model: str, prompts: Sequence[str]) -> dict[str, str]:
    """The settings in HASHED, whose values say nothing to a reader. `model` is as for `load`."""
    folder = find_checkpoint(model)
    files = [folder / name for name in ("tokenizer.json", "tokenizer_config.json")]
    tokenizer = b"".join(file.read_bytes() for file in files if file.is_file())
    return {
        "model": fingerprint(folder),
        "tokenizer": hashlib.sha256(tokenizer).hexdigest()[:16],
        "prompts": hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()[:16],
    }


class CompletionFile:
    """The completions of `prompts` that are in `file`, and a way to add more.

    Args:
        settings: all that decides the completions, as JSON values: those of `hash_inputs`, and
            the options.
        batch_size: a repeated command goes on after the last whole batch of this size.
        overwrite: begin anew, whatever the file holds.

    Raises:
        UserError: the file holds something else, or cannot be written.
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
        self.done, self._size = 0, 0  # completions that are in the file, and their bytes
        self._stream: IO[bytes] | None = None
        if not overwrite:
            self._find(self.file.read_bytes() if self.file.exists() else b"")

    @property
    def finished(self) -> bool:
        return self.done == len(self.prompts)

    @property
    def remedy(self) -> str:
        """How to go on after an interruption."""
        return f"repeat the command{' without --overwrite' if self.overwrite else ''} to go on"

    def start(self) -> None:
        """Claims the file for this process, and cuts off the rest of an interrupted write.

        Raises:
            UserError: another process is writing to it, or it cannot be written.
        """
        try:
            self._stream = self.file.open("a+b", buffering=0)
            lock(self._stream)
            if not self.overwrite:  # another process may have written since __init__
                self._stream.seek(0)  # the lock would end with a second stream of this process
                self._find(self._stream.readall())
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
        """Appends the completions of the next prompts, and returns when they are on the disk.

        Raises:
            RunError: they cannot be written. The completions before them stay.
        """
        pairs = zip(self.prompts[self.done :], completions, strict=False)
        rows = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        data = memoryview("".join(lines).encode())
        left = data
        try:
            while left:  # a disk that becomes full takes a part before it fails
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

    def _find(self, data: bytes) -> None:
        """Counts the completions of the file's `data` that stay. Those after the last whole batch
        are made again, so that the batches and their draws equal those of an uninterrupted run."""
        if not data and not self.note.exists():
            return
        found = self._read_note()
        if data:
            self._refuse_others(found)
        lines = data.split(b"\n")[:-1]  # without the part after the last line break
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

    def _read_note(self) -> dict[str, Any]:
        try:
            return dict(read_object(self.note)["settings"])
        except (ValueError, TypeError, KeyError) as error:
            here = self.note if self.note.exists() else self.file
            raise UserError(
                f"{here} is there already, and is not of an interrupted run; give another "
                "--output_file, or add --overwrite"
            ) from error

    def _refuse_others(self, found: dict[str, Any]) -> None:
        differ = describe_differences(found, self.settings, HASHED)
        if differ:
            shown = "; ".join(differ.values())
            raise UserError(
                f"{self.file} holds completions of another command ({shown}); repeat that one, "
                "give another --output_file, or add --overwrite"
            )

    def _is_of(self, line: bytes, number: int) -> bool:
        """Whether `line` is the row of the prompt with this number."""
        try:
            row = json.loads(line)
            same = row["prompt"] == self.prompts[number]
            return same and isinstance(row["completion"], str) and len(row) == 2
        except (ValueError, TypeError, LookupError, RecursionError):
            return False
