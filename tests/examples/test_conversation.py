"""examples/chat.py: its commands, its memory, saved files, and a real terminal."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest.mock import patch

import pytest
from example_fixtures import ENVIRONMENT, EXAMPLES, LONG, assert_error, run
from text_fixtures import BUNDLED, ROOT, bundled_model, tokenizer_of

from deepseek_moe import Generator
from deepseek_moe.chat import NO_SYSTEM_PROMPT
from deepseek_moe.decode.sampling import greedy
from deepseek_moe.errors import UserError

with patch("sys.path", [str(EXAMPLES), *sys.path]):
    from conversation import Conversation


def talk(*lines: str) -> Conversation:
    """A conversation after these lines."""
    conversation = Conversation(Generator(bundled_model()), tokenizer_of(BUNDLED), 6, greedy)
    for line in lines:
        conversation.turn(line)
    return conversation


def test_a_piped_conversation_has_a_memory(tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    text = f"Who are you?\n\n  And I, Zoë?  \n/save {file}\n"
    done = run("chat.py", "--max_new_tokens", 6, stdin=text.encode())
    assert done.code == 0, done.err
    messages = json.loads(file.read_text(encoding="utf-8"))
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert [message["content"] for message in messages[::2]] == ["Who are you?", "And I, Zoë?"]
    answers = [message["content"] for message in messages[1::2]]
    assert done.out == "".join(f"{answer}\n" for answer in answers)
    assert [path.name for path in tmp_path.iterdir()] == ["chat.json"]
    alone = run("chat.py", "--prompt", "Who are you?", "--max_new_tokens", 6)
    assert alone.out == answers[0] + "\n" != "\n"


def test_undo_and_reset_forget(capsys: pytest.CaptureFixture[str]) -> None:
    one = talk("One?").messages
    assert len(one) == 2
    assert talk("One?", "Two?", "/undo").messages == one
    assert talk("Two?", "/reset", "One?").messages == one
    assert talk("One?", "Two?", "/undo", "/undo", "/undo").messages == []
    said = capsys.readouterr().err
    assert "nothing to undo" in said and "conversation is forgotten" in said


def test_commands_write_notes_to_stderr_only(capsys: pytest.CaptureFixture[str]) -> None:
    talk("/system", "/system Be short.", "/help")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count(NO_SYSTEM_PROMPT) == 2
    for command in ("/reset", "/undo", "/save", "/system", "/help", "Ctrl-C", "Ctrl-D"):
        assert command in err


def test_overflow_drops_the_oldest_turns_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with patch.object(Generator, "stream", return_value=[[5]]) as stream:
        conversation = talk(*(f"{n} {'word ' * 290}" for n in "abcde"))
    assert "the context is full: the oldest 2 messages are no" in capsys.readouterr().err
    lengths = [len(call.args[0][0]) for call in stream.call_args_list]
    assert len(lengths) == 5
    assert 512 < max(lengths) <= 1024 - 6
    assert len(conversation.messages) == 10  # what is no longer seen is still saved


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Hello\n" + LONG, "context is 1024"),
        ("/sav chat.json", "no command /sav; /help lists them"),
        ("Caf\udce9", "UTF-8"),
    ],
)
def test_an_error_ends_a_piped_conversation(text: str, said: str) -> None:
    stdin = f"{text}\nNever asked\n".encode(errors="surrogateescape")
    done = run("chat.py", "--max_new_tokens", 4, stdin=stdin)
    assert_error(done, said)
    assert len(done.out.splitlines()) <= text.count("Hello\n")


def test_save_takes_the_name_of_a_new_file(tmp_path: Path) -> None:
    file = tmp_path / "notes.json"
    file.write_text("mine")
    for line, said in (
        ("/save", "file name"),
        ("/save --overwrite", "file name"),
        ("/save .", ". cannot be written"),
        ("/save ~no_such_user/x", "no_such_user"),
        (f"/save {file}", f"{file} is there already.*--overwrite"),
    ):
        with pytest.raises(UserError, match=said):
            talk(line)
    assert file.read_text() == "mine"
    talk(f"/save --overwrite {file}")
    assert json.loads(file.read_text()) == []


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
