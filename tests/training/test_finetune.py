"""The script end to end: killed, stopped and repeated, out of disk, and what it leaves."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accident_fixtures import (
    TUNER,
    before_call,
    die,
    die_after_training,
    die_before_renaming_to,
    die_in_file,
    die_in_step,
    fill_disk_at_save,
    stop_in_step,
)
from finetune_fixtures import (
    ROOT,
    SCRIPT,
    THREADS,
    Ended,
    assert_same,
    checkpoints,
    command,
    logged,
    run,
    write_rows,
)
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from deepseek_moe.training.run import WRITTEN

KILLED = -signal.SIGKILL
FULL: dict[str, Any] = {}
LORA = {"use_lora": True, "lora_dropout": 0.2, "lora_rank": 3}
MODES = pytest.mark.parametrize("mode", ["full", "lora"])


@pytest.fixture(scope="module")
def finished(place: Path, argv: Callable[..., list[str]]) -> dict[str, Path]:
    """The output folders of uninterrupted runs."""
    for mode, settings in (("full", FULL), ("lora", LORA)):
        words = argv(place / mode, report_to="tensorboard", **settings)
        done = run(words, place / f"{mode}_log")
        assert done.code == 0, done.err
        assert done.out == f"{place / mode}\n"  # results only
    return {"full": place / "full", "lora": place / "lora"}


def refused(done: Ended) -> str:
    assert done.code == 2, done.err
    assert done.out == ""
    return done.error


def files_of(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*"))


def assert_complete(output: Path, reference: Path) -> None:
    """Every folder that is called a checkpoint has all the files that it has to."""
    for step in checkpoints(output):
        found = files_of(output / f"checkpoint-{step}")
        assert found == files_of(reference / f"checkpoint-{checkpoints(reference)[0]}")
        json.loads((output / f"checkpoint-{step}" / "trainer_state.json").read_text())


# --- Stop and go

KILLS = [  # an accident, and the checkpoints that must be there afterwards
    (partial(die_in_step, 2), []),
    (partial(die_in_file, 2), []),  # in the first save
    (partial(die_in_step, 8), [3, 6]),
    (partial(die_in_step, 5), [3, 6, 9]),  # resumed between two epochs
    (partial(die_in_file, 2), [3, 6, 9]),  # resumed inside of an epoch
    (partial(die_before_renaming_to, "out/checkpoint-12"), [3, 6, 9]),
    (die_after_training, [3, 6, 9, 12]),
    (partial(die_before_renaming_to, "out/tokenizer_config.json"), [3, 6, 9, 12]),
]


@MODES
def test_killed_at_any_moment_and_repeated_it_ends_with_the_same_weights(
    mode: str, finished: dict[str, Path], argv: Callable[..., list[str]], tmp_path: Path
) -> None:
    output, settings = tmp_path / "out", {"full": FULL, "lora": LORA}[mode]
    for accident, there in KILLS:
        killed = run(argv(output, **settings), tmp_path / "log", accident)
        assert killed.code == KILLED, killed.err
        assert checkpoints(output) == there
        assert_complete(output, finished[mode])
        assert not json.loads((output / "run.json").read_text())["finished"]
    assert run(argv(output, **settings), tmp_path / "log").code == 0
    assert_same(output, finished[mode])
    wanted = [name for name in files_of(finished[mode]) if not name.startswith("runs")]
    assert [name for name in files_of(output) if not name.startswith("runs")] == wanted
    for key in ("loss", "balance_loss", "grad_norm", "learning_rate"):
        assert logged(output, key) == logged(finished[mode], key)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves_and_the_repeat_goes_on(
    number: signal.Signals,
    finished: dict[str, Path],
    argv: Callable[..., list[str]],
    tmp_path: Path,
) -> None:
    output, log = tmp_path / "out", tmp_path / "log"
    stopped = run(argv(output), log, partial(stop_in_step, 5, number))
    assert stopped.code == 128 + number, stopped.err
    assert "Traceback" not in stopped.err and stopped.out == ""
    assert checkpoints(output) == [3, 5]
    assert_complete(output, finished["full"])
    repeated = run(argv(output), log)
    assert repeated.code == 0
    assert "step 6/12" in repeated.err and "step 5/12" not in repeated.err
    assert_same(output, finished["full"])


@pytest.mark.parametrize(("strategy", "step"), [("epoch", 3), ("steps", 5)])
def test_a_stop_among_evaluations_changes_nothing(
    strategy: str, step: int, argv: Callable[..., list[str]], tmp_path: Path
) -> None:
    """An epoch has five steps. It is evaluated at its end, and not at a stop before."""
    by_epoch = LORA | {"save_strategy": strategy, "save_steps": 5}
    by_epoch |= {"eval_strategy": "epoch", "eval_fraction": 0.25}
    whole, output, log = tmp_path / "whole", tmp_path / "out", tmp_path / "log"
    assert run(argv(whole, **by_epoch), log).code == 0
    stopped = run(argv(output, **by_epoch), log, partial(stop_in_step, step))
    assert stopped.code == 128 + signal.SIGTERM, stopped.err
    assert checkpoints(output) == [step]
    assert run(argv(output, **by_epoch), log).code == 0
    assert_same(output, whole)
    assert logged(output, "loss") == logged(whole, "loss")
    assert "evaluation: " not in stopped.err
    # One that would come at the stop is left out.
    assert logged(output, "eval_loss") == logged(whole, "eval_loss")[int(step == 5) :]


@pytest.mark.parametrize(("strategy", "step"), [("steps", 4), ("epoch", 6)])
def test_a_stop_is_saved_once_and_nothing_is_evaluated(
    strategy: str, step: int, argv: Callable[..., list[str]], place: Path, tmp_path: Path
) -> None:
    """It stops in a step that was to be evaluated; a second save or an evaluation would kill it."""
    held = {"eval_strategy": strategy, "eval_steps": 4, "eval_data_path": place / "rows.jsonl"}
    words = argv(tmp_path / "out", save_strategy=strategy, save_steps=100, **held)
    stopped = run(words, tmp_path / "log", partial(stopped_and_killed_after_it, step))
    assert stopped.code == 128 + signal.SIGTERM, stopped.err
    assert checkpoints(tmp_path / "out") == [step]


def stopped_and_killed_after_it(step: int) -> None:
    stop_in_step(step)
    before_call(TUNER, "evaluation_loop", 1, die)
    before_call(TUNER, "_save_checkpoint", 2, die)


def test_the_repeat_of_a_run_that_died_after_its_last_step_takes_no_other(
    argv: Callable[..., list[str]], tmp_path: Path
) -> None:
    whole, output, log = tmp_path / "whole", tmp_path / "out", tmp_path / "log"
    five = {"max_steps": 5, "lr_scheduler_type": "constant"}  # an epoch has six
    assert run(argv(whole, **five), log).code == 0
    killed = run(argv(output, **five), log, die_after_training)
    assert killed.code == KILLED
    repeated = run(argv(output, **five), log)
    assert repeated.code == 0 and "step 6" not in repeated.err
    assert checkpoints(output) == [3, 5]
    assert_same(output, whole)


def test_weights_in_fp32_among_others_go_on_as_they_were(
    argv: Callable[..., list[str]], tmp_path: Path
) -> None:
    whole, output, log = tmp_path / "whole", tmp_path / "out", tmp_path / "log"
    some = {"trainable": "self_attn", "bf16": True, "learning_rate": 1e-4}
    assert run(argv(whole, **some), log).code == 0
    stopped = run(argv(output, **some), log, partial(stop_in_step, 5))
    assert stopped.code == 128 + signal.SIGTERM, stopped.err
    assert run(argv(output, **some), log).code == 0
    last = Path("checkpoint-12")
    assert_same(output / last, whole / last)


def test_a_finished_run_says_so_and_touches_nothing(
    finished: dict[str, Path], argv: Callable[..., list[str]], tmp_path: Path
) -> None:
    def seen() -> dict[str, int]:
        folder = finished["full"]
        return {name: (folder / name).stat().st_mtime_ns for name in [".", *files_of(folder)]}

    before = seen()
    again = run(argv(finished["full"]), tmp_path / "log")
    assert again.code == 0
    assert "finished" in again.err
    assert again.out == f"{finished['full']}\n"
    assert seen() == before


def test_other_settings_are_refused_with_the_difference(
    finished: dict[str, Path], argv: Callable[..., list[str]], place: Path, tmp_path: Path
) -> None:
    shutil.copytree(place / "base", tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors["model.layers.1.mlp.experts.5.down_proj.weight"].zero_()
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    changes = {
        "learning_rate: 0.01 there, 0.02 now": {"learning_rate": 0.02},
        "another data": {"data_path": write_rows(tmp_path / "rows.jsonl", 25)},
        "lora_rank: 3 there, 4 now": {"lora_rank": 4},
        "another model": {"model_name_or_path": tmp_path / "base"},
        "batch_size: 4 there, 8 now": {"gradient_accumulation_steps": 2},
    }
    changed = LORA.copy()
    for change in changes.values():
        changed |= change
    error = refused(run(argv(finished["lora"], **changed), tmp_path / "log"))
    assert all(shown in error for shown in changes) and "--output_dir" in error
    other = refused(run(argv(finished["lora"], use_lora=False), tmp_path / "log"))
    assert "use_lora: True there, False now" in other
    moved = shutil.copytree(place / "base", tmp_path / "elsewhere")
    same = {"model_name_or_path": moved, "logging_steps": 2}  # decide nothing
    assert run(argv(finished["lora"], **(LORA | same)), tmp_path / "log").code == 0


def test_every_file_of_a_result_is_known_as_one_that_a_run_writes(
    finished: dict[str, Path], argv: Callable[..., list[str]], tmp_path: Path
) -> None:
    """A new run refuses a folder where the user has a file of such a name."""
    quantised = tmp_path / "quantised"
    done = run(argv(quantised, **(LORA | {"bits": 4})), tmp_path / "log")
    assert done.code == 0, done.err
    for folder in (*finished.values(), quantised):
        names = {file.name for file in folder.iterdir()} - {"run.json", ".lock", "runs"}
        assert names == {file.name for pattern in WRITTEN for file in folder.glob(pattern)}


def test_only_the_newest_checkpoints_are_kept(
    argv: Callable[..., list[str]], finished: dict[str, Path], tmp_path: Path
) -> None:
    done = run(argv(tmp_path / "out", save_steps=1, save_total_limit=2), tmp_path / "log")
    assert done.code == 0
    assert checkpoints(tmp_path / "out") == [11, 12]
    assert_same(tmp_path / "out", finished["full"])


# --- No disk, no numbers


@pytest.mark.parametrize(("size", "there"), [(600_000, [3]), (1_500_000, [3]), (0, [])])
def test_a_full_disk_is_one_line_and_the_repeat_goes_on(
    size: int,
    there: list[int],
    finished: dict[str, Path],
    argv: Callable[..., list[str]],
    tmp_path: Path,
) -> None:
    """Full in the weights, in the optimizer's states, and in the first checkpoint."""
    output = tmp_path / "out"
    full = run(
        argv(output), tmp_path / "log", partial(fill_disk_at_save, 1 + len(there), size or 600_000)
    )
    assert full.code == 1
    named = output / "checkpoint-3" if there else "none"
    assert f"{output} could not be written to" in full.error
    assert f"the last complete checkpoint is {named}" in full.error
    assert checkpoints(output) == there
    if there:
        assert_complete(output, finished["full"])
        AutoModelForCausalLM.from_pretrained(output / "checkpoint-3")
    assert not (output / "incomplete").exists()
    repeated = run(argv(output), tmp_path / "log")
    assert repeated.code == 0, repeated.err
    assert_same(output, finished["full"])


# --- What a run leaves


def test_the_result_is_a_model_that_learnt(
    finished: dict[str, Path], place: Path, tmp_path: Path
) -> None:
    full = AutoModelForCausalLM.from_pretrained(finished["full"])
    assert full.dtype == torch.bfloat16
    base = AutoModelForCausalLM.from_pretrained(place / "base")
    assert not torch.equal(full.lm_head.weight, base.lm_head.weight)
    adapted = PeftModel.from_pretrained(base, finished["lora"])
    assert adapted.peft_config["default"].r == 3
    for folder in finished.values():
        losses = logged(folder, "loss")
        assert len(losses) == 12
        assert sum(losses[6:]) < sum(losses[:6])


def test_tensorboard_has_the_curves(finished: dict[str, Path]) -> None:
    events = EventAccumulator(str(next(finished["full"].rglob("events.out*")).parent))
    events.Reload()
    for name in ("loss", "balance_loss", "learning_rate", "grad_norm", "tokens_per_second"):
        curve = events.Scalars(f"train/{name}")
        assert [point.step for point in curve] == list(range(1, 13))
        assert all(point.value > 0 for point in curve)
        assert [point.value for point in curve] == pytest.approx(logged(finished["full"], name))


def assert_trained_without_reports(done: Ended, output: Path, reference: Path) -> None:
    assert done.code == 0, done.err
    assert done.err.count("warning: ") == 1 and "Traceback" not in done.err, done.err
    assert f"warning: tensorboard cannot report any more to {output / 'runs'}" in done.err
    assert checkpoints(output) == [3, 6, 9, 12]
    assert_same(output, reference)


def test_without_a_place_for_tensorboard_the_run_goes_on(
    finished: dict[str, Path], argv: Callable[..., list[str]], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "runs").write_text("no folder")
    done = run(argv(output, report_to="tensorboard"), tmp_path / "log")
    assert_trained_without_reports(done, output, finished["full"])


def test_a_full_disk_under_tensorboard_does_not_end_the_run(
    finished: dict[str, Path], argv: Callable[..., list[str]], tmp_path: Path
) -> None:
    output, disk = tmp_path / "out", tmp_path / "disk"
    for folder in (output, disk):
        folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here, which takes root")
    try:
        (output / "runs").symlink_to(disk)
        with suppress(OSError), (disk / "filling").open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        done = run(argv(output, report_to="tensorboard"), tmp_path / "log")
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert "No space left on device" in done.err
    assert_trained_without_reports(done, output, finished["full"])


def test_lora_merged_is_a_whole_model_beside_its_adapter(
    argv: Callable[..., list[str]], finished: dict[str, Path], place: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    done = run(argv(output, merge_on_save=True, **LORA), tmp_path / "log")
    assert done.code == 0, done.err
    assert_same(output / "adapter", finished["lora"])
    merged = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, output / "adapter").eval()
    ids = torch.tensor([[4094, 17, 5, 44, 80, 900]])
    with torch.no_grad():
        assert (merged.eval()(ids).logits - adapted(ids).logits).abs().max() < 0.1


@pytest.mark.slow
def test_the_script_runs_from_any_folder(
    argv: Callable[..., list[str]], finished: dict[str, Path], place: Path, tmp_path: Path
) -> None:
    script = os.path.relpath(SCRIPT, ROOT)
    relative = {"model_name_or_path": "base", "data_path": "rows.jsonl"}
    words = argv(Path("out"), **relative)
    done = command([sys.executable, str(SCRIPT), *words], place, threads=THREADS)
    assert done.code == 0, done.err
    assert done.out == "out\n"
    assert_same(place / "out", finished["full"])
    wrong: Sequence[str] = [sys.executable, script, "--data", "x"]
    assert "no option --data" in refused(command(wrong, ROOT))
