"""examples/chat.py: its commands, its memory, saved files, and a real terminal."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from example_fixtures import ENVIRONMENT, LONG, Run, Runner, assert_error
from text_fixtures import BUNDLED, ROOT

from deepseek_moe import Generator
from deepseek_moe.chat import NO_SYSTEM_PROMPT


def conversation(run: Runner, text: str, *options: object, new: int = 6) -> Run:
    done = run("chat.py", "--max_new_tokens", new, *options, stdin=text.encode())
    assert done.code == 0, done.err
    return done


def saved(run: Runner, file: Path, text: str) -> list[dict[str, str]]:
    conversation(run, f"{text}/save --overwrite {file}\n")
    return json.loads(file.read_text(encoding="utf-8"))


def test_one_shot(run: Runner) -> None:
    done = run("chat.py", "--prompt", "Who are you?", "--max_new_tokens", 6)
    assert done.code == 0
    assert done.out.strip()
    assert done.out == conversation(run, "Who are you?\n").out


def test_a_piped_conversation_has_a_memory(run: Runner, tmp_path: Path) -> None:
    messages = saved(run, tmp_path / "chat.json", "Who are you?\n\n  And I, Zoë?  \n")
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert [message["content"] for message in messages[::2]] == ["Who are you?", "And I, Zoë?"]
    out = conversation(run, "Who are you?\nAnd I, Zoë?").out
    assert out == "".join(message["content"] + "\n" for message in messages[1::2])
    assert [path.name for path in tmp_path.iterdir()] == ["chat.json"]


def test_undo_and_reset_forget(run: Runner, tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    one = saved(run, file, "One?\n")
    assert saved(run, file, "One?\nTwo?\n/undo\n") == one
    assert saved(run, file, "Two?\n/reset\nOne?\n") == one
    assert saved(run, file, "One?\nTwo?\n/undo\n/undo\n") == []
    said = conversation(run, "/undo\n/reset\n").err
    assert "nothing to undo" in said and "forgotten" in said


def test_commands_write_notes_to_stderr_only(run: Runner) -> None:
    done = conversation(run, "/system\n/system Be short.\n/help\n/help\n")
    assert done.out == ""
    assert done.err.count(NO_SYSTEM_PROMPT) == 2
    for command in ("/reset", "/undo", "/save", "/system", "/help", "Ctrl-C", "Ctrl-D"):
        assert done.err.count(command) >= 2


def test_overflow_drops_the_oldest_turns_and_says_so(
    run: Runner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lengths = []
    stream = Generator.stream

    def spy(self: Generator, prompts: list[list[int]], *args: object) -> Iterator[list[int]]:
        lengths.append(len(prompts[0]))
        return stream(self, prompts, *args)

    monkeypatch.setattr(Generator, "stream", spy)
    questions = "".join(f"{n} {'word ' * 290}\n" for n in "abcde")
    file = tmp_path / "chat.json"
    done = conversation(run, f"{questions}/save {file}\n")
    assert "the context is full: the oldest 2 messages are no longer seen" in done.err
    assert len(lengths) == 5
    assert max(lengths) <= 1024 - 6
    assert len(json.loads(file.read_text())) == 10  # what is no longer seen is still saved


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Hello\n" + LONG, "context is 1024"),
        ("/save", "file name"),
        ("/save --overwrite", "file name"),
        ("/save no/such/folder/chat.json", "no/such/folder/chat.json"),
        ("/save .", ". cannot be written"),
        ("/save ~no_such_user/x", "no_such_user"),
        ("/sav chat.json", "no command /sav; /help lists them"),
        ("Caf\udce9", "UTF-8"),
    ],
)
def test_an_error_ends_a_piped_conversation(run: Runner, text: str, said: str) -> None:
    stdin = f"{text}\nNever asked\n".encode(errors="surrogateescape")
    done = run("chat.py", "--max_new_tokens", 4, stdin=stdin)
    assert_error(done, said)
    assert len(done.out.splitlines()) <= text.count("Hello\n")


def test_save_keeps_a_file_that_is_there(run: Runner, tmp_path: Path) -> None:
    file = tmp_path / "notes.json"
    file.write_text("mine")
    done = run("chat.py", stdin=f"/save {file}\n".encode())
    assert_error(done, f"{file} is there already", "--overwrite")
    assert file.read_text() == "mine"
    assert saved(run, file, "") == []  # by /save --overwrite


class Terminal:
    """A process in a pseudo-terminal, which another Python makes, so that no fork is needed."""

    SPAWN = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"

    def __init__(self, *command: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.SPAWN, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=ENVIRONMENT | {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"},
        )
        self.raw = b""
        self.seen = 0
        threading.Thread(target=self.read, daemon=True).start()

    def read(self) -> None:
        while new := os.read(self.process.stdout.fileno(), 4096):
            self.raw += new

    @property
    def text(self) -> str:
        """All that was printed, without colours and movements of the cursor."""
        text = self.raw.decode(errors="ignore").replace("\r", "")
        return re.sub(r"\x1b(\[[0-9;?]*([A-Za-z]|$)|[=>]|$)", "", text)

    def wait(self, *patterns: str, seconds: float = 60) -> None:
        """Returns when the patterns have been printed, in this order."""
        for pattern in patterns:
            end = time.monotonic() + seconds
            while not (found := re.compile(pattern).search(self.text, self.seen)):
                assert time.monotonic() < end, f"no {pattern} in:\n{self.text}"
                assert self.process.poll() is None, f"left before {pattern}:\n{self.text}"
                time.sleep(0.05)
            self.seen = found.end()

    def type(self, keys: str) -> None:
        self.process.stdin.write(keys.encode())
        self.process.stdin.flush()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
def test_a_terminal(tmp_path: Path) -> None:
    """Ctrl-C stops an answer and keeps the chat, Ctrl-D leaves."""
    model, file = shutil.copytree(BUNDLED, tmp_path / "endless"), tmp_path / "chat.json"
    fields = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    fields["eos_token"] = fields["bos_token"]  # which the model never writes: answers go on
    (model / "tokenizer_config.json").write_text(json.dumps(fields), encoding="utf-8")
    terminal = Terminal(
        sys.executable, "examples/chat.py", "--model", str(model), "--max_new_tokens", "1000"
    )
    try:
        terminal.wait("Ctrl-D leaves", "> ")
        for question in ("Hello", "Again"):
            terminal.type(f"{question}\r")
            terminal.wait(question + r" *\n(\W*\w+){5}")
            terminal.type("\x03")
            terminal.wait(r"\(stopped\)", "> ")
        terminal.type("/save\r")
        terminal.wait("error: /save needs a file name", "> ")
        terminal.type("half a line\x03")
        terminal.wait("> ")
        terminal.type(f"/save {file}\r")
        terminal.wait("4 messages are in", "> ")
        terminal.type("\x04")
        assert terminal.process.wait(timeout=30) == 0, terminal.text
    finally:
        terminal.process.kill()
    assert "Traceback" not in terminal.text
    messages = json.loads(file.read_text(encoding="utf-8"))
    assert [message["content"] for message in messages[::2]] == ["Hello", "Again"]
    assert all(message["content"] for message in messages[1::2])
