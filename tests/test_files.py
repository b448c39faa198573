"""Files and folders are complete or absent, and those of the user and of other processes stay."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import deepseek_moe
from deepseek_moe.errors import RunError, UserError
from deepseek_moe.files import complete_or_absent, refuse_occupied, write_aside, write_text

PACKAGE = Path(deepseek_moe.__file__).parent
# A writer in a process of its own, which waits for a line of input before it is complete. It leaves
# out what the package imports, which takes seconds.
SLOW_WRITER = f"""
import sys
from pathlib import Path
from types import ModuleType
sys.modules["deepseek_moe"] = ModuleType("deepseek_moe")
sys.modules["deepseek_moe"].__path__ = [{str(PACKAGE)!r}]
from deepseek_moe.errors import exit_on_user_error
from deepseek_moe.files import complete_or_absent
with exit_on_user_error(), complete_or_absent(Path(sys.argv[1])) as aside:
    (aside / "file").write_text("slow")
    print("now", flush=True)
    input()
"""


def write(folder: Path, text: str) -> None:
    with complete_or_absent(folder) as aside:
        (aside / "file").write_text(text)


def contents(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in folder.iterdir()}


def test_a_killed_writer_is_cleaned_up_after_and_a_living_one_is_left_alone(tmp_path):
    folder, pipe = tmp_path / "new", subprocess.PIPE
    command = [sys.executable, "-c", SLOW_WRITER, folder]
    killed, slow = (
        subprocess.Popen(command, text=True, stdin=pipe, stdout=pipe, stderr=pipe) for _ in range(2)
    )
    assert killed.stdout.readline() == slow.stdout.readline() == "now\n"
    killed.kill()
    killed.communicate()
    assert len(list(tmp_path.glob("new.*/file"))) == 2 and not folder.exists()
    write(folder, "quick")
    assert len(list(tmp_path.glob("new.*/file"))) == 1
    _, said = slow.communicate("go on\n")
    assert slow.returncode == 1
    assert said.startswith("error: ") and len(said.splitlines()) == 1
    assert f"{folder} was written by another process meanwhile" in said
    assert list(tmp_path.iterdir()) == [folder]
    assert contents(folder) == {"file": "quick"}


def test_two_writers_in_one_process_do_not_mix(tmp_path):
    folder = tmp_path / "new"
    with (
        pytest.raises(RunError, match="was written by another process meanwhile"),
        complete_or_absent(folder) as aside,
    ):
        (aside / "other file").write_text("first")
        write(folder, "second")
    assert contents(folder) == {"file": "second"}
    assert list(tmp_path.iterdir()) == [folder]


def test_files_of_the_user_beside_what_is_written_stay(tmp_path):
    """Under names that were once used to write aside, and under names that look like them."""
    mine = [tmp_path / name for name in ("new.partial/x", "new.mine.partial/x", "note.tmp")]
    for file in mine:
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")
    write(tmp_path / "new", "new")
    write_aside(tmp_path / "note", "new")
    assert [file.read_text() for file in mine] == ["mine"] * len(mine)


def test_an_empty_folder_is_filled_and_stays_what_it_was(tmp_path):
    private, link = tmp_path / "private", tmp_path / "link"
    private.mkdir(mode=0o700)
    link.symlink_to(private)
    refuse_occupied(link)
    write(link, "new")
    assert link.is_symlink()
    assert contents(private) == {"file": "new"}
    assert private.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_must_not_be_replaced_is_refused(tmp_path, monkeypatch):
    empty, file = tmp_path / "empty", tmp_path / "file"
    empty.mkdir()
    file.write_text("mine")
    for occupied in (tmp_path, file):
        with pytest.raises(UserError, match="is there already; give a new folder"):
            refuse_occupied(occupied)
    monkeypatch.chdir(empty)
    for name in (Path("."), empty):
        with pytest.raises(UserError, match="is the current folder; give a new folder inside"):
            refuse_occupied(name)
    monkeypatch.setattr(os.path, "ismount", lambda path: path == empty)
    with pytest.raises(UserError, match="a file system is mounted"):
        refuse_occupied(empty)


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = write_text(tmp_path / "note.txt", "old")
    with pytest.raises(UserError, match="is there already; choose another name"):
        write_text(file, "new")
    with pytest.raises(FileExistsError):  # as if it appeared after `write_text` has looked
        write_aside(file, "new", overwrite=False)
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(os, "replace", None)
        write_aside(file, "new")
    assert contents(tmp_path) == {"note.txt": "old"}
    write_text(file, "new", overwrite=True)
    assert contents(tmp_path) == {"note.txt": "new"}
