"""A file of completions: interrupted writes are gone on with, and other files are kept."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from text_fixtures import BUNDLED

from deepseek_moe.decode.completion_file import CompletionFile, hash_inputs
from deepseek_moe.errors import RunError, UserError

PROMPTS = ["The old man", "Once", "It was\nlate", "Ein Zug fährt", "The king"]
SETTINGS = {"model": "ab12", "prompts": "cd34", "temperature": 0.0, "seed": None}


def opened(file: Path, overwrite: bool = False, **changes: Any) -> CompletionFile:
    return CompletionFile(file, PROMPTS, SETTINGS | changes, batch_size=2, overwrite=overwrite)


def filled(file: Path, overwrite: bool = False) -> CompletionFile:
    """The file after all batches of a command."""
    output = opened(file, overwrite)
    output.start()
    while not output.finished:
        output.add([prompt.upper() for prompt in PROMPTS[output.done :][:2]])
    return output


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def test_each_line_is_a_prompt_and_its_completion(file):
    output = filled(file)
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert rows == [{"prompt": prompt, "completion": prompt.upper()} for prompt in PROMPTS]
    assert str(output) == f"5 of 5 completions are in {file}"
    assert opened(file).finished


@pytest.mark.parametrize("cut", [0, 1, 20, -1])
def test_half_a_line_of_a_killed_write_is_made_again(file, cut):
    """The third completion is made again too, because its batch is not complete."""
    filled(file)
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:3]) + lines[3][:cut])
    assert opened(file).done == 2
    filled(file)
    assert file.read_bytes() == whole


def test_another_command_does_not_go_on_in_the_file(file):
    filled(file)
    change = {"model": "ef56", "seed": 1}
    said = r"of another command \(other model; seed: None there, 1 now\); .*--overwrite"
    with pytest.raises(UserError, match=said):
        opened(file, **change)
    opened(file, overwrite=True, **change)


def test_model_tokenizer_and_prompts_are_told_apart(tmp_path):
    copy = shutil.copytree(BUNDLED, tmp_path / "copy")
    before = hash_inputs(str(BUNDLED), ["a"])
    assert hash_inputs(str(copy), ["a"]) == before
    with (copy / "tokenizer_config.json").open("a", encoding="utf-8") as config:
        config.write("\n")
    assert hash_inputs(str(copy), ["b"]).items() & before.items() == {("model", before["model"])}
    chat = hash_inputs(str(BUNDLED.with_name("tiny-chat")), ["a"])
    assert chat["model"] != before["model"] and chat["prompts"] == before["prompts"]


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.run.json"])
def test_a_file_of_the_user_is_kept_unless_it_may_be_overwritten(file, name):
    mine = file.with_name(name)
    mine.write_text("mine")
    with pytest.raises(UserError, match=f"{mine} is there already.*--overwrite"):
        opened(file)
    assert [(one.name, one.read_text()) for one in file.parent.iterdir()] == [(name, "mine")]
    assert "without --overwrite" in filled(file, overwrite=True).remedy
    assert opened(file).finished


@pytest.mark.parametrize("line", ["3\n", '{"prompt": "Once", "completion": 3}\n', "no JSON\n"])
def test_a_file_that_was_changed_is_kept(file, line):
    filled(file)
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, text in ((2, [lines[0], line, *lines[2:]]), (6, [*lines, lines[0]])):
        file.write_text("".join(text), encoding="utf-8")
        with pytest.raises(UserError, match=f"line {number} is not what this command wrote"):
            opened(file)
        assert file.read_text(encoding="utf-8") == "".join(text)


def test_one_process_at_a_time_writes_the_file(file):
    lock = "import fcntl, sys; f = open(sys.argv[1], 'a'); "
    lock += "fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB); print(flush=True); input()"
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", lock, file], **pipes) as other:
        other.stdout.readline()
        for overwrite in (False, True):
            with pytest.raises(UserError, match=f"another process is writing to {file}"):
                opened(file, overwrite).start()
        other.communicate(b"\n")
    output = opened(file)
    output.start()
    output.add(["x", "y"])  # the lock is still held after the file was read and written
    done = subprocess.run([sys.executable, "-c", lock, file], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].startswith("BlockingIOError")


def test_a_full_disk_keeps_what_is_there(file):
    output = opened(file)
    output.start()
    output.add(["a", "b"])
    before = file.read_bytes()
    said = f"no room; 2 of 5 completions are in {file}: make room and repeat the command to go on"
    with patch("os.fsync", side_effect=OSError(28, "no room")), pytest.raises(RunError, match=said):
        output.add(["c", "d"])
    assert file.read_bytes() == before
    filled(file)
    assert opened(file).finished


@pytest.mark.parametrize("name", ["missing/out.jsonl", ".", "/dev/null"])
def test_a_file_that_cannot_be_written(tmp_path, name):
    with pytest.raises(UserError, match="cannot be written"):
        opened(tmp_path / name, overwrite=True)
    assert not list(tmp_path.iterdir())
    assert Path("/dev/null").is_char_device()
