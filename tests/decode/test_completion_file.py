"""A file of completions: interrupted writes are gone on with, and other files are kept."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

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


def test_each_line_is_a_prompt_and_its_completion(file: Path) -> None:
    output = filled(file)
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert rows == [{"prompt": prompt, "completion": prompt.upper()} for prompt in PROMPTS]
    assert str(output) == f"5 of 5 completions are in {file}"
    before = file.stat().st_mtime_ns
    assert opened(file).finished
    assert file.stat().st_mtime_ns == before


@pytest.mark.parametrize("cut", [0, 1, 20, -1])
def test_half_a_line_of_a_killed_write_is_made_again(file: Path, cut: int) -> None:
    """The third completion is made again too, because its batch is not complete."""
    filled(file)
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:3]) + lines[3][:cut])
    assert opened(file).done == 2
    filled(file)
    assert file.read_bytes() == whole


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompts": "ef56"}, "other prompts"),
        ({"model": "ef56"}, "other model"),
        ({"temperature": 0.5}, "temperature: 0.0 there, 0.5 now"),
        ({"seed": 1, "model": "x"}, "other model; seed: None there, 1 now"),
    ],
)
def test_another_command_does_not_go_on_in_the_file(
    file: Path, change: dict[str, Any], said: str
) -> None:
    filled(file)
    with pytest.raises(UserError, match=rf"of another command \({said}\); .*--overwrite"):
        opened(file, **change)
    opened(file, overwrite=True, **change)


def test_model_tokenizer_and_prompts_are_told_apart(tmp_path: Path) -> None:
    before = hash_inputs(str(BUNDLED), ["a"])

    def changed(*inputs: Any) -> list[str]:
        after = hash_inputs(*inputs)
        return [name for name, value in before.items() if after[name] != value]

    assert changed(str(BUNDLED), ["b"]) == ["prompts"]
    assert "model" in changed(str(BUNDLED.with_name("tiny-chat")), ["a"])
    copy = shutil.copytree(BUNDLED, tmp_path / "copy")
    assert changed(str(copy), ["a"]) == []
    config = copy / "tokenizer_config.json"
    config.write_text(config.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert changed(str(copy), ["a"]) == ["tokenizer"]


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.run.json"])
def test_a_file_of_the_user_is_kept_unless_it_may_be_overwritten(file: Path, name: str) -> None:
    mine = file.with_name(name)
    mine.write_text("mine")
    with pytest.raises(UserError, match=f"{mine} is there already.*--overwrite"):
        opened(file)
    assert [(one.name, one.read_text()) for one in file.parent.iterdir()] == [(name, "mine")]
    assert "without --overwrite" in filled(file, overwrite=True).remedy
    assert opened(file).finished


@pytest.mark.parametrize("line", ["{}\n", '{"prompt": "Once", "completion": 3}\n', "no JSON\n"])
def test_a_file_that_was_changed_is_kept(file: Path, line: str) -> None:
    filled(file)
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, text in ((2, [lines[0], line, *lines[2:]]), (6, [*lines, lines[0]])):
        file.write_text("".join(text), encoding="utf-8")
        with pytest.raises(UserError, match=f"line {number} is not what this command wrote"):
            opened(file)
        assert file.read_text(encoding="utf-8") == "".join(text)


def test_one_process_at_a_time_writes_the_file(file: Path) -> None:
    hold = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); "
    hold += "print(flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", hold, file], **pipes) as other:
        other.stdout.readline()
        for overwrite in (False, True):
            with pytest.raises(UserError, match=f"another process is writing to {file}"):
                opened(file, overwrite).start()
        other.communicate(b"\n")
    output = opened(file)
    output.start()
    output.add(["x", "y"])  # the lock is still held after the file was read and written
    lock = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    done = subprocess.run([sys.executable, "-c", lock, file], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].startswith("BlockingIOError")


def test_a_full_disk_keeps_what_is_there(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = opened(file)
    output.start()
    output.add(["a", "b"])
    before = file.read_bytes()

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(RunError, match="No space left") as caught:
        patch.setattr(os, "fsync", full)
        output.add(["c", "d"])
    said = f"2 of 5 completions are in {file}: make room and repeat the command to go on"
    assert said in str(caught.value)
    assert file.read_bytes() == before
    filled(file)
    assert opened(file).finished


@pytest.mark.parametrize("name", ["missing/out.jsonl", "."])
def test_a_file_that_cannot_be_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        opened(tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/null").exists(), reason="there is no /dev/null")
def test_a_device_is_not_replaced_by_a_file() -> None:
    with pytest.raises(UserError, match="/dev/null cannot be written"):
        opened(Path("/dev/null"), overwrite=True)
    assert Path("/dev/null").is_char_device()
