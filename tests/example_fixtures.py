"""What the tests of the example scripts share: how a script is run, and how its error looks."""

import io
import os
import runpy
import sys
from contextlib import AbstractContextManager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import TextIO
from unittest.mock import patch

import pytest
from text_fixtures import BUNDLED, ROOT, bundled_model, tokenizer_of

from deepseek_moe import Generator
from deepseek_moe.decode.sampling import greedy

EXAMPLES = ROOT / "examples"
with patch("sys.path", [str(EXAMPLES), *sys.path]):
    from conversation import Conversation

both_scripts = pytest.mark.parametrize("script", ["completion.py", "chat.py"])
ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(ROOT),  # so that the scripts find the package without an installation too
    "PYTHONUTF8": "1",
    "PYTHONUNBUFFERED": "",  # as for most people: output may be written as late as at the exit
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
LONG = "word " * 2000  # more than the context of the bundled models


@dataclass
class Run:
    code: int
    out: str
    err: str


def piped(content: bytes | None, encoding: str = "utf-8") -> TextIO:
    """The stdin of a process into which `content` is piped; without any it is /dev/null."""
    if content is None:
        return open(os.devnull)
    read, write = os.pipe()
    with open(write, "wb") as stream:
        stream.write(content)
    return open(read, encoding=encoding)


Stdin = AbstractContextManager[TextIO | None]


def run(script: str, *args: object, stdin: Stdin | bytes | None = None) -> Run:
    """Runs an example as `python examples/...` does, but in this process, which is faster.

    `stdin` may be bytes to be piped in. `nullcontext()` is one that is closed.
    """
    code, out, err = 0, io.StringIO(), io.StringIO()
    with (
        stdin if isinstance(stdin, AbstractContextManager) else piped(stdin) as given,
        patch("sys.argv", [script, *map(str, args)]),
        patch("sys.path", [str(EXAMPLES), *sys.path]),
        patch("sys.stdin", given),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        except SystemExit as leave:
            code = leave.code or 0
    return Run(code, out.getvalue(), err.getvalue())


def assert_error(done: Run, *said: str, code: int = 2) -> None:
    """One line of error, at the end of stderr, that says all of `said`."""
    *before, last = done.err.splitlines()
    assert done.code == code, done.err
    assert "error: " in last
    assert not [words for words in said if words not in last], last
    assert not any(line.startswith("error:") for line in before)
    assert "Traceback" not in done.err


def talk(*lines: str, new: int = 6) -> Conversation:
    """A conversation of the bundled base model after these lines."""
    conversation = Conversation(Generator(bundled_model()), tokenizer_of(BUNDLED), new, greedy)
    for line in lines:
        conversation.turn(line)
    return conversation
