"""A disk that fills up: one line and the last whole checkpoint, or a warning. Nothing is lost.

The disk is a small tmpfs. Limits on the size of a file do the same without root, but not for every
library: tests/training/test_finetune.py.
"""

import os
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from accident_fixtures import TUNER, before_call
from finetune_fixtures import Ended, assert_same, checkpoints, options, run, succeed

pytestmark = pytest.mark.slow
MEGABYTE = 2**20
RUN = "deepseek_moe.training.run.Run"
LORA = {"use_lora": True, "lora_rank": 3}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 48 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no `mount` here for a small file system")
    if done.returncode:
        pytest.skip(f"no small file system can be mounted, which needs root: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, left: int, *_: Any) -> None:
    """Fills the disk but for `left` bytes."""
    found = os.statvfs(disk)
    with (disk / "fill").open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, found.f_bavail * found.f_frsize - left)


def fill_before(owner: str, name: str, count: int, disk: Path, left: int) -> None:
    before_call(owner, name, count, partial(fill, disk, left))


@pytest.fixture(scope="module")
def whole(place: Path, argv: Callable[..., list[str]]) -> Callable[..., Path]:
    """Makes runs on a disk with room, each once."""
    made: dict[str, Path] = {}

    def make(**changes: Any) -> Path:
        if (key := str(changes)) not in made:
            made[key] = place / f"whole-{len(made)}"
            succeed(argv(made[key], **changes, max_steps=4, save_steps=2), place / "log")
        return made[key]

    return make


@pytest.mark.parametrize(
    ("changes", "owner", "name", "count", "left", "there"),
    [
        ({}, "deepseek_moe.training.saving.RehearseSave", "on_train_begin", 1, 0, []),
        ({}, TUNER, "_save_checkpoint", 1, 100_000, []),
        ({}, TUNER, "_save_checkpoint", 2, 2 * MEGABYTE, [2]),
        ({}, RUN, "_save_result", 1, 300_000, [2, 4]),
        (LORA | {"merge_on_save": True}, RUN, "_save_result", 1, 1_000_000, [2, 4]),
    ],
    ids=["rehearsal", "weights", "optimizer", "result", "merge"],
)
def test_a_run_is_one_line_and_its_repeat_goes_on(
    changes, owner, name, count, left, there, disk, whole, argv, tmp_path
):
    output, log = disk / "out", tmp_path / "log"
    words = argv(output, **changes, max_steps=4, save_steps=2)
    full = run(words, log, partial(fill_before, owner, name, count, disk, left))
    last = output / f"checkpoint-{there[-1]}" if there else "none"
    assert f"{output} could not be written to" in full.error
    assert f"the last complete checkpoint is {last}: make room" in full.error
    assert full.code == 1
    assert checkpoints(output) == there
    assert not any((output / name).exists() for name in ("incomplete", "config.json"))
    (disk / "fill").unlink()
    succeed(words, log)
    assert_same(output, whole(**changes))


def test_tensorboard_is_one_warning(disk, whole, argv, tmp_path):
    """Its folder is on a disk that is full from the start, and that of the run is not."""
    output = tmp_path / "out"
    output.mkdir()
    (output / "runs").symlink_to(disk)
    fill(disk, 0)
    words = argv(output, max_steps=4, save_steps=2, report_to="tensorboard")
    done = succeed(words, tmp_path / "log")
    assert done.err.count("warning: tensorboard cannot report any more") == 1
    assert "Traceback" not in done.err
    assert_same(output, whole())


def test_the_cache_is_one_line(disk, argv, tmp_path):
    fill(disk, 0)
    done = run(argv(tmp_path / "out", cache_dir=disk / "cache"), tmp_path / "log")
    assert "--cache_dir" in done.refusal


def test_an_export_leaves_nothing(disk, place, whole, tmp_path):
    script, log = tmp_path / "export.py", tmp_path / "log"
    script.write_text("import runpy; runpy.run_module('deepseek_moe.export', run_name='__main__')")
    words = options(model=place / "base", adapter=whole(**LORA), output=disk / "out")

    def export(owner: str, name: str) -> Ended:
        return run(words, log, partial(fill_before, owner, name, 1, disk, 300_000), script)

    writer = "deepseek_moe.checkpoint_writer"
    for name, said in (("_refuse_full_disk", "are free"), ("write_shards", "cannot be written")):
        full = export(writer, name)
        assert (full.code, full.out) == (1, "")
        assert f"{disk / 'out'} cannot be written" in full.error and said in full.error
        assert [file.name for file in disk.iterdir()] == ["fill"]
        (disk / "fill").unlink()
    assert run(words, log, script=script).code == 0
