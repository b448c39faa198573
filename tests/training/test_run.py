"""A run in its folder: new, to be resumed, finished, or in the way of another."""

import os
import subprocess
import sys

import pytest

from deepseek_moe.errors import UserError
from deepseek_moe.training.run import INCOMPLETE, RUN_FILE, WRITTEN, Run


def test_a_run_is_new_or_goes_on_from_its_last_checkpoint(tmp_path):
    settings = {"seed": 1, "data": "x"}
    run = Run(str(tmp_path / "a" / "b"), settings)
    assert run.checkpoint is None and not run.finished
    run.start()
    (run.folder / "incomplete" / "checkpoint-9").mkdir(parents=True)
    (run.folder / "run.json.0123456789ab.tmp").write_text("{")
    (run.folder / "checkpoint-5").mkdir()
    (run.folder / "checkpoint-10").mkdir()
    again = Run(str(run.folder), dict(reversed(settings.items())))
    assert again.checkpoint == str(run.folder / "checkpoint-10")
    again.start()
    assert not (run.folder / "incomplete").exists() and not [*run.folder.glob("*.tmp")]
    with pytest.raises(UserError, match=r"other settings \(other data\)"):
        Run(str(run.folder), settings | {"data": "y"})
    with pytest.raises(UserError, match="extra: None there, 1 now"):
        Run(str(run.folder), settings | {"extra": 1})
    (run.folder / RUN_FILE).unlink()
    with pytest.raises(UserError, match=r"no run\.json"):
        Run(str(run.folder), settings)


@pytest.mark.parametrize("name", [*WRITTEN, "README.md", "runs", "notes.txt", ".lock"])
def test_a_new_run_refuses_a_folder_whose_files_it_would_overwrite(name, tmp_path):
    mine = tmp_path / name.replace("*", "-1")
    mine.write_text("mine")
    if name in WRITTEN:
        with pytest.raises(UserError, match=f"holds {mine.name}.* no run.json"):
            Run(str(tmp_path), {})
    else:
        Run(str(tmp_path), {}).start()
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("mine", [None, "mine"])
def test_the_model_card_of_a_result_replaces_none_of_the_users(mine, tmp_path):
    run = Run(str(tmp_path), {})
    run.start()
    if mine:
        (tmp_path / "README.md").write_text(mine)
    result = tmp_path / INCOMPLETE / "result"
    result.mkdir(parents=True)
    (result / "README.md").write_text("card")
    run._publish(result)
    assert (tmp_path / "README.md").read_text() == (mine or "card")
    assert not result.exists()


def test_a_folder_in_which_another_process_runs_is_refused(tmp_path):
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); "
    hold += "print(flush=True); input()"
    command = [sys.executable, "-c", hold, tmp_path / ".lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(UserError, match="another process is running"):
            Run(str(tmp_path), {}).start()
        other.communicate(b"\n")
    Run(str(tmp_path), {}).start()


@pytest.mark.parametrize("name", [".lock", RUN_FILE, INCOMPLETE])
@pytest.mark.parametrize("kind", ["pipe", "link", "folder or file"])
def test_something_else_under_a_name_of_a_run_is_refused(kind, name, tmp_path):
    """A pipe would be opened for ever, and what is no folder could not be removed."""
    file = tmp_path / name
    if name != RUN_FILE:
        (tmp_path / RUN_FILE).write_text('{"finished": false, "settings": {}}')
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "link":
        file.symlink_to(tmp_path)
    else:
        file.touch() if name == INCOMPLETE else file.mkdir()
    with pytest.raises(UserError, match=f"{name} is not what a run makes there; give another"):
        Run(str(tmp_path), {})


@pytest.mark.parametrize(
    "content",
    [
        *("{", "[]", '{"finished": true}', '{"finished": true, "settings": []}', "[" * 10**5),
        *('{"finished": 1, "settings": {}}', '{"finished": true, "settings": {"a": "\\ud800"}}'),
    ],
    ids=lambda content: content[:40],
)
def test_a_broken_run_file_is_refused(content, tmp_path):
    (tmp_path / RUN_FILE).write_text(content)
    with pytest.raises(UserError, match=rf"{RUN_FILE}.*; give another --output_dir"):
        Run(str(tmp_path), {})


def test_a_run_of_an_older_version_is_named_as_one(tmp_path):
    """It noted its base model by a fingerprint of another kind."""
    for noted, found in (
        ("0123456789abcdef", r"of an older version of this code.*; finish it with"),
        ("tensors:4567", r"other settings \(other model\)"),
    ):
        Run(str(tmp_path / noted), {"model": noted}).start()
        (tmp_path / noted / "checkpoint-5").mkdir()
        with pytest.raises(UserError, match=found):
            Run(str(tmp_path / noted), {"model": "tensors:0123"})
