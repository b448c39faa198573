"""The room on a disk that a run needs equals what it writes, and a smaller disk is refused."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from finetune_fixtures import checkpoints, run, run_ranks
from option_fixtures import parse, parse_arguments
from text_fixtures import ROOT

from deepseek_moe import DeepseekConfig, DeepseekForCausalLM
from deepseek_moe.training.disk_need import DiskNeed, disk_need, free_bytes
from deepseek_moe.training.dry_run import meta_model
from deepseek_moe.training.expert_choice import take_choice

SHORT = {"max_steps": 4, "save_steps": 2}


def bytes_in(folder: Path) -> int:
    """The size of weights and states. Tokenizer and trainer's state are small."""
    kinds = ("*.safetensors", "*.pt")
    return sum(file.stat().st_size for kind in kinds for file in folder.rglob(kind))


def small_disk() -> None:
    shutil.disk_usage = lambda folder: SimpleNamespace(free=400_000)


def test_a_disk_too_small_for_a_checkpoint_and_the_result_is_refused(argv, tmp_path):
    done = run(argv(tmp_path / "out", **SHORT), tmp_path / "log", small_disk)
    assert done.code == 2
    assert "is too small: a checkpoint takes" in done.error and "0.4 MB are free" in done.error
    assert checkpoints(tmp_path / "out") == []
    planned = run(argv(tmp_path / "out", dry_run=True, **SHORT), tmp_path / "log", small_disk)
    assert planned.code == 0
    said = " ".join(planned.out.split())
    assert "disk 2 x " in said and "0.4 MB are free" in said


LORA = {"use_lora": True, "lora_rank": 64}
ZERO2 = {"deepspeed": ROOT / "configs" / "ds_config_zero2_no_offload.json", "bf16": True}
EXPERTS = {"train_experts": "expert_cfg.json", "trainable": "lm_head"}  # the file is in `place`
MODES = {
    "chosen modules": {"trainable": "down_proj"},
    "merged": LORA | {"merge_on_save": True},
    "in the backward pass": {"single_gpu_full": True, "bf16": True, "use_cpu": True},
    "chosen experts": EXPERTS | {"bits": 4, "bf16": True},
    "chosen experts, as a delta": EXPERTS | {"save_delta": True},
    "chosen experts under ZeRO-2": ZERO2 | EXPERTS,
    "ZeRO-2": ZERO2,
    "LoRA under ZeRO-2": ZERO2 | LORA,
}
SLOW = {mode: [pytest.mark.slow] for mode in MODES if "ZeRO" in mode}


@pytest.mark.parametrize("mode", [pytest.param(one, marks=SLOW.get(one, ())) for one in MODES])
def test_the_disk_of_a_run_is_what_it_writes(mode, place, argv, tmp_path, monkeypatch, request):
    """Under DeepSpeed with fp32 copies of what trains."""
    output, changes = tmp_path / "out", SHORT | MODES[mode]
    if "train_experts" in changes:
        changes["train_experts"] = place / changes["train_experts"]
    words = argv(output, save_total_limit=1, **changes)
    if mode in SLOW:
        request.getfixturevalue("deepspeed_extensions")
        [done] = run_ranks(words, tmp_path / "log", 1)
        monkeypatch.setenv("RANK", "0")  # as under its launcher
    else:
        done = run(words, tmp_path / "log")
    assert done.code == 0, done.err
    model, _, training = parse_arguments(words)
    take_choice(model, place / "base")
    network = meta_model(place / "base", model)
    need = disk_need(network, model, training, steps=4, steps_in_epoch=6)
    assert (need.saved, need.kept) == (2, 1)
    checkpoint = bytes_in(output / "checkpoint-4")
    assert checkpoint == pytest.approx(need.checkpoint, rel=0.1)
    assert bytes_in(output) - checkpoint == pytest.approx(need.result, rel=0.1)
    if model.merge_on_save:
        alone = disk_need(network, replace(model, merge_on_save=False), training, 4, 6)
        assert bytes_in(output / "adapter") == pytest.approx(alone.result, rel=0.1)


def test_the_disk_of_the_16b_model():
    """A weight on one GPU takes 2 bytes of bf16 and 2 of averages, and 2 more in the result."""
    options, _, training = parse("--bf16 True --single_gpu_full True --save_steps 100")
    with torch.device("meta"):
        model = DeepseekForCausalLM(DeepseekConfig())

    def need(steps: int) -> DiskNeed:
        return disk_need(model, options, training, steps, steps_in_epoch=100)

    assert need(250).checkpoint == pytest.approx(66.0e9, rel=1e-3)
    assert need(250).result == pytest.approx(32.75e9, rel=1e-3)
    assert need(250).kept == 3
    assert need(250).least() == pytest.approx(66.0e9 + 32.75e9, rel=1e-3)
    assert need(250).total == pytest.approx(3 * 66.0e9 + 32.75e9, rel=1e-3)
    # The only checkpoint that is kept stays until the next is complete.
    training.save_total_limit = 1
    assert need(250).least() == need(250).total == pytest.approx(2 * 66.0e9, rel=1e-3)
    assert need(250).least(resumes=True) == pytest.approx(66.0e9, rel=1e-3)
    assert need(0).least(resumes=True) == pytest.approx(32.75e9, rel=1e-3)  # All steps are taken.
    training.save_strategy, training.save_total_limit = "epoch", 5
    assert (need(250).kept, need(5).kept) == (3, 1)


def test_what_an_interrupted_save_left_counts_as_free(tmp_path):
    (tmp_path / "out" / "incomplete").mkdir(parents=True)
    before = free_bytes(tmp_path / "out")
    (tmp_path / "out" / "incomplete" / "half").write_bytes(bytes(50_000_000))
    assert free_bytes(tmp_path / "out") == pytest.approx(before, abs=30_000_000)
    assert free_bytes(tmp_path / "not" / "yet") == pytest.approx(before, abs=80_000_000)
    DiskNeed(0, 0, 0, 1000).refuse_too_small(tmp_path / "not" / "yet")
