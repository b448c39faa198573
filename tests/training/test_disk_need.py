"""The room on a disk that a run needs equals what it writes, and a smaller disk is refused."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from finetune_fixtures import SCRIPT, checkpoints, run, run_ranks
from option_fixtures import parse_arguments

from deepseek_moe import DeepseekConfig, DeepseekForCausalLM
from deepseek_moe.training.arguments import ModelArguments
from deepseek_moe.training.disk_need import DiskNeed, disk_need, free_bytes
from deepseek_moe.training.dry_run import meta_model

MakeArgv = Callable[..., list[str]]
SHORT = {"max_steps": 4, "save_steps": 2}


def bytes_in(folder: Path) -> int:
    """The size of weights and states. Tokenizer and trainer's state are small."""
    kinds = ("*.safetensors", "*.pt")
    return sum(file.stat().st_size for kind in kinds for file in folder.rglob(kind))


def small_disk() -> None:
    shutil.disk_usage = lambda folder: SimpleNamespace(free=400_000)


def test_a_disk_too_small_for_a_checkpoint_and_the_result_is_refused(
    argv: MakeArgv, tmp_path: Path
) -> None:
    done = run(argv(tmp_path / "out", **SHORT), tmp_path / "log", small_disk)
    assert done.code == 2
    assert "is too small: a checkpoint takes" in done.error and "0.4 MB are free" in done.error
    assert checkpoints(tmp_path / "out") == []
    planned = run(argv(tmp_path / "out", dry_run=True, **SHORT), tmp_path / "log", small_disk)
    assert planned.code == 0
    said = " ".join(planned.out.split())
    assert "disk 2 x " in said and "0.4 MB are free" in said


MODES = {
    "full": {},
    "chosen modules": {"trainable": "down_proj"},
    "lora": {"use_lora": True, "lora_rank": 64},
    "merged": {"use_lora": True, "lora_rank": 64, "merge_on_save": True},
    "in the backward pass": {"single_gpu_full": True, "bf16": True, "use_cpu": True},
}


@pytest.mark.parametrize("mode", MODES)
def test_the_disk_that_a_run_needs_is_what_it_writes(
    mode: str, argv: MakeArgv, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    words = argv(output, save_total_limit=1, **SHORT, **MODES[mode])
    model, _, training = parse_arguments(words)
    base = Path(model.model_name_or_path)
    need = disk_need(meta_model(base, model), model, training, steps=4, steps_in_epoch=6)
    assert (need.saved, need.kept) == (2, 1)
    done = run(words, tmp_path / "log")
    assert done.code == 0, done.err
    checkpoint = bytes_in(output / "checkpoint-4")
    assert checkpoint == pytest.approx(need.checkpoint, rel=0.1)
    assert bytes_in(output) - checkpoint == pytest.approx(need.result, rel=0.1)


@pytest.mark.slow
@pytest.mark.usefixtures("deepspeed_extensions")
@pytest.mark.parametrize("changes", [{}, {"use_lora": True, "lora_rank": 64}])
def test_deepspeed_writes_fp32_copies_of_what_trains(
    changes: dict[str, Any], argv: MakeArgv, place: Path, tmp_path: Path
) -> None:
    config = SCRIPT.parent / "configs" / "ds_config_zero2_no_offload.json"
    zero2 = {"deepspeed": config, "bf16": True, "max_steps": 3}
    [done] = run_ranks(argv(tmp_path / "out", **zero2, **changes), tmp_path / "log", 1)
    assert done.code == 0, done.err
    model = ModelArguments(str(place / "base"), **changes)
    training = SimpleNamespace(
        bf16=True, single_gpu_full=False, deepspeed={"zero_optimization": {"stage": 2}},
        save_strategy="steps", save_steps=3, save_total_limit=None,
    )  # fmt: skip
    need = disk_need(meta_model(place / "base", model), model, training, 3, 3)
    found = bytes_in(tmp_path / "out" / "checkpoint-3")
    assert found == pytest.approx(need.checkpoint, rel=0.1)


def test_the_disk_of_the_16b_model() -> None:
    """A weight on one GPU takes 2 bytes of bf16 and 2 of averages, and 2 more in the result."""
    with torch.device("meta"):
        model = DeepseekForCausalLM(DeepseekConfig())
    training = SimpleNamespace(
        bf16=True, single_gpu_full=True, deepspeed=None, optim="", save_strategy="steps",
        save_steps=100, save_total_limit=None, num_train_epochs=3,
    )  # fmt: skip
    options = SimpleNamespace(use_lora=False, merge_on_save=False)
    need = disk_need(model, options, training, steps=250, steps_in_epoch=100)
    assert need.checkpoint == pytest.approx(66.0e9, rel=1e-3)
    assert need.result == pytest.approx(32.75e9, rel=1e-3)
    assert need.kept == 3
    assert need.least() == pytest.approx(66.0e9 + 32.75e9, rel=1e-3)
    assert need.total == pytest.approx(3 * 66.0e9 + 32.75e9, rel=1e-3)
    # The only checkpoint that is kept stays until the next is complete.
    training.save_total_limit = 1
    need = disk_need(model, options, training, steps=250, steps_in_epoch=100)
    assert need.least() == need.total == pytest.approx(2 * 66.0e9, rel=1e-3)
    assert need.least(resumes=True) == pytest.approx(66.0e9, rel=1e-3)
    need = disk_need(model, options, training, steps=0, steps_in_epoch=100)  # All steps are taken.
    assert need.least(resumes=True) == pytest.approx(32.75e9, rel=1e-3)
    training.save_strategy, training.save_total_limit = "epoch", 5
    assert disk_need(model, options, training, steps=250, steps_in_epoch=100).kept == 3
    assert disk_need(model, options, training, steps=5, steps_in_epoch=100).kept == 1


def test_what_an_interrupted_save_left_counts_as_free(tmp_path: Path) -> None:
    (tmp_path / "out" / "incomplete").mkdir(parents=True)
    before = free_bytes(tmp_path / "out")
    (tmp_path / "out" / "incomplete" / "half").write_bytes(bytes(50_000_000))
    assert free_bytes(tmp_path / "out") == pytest.approx(before, abs=30_000_000)
    assert free_bytes(tmp_path / "not" / "yet") == pytest.approx(before, abs=80_000_000)
    DiskNeed(0, 0, 0, 1000).refuse_too_small(tmp_path / "not" / "yet")
