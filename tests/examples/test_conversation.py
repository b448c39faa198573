"""examples/chat.py: its commands, its memory, saved files, and a real terminal."""

import json
import os
import re
import signal
from unittest.mock import patch

import pytest
import torch
from example_fixtures import LONG, assert_error, run, talk
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input

from deepseek_moe import Generator
from deepseek_moe.decode.sampling import greedy
from deepseek_moe.decode.texts import NO_SYSTEM_PROMPT
from deepseek_moe.errors import UserError


def test_a_piped_conversation_has_a_memory(tmp_path):
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


def test_undo_and_reset_forget(capsys):
    one = talk("One?").messages
    assert len(one) == 2
    assert talk("One?", "Two?", "/undo").messages == one
    assert talk("Two?", "/reset", "One?").messages == one
    assert talk("One?", "Two?", "/undo", "/undo", "/undo").messages == []
    said = capsys.readouterr().err
    assert "nothing to undo" in said and "conversation is forgotten" in said


def test_commands_write_notes_to_stderr_only(capsys):
    talk("/system", "/system Be short.", "/help")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count(NO_SYSTEM_PROMPT) == 2
    for command in ("/reset", "/undo", "/save", "/system", "/help", "Ctrl-C", "Ctrl-D"):
        assert command in err


def test_overflow_drops_the_oldest_turns_and_says_so(capsys):
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
def test_an_error_ends_a_piped_conversation(text, said):
    stdin = f"{text}\nNever asked\n".encode(errors="surrogateescape")
    done = run("chat.py", "--max_new_tokens", 4, stdin=stdin)
    assert_error(done, said)
    assert len(done.out.splitlines()) <= text.count("Hello\n")


def test_save_takes_the_name_of_a_new_file(tmp_path):
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


def test_a_terminal(tmp_path):
    """Ctrl-C drops half a line and an error is only shown, while Ctrl-D leaves."""
    file = tmp_path / "chat.json"
    with create_pipe_input() as keys, create_app_session(input=keys):
        keys.send_text(f"Hello\r/save\rhalf a line\x03/save {file}\r\x04")
        done = run("chat.py", "--max_new_tokens", 6, stdin=os.fdopen(os.openpty()[1]))
    assert done.code == 0, done.err
    said = ["Ctrl-D leaves", "error: /save needs a file name", "2 messages are in"]
    assert re.search(".*".join(said), done.err, flags=re.DOTALL), done.err
    messages = json.loads(file.read_text(encoding="utf-8"))
    assert messages[0]["content"] == "Hello"
    assert done.out == messages[1]["content"] + "\n"


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_stops_an_answer_and_keeps_the_chat(presses, capsys):
    conversation = talk("Again")
    whole = conversation.messages.pop()["content"]
    calls = []

    def interrupted(logits: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        calls.append(len(logits))
        for _ in range(presses if len(calls) == 3 else 0):
            os.kill(os.getpid(), signal.SIGINT)
        return greedy(logits, seen)

    conversation.sample = interrupted
    for _ in range(2):
        conversation.messages.clear()
        calls.clear()
        conversation.turn("Again")
        answer = conversation.messages[-1]["content"]
        assert answer and answer != whole and whole.startswith(answer)
    out, err = capsys.readouterr()
    assert err.count("(stopped)") == 2
    assert out.splitlines() == [whole, answer, answer]
