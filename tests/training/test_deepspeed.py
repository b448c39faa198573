"""Several processes on the CPU: started by the real `deepspeed` launcher, or, faster, forked."""

import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accident_fixtures import before_call, die, stop_in_step
from finetune_fixtures import (
    ROOT,
    SCRIPT,
    ZERO,
    Ended,
    assert_same,
    checkpoints,
    free_port,
    logged,
    route_apart,
    run,
    run_ranks,
    succeed_ranks,
    use_fused_forwards_on_a_cpu,
    weights,
    write_base,
)
from flip_fixtures import flip, flipped
from transformers import AutoModelForCausalLM

from deepseek_moe.training.resume import Layout, find_damage

MakeArgv = Callable[..., list[str]]
slow = pytest.mark.slow
pytestmark = pytest.mark.usefixtures("deepspeed_extensions", "free_buffers")


def run_published(option: str, place: Path, output: Path) -> Ended:
    """Runs the README's command that has `option`, with a smaller batch and length."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    [text] = [line for line in lines if line.startswith("deepspeed ") and option in line]
    values = {"MODEL_PATH": place / "base", "DATA_PATH": place / "rows.jsonl"}
    for name, value in (values | {"OUTPUT_PATH": output}).items():
        text = text.replace(f"${name}", shlex.quote(str(value)))
    _, _, *words = shlex.split(text)
    words += ["--model_max_length", "128", "--per_device_train_batch_size", "1"]
    words += ["--cache_dir", str(place / "cache")]
    words = ["--num_gpus", "2", "--master_port", str(free_port()), "finetune.py", *words]
    prepare = partial(stand_beside_the_script, os.environ["TORCH_EXTENSIONS_DIR"])
    launcher = Path(sys.executable).with_name("deepspeed")
    return run(words, output.with_name("log"), prepare, launcher)


def stand_beside_the_script(extensions: str) -> None:
    os.chdir(SCRIPT.parent)
    os.environ |= {"TORCH_EXTENSIONS_DIR": extensions, "OMP_NUM_THREADS": "1"}


@slow
def test_the_published_full_fine_tuning(place, tmp_path):
    output = tmp_path / "out"
    done = run_published("--use_lora False", place, output)
    assert done.code == 0, done.err
    assert done.out.splitlines().count(str(output)) == 1
    assert "MISSING" not in done.out + done.err
    assert logged(output, "learning_rate") == pytest.approx([2e-6 * step for step in range(9)])
    trained, base = weights(output), weights(place / "base")
    assert {name: x.dtype for name, x in trained.items()} == {n: x.dtype for n, x in base.items()}
    # The rate is small and the weights are bf16, so most of them do not move.
    changed = {name for name in base if not torch.equal(trained[name], base[name])}
    assert any(".experts." in name for name in changed) and "lm_head.weight" in changed
    assert all((trained[name] - x).abs().max() < 0.01 for name, x in base.items())
    AutoModelForCausalLM.from_pretrained(output)


@slow
def test_the_published_qlora(place, tmp_path):
    output = tmp_path / "out"
    done = run_published("--bits 4", place, output)
    assert done.code == 0, done.err
    config = json.loads((output / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (64, 16)
    note = json.loads((output / "base_quantization.json").read_text())
    assert (note["bits"], note["quant_type"], note["double_quant"]) == (4, "nf4", True)
    assert all(norm > 0.3 for norm in logged(output, "grad_norm"))  # before it is clipped
    learnt = {name for name, x in weights(output).items() if "lora_B" in name and x.any()}
    assert any("mlp.experts" in name for name in learnt)
    assert any("self_attn" in name for name in learnt)


ADAM = {"learning_rate": 1e-3, "lr_scheduler_type": "cosine", "warmup_steps": 1}
FIFTY = ADAM | {"max_steps": 50, "save_steps": 50, "warmup_steps": 5}
LORA = ADAM | {"use_lora": True, "lora_r": 4, "lora_dropout": 0}
# Nothing before the experts trains here.
LORA_OF_EXPERTS = LORA | {"trainable": "experts.gate_up_proj,experts.down_proj"}
# A step of plain SGD is as large as the gradient, while Adam's would hide its scale. Nothing but
# the experts trains, so the logged norms are of their gradients alone.
SGD = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0, "learning_rate": 20}
EXPERTS = SGD | {"trainable": "experts"}
CHOSEN = SGD | {"train_experts": "expert_cfg.json"}
LORA_OF_CHOSEN = CHOSEN | {"use_lora": True, "lora_r": 4, "lora_dropout": 0, "learning_rate": 1}


@pytest.fixture(scope="module")
def steps(argv: MakeArgv) -> MakeArgv:
    """Makes a command of 3 steps of 8 rows in all, saved after the last. Keywords change it."""

    def steps(output: Path, zero: str | None, processes: int, **changes: Any) -> list[str]:
        plain = {"per_device_train_batch_size": 8 // processes, "max_steps": 3}
        if zero:
            plain["deepspeed"] = ZERO[zero]
        return argv(output, **(plain | changes))

    return steps


@pytest.fixture(scope="module")
def one_process(place: Path, steps: MakeArgv) -> Callable[..., Path]:
    """Makes runs of one process to compare with, each once."""
    made: dict[str, Path] = {}

    def make(**changes: Any) -> Path:
        key = str(changes)
        if key not in made:
            made[key] = place / f"one-{len(made)}"
            done = run(steps(made[key], None, 1, **changes), place / "one_log")
            assert done.code == 0, done.err
        return made[key]

    return make


def assert_equal_curves(found: Path, wanted: Path, count: int = 3, rel: float = 1e-4) -> None:
    for key in ("loss", "balance_loss", "grad_norm", "learning_rate"):
        curve = logged(wanted, key)
        assert len(curve) == count
        assert logged(found, key) == pytest.approx(curve, rel=rel), key


def assert_equal_moves(found: Path, wanted: Path, base: Path) -> set[str]:
    """Every weight moved in the same direction by the same length. Returns which did."""
    found, wanted, base = weights(found), weights(wanted), weights(base)
    moved = {name for name in base if not torch.equal(wanted[name], base[name])}
    assert moved == {name for name in base if not torch.equal(found[name], base[name])}
    for name in moved:
        way = wanted[name].float() - base[name].float()
        off = (found[name].float() - base[name].float() - way).norm() / way.norm()
        assert off < 0.02, name  # They are saved in bf16.
    return moved


def be_alone_on_a_machine() -> None:
    """Two machines share a folder: each has a first process, but only one of them writes."""
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


CASES = {
    "two machines": ("zero3", 2, ADAM, be_alone_on_a_machine),
    "full as on a GPU, ZeRO-3": ("zero3", 2, ADAM, use_fused_forwards_on_a_cpu),
    "lora as on a GPU, ZeRO-2": ("zero2_no_offload", 2, LORA, use_fused_forwards_on_a_cpu),
    "lora as on a GPU, ZeRO-3": ("zero3", 2, LORA, use_fused_forwards_on_a_cpu),
    "lora of experts, ZeRO-3": ("zero3", 2, LORA_OF_EXPERTS, None),
    "experts, ZeRO-2": ("zero2_no_offload", 2, EXPERTS, None),
    "experts, ZeRO-3": ("zero3", 2, EXPERTS, None),
}
SLOW_CASES = {
    "full as on a GPU, ZeRO-2": ("zero2_no_offload", 2, ADAM, use_fused_forwards_on_a_cpu),
    "lora of experts, ZeRO-2": ("zero2_no_offload", 2, LORA_OF_EXPERTS, None),
    "experts, ZeRO-3, four processes": ("zero3", 4, EXPERTS, None),
    "chosen experts, ZeRO-2": ("zero2_no_offload", 2, CHOSEN, None),
    "chosen experts, ZeRO-3": ("zero3", 2, CHOSEN, None),
    "lora of chosen experts, ZeRO-2": ("zero2_no_offload", 2, LORA_OF_CHOSEN, None),
    "lora of chosen experts, ZeRO-3": ("zero3", 2, LORA_OF_CHOSEN, None),
    "fifty steps, ZeRO-2, four processes": ("zero2_no_offload", 4, FIFTY, None),
    "fifty steps, ZeRO-3": ("zero3", 2, FIFTY, None),
}


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(one, marks=slow) for one in SLOW_CASES)])
def test_several_processes_take_the_steps_of_one(case, place, steps, tmp_path, one_process):
    zero, processes, changes, before = (CASES | SLOW_CASES)[case]
    wanted, output = one_process(**changes), tmp_path / "out"
    succeed_ranks(steps(output, zero, processes, **changes), tmp_path / "log", processes, before)
    count = changes.get("max_steps", 3)
    assert checkpoints(output) == [count]
    assert_equal_curves(output, wanted, count, 1e-4 if count == 3 else 1e-3)
    for key in ("load_over_mean", "expert_entropy", "starved_experts"):
        # It is summed over processes. Later rounding may change a pick.
        assert logged(output, key)[0] == pytest.approx(logged(wanted, key)[0], rel=1e-6), key
    losses = logged(wanted, "loss")
    assert count == 3 or losses[-1] < 0.75 * losses[0]
    if changes in (EXPERTS, CHOSEN):
        moved = assert_equal_moves(output, wanted, place / "base")
        assert all(".experts." in name for name in moved)
        assert len(moved) == 3 * (2 * 8 if changes is EXPERTS else 4 + 6)  # matrices, experts
    if changes is LORA_OF_CHOSEN:
        for name, factor in weights(wanted).items():
            torch.testing.assert_close(weights(output)[name], factor, rtol=0, atol=1e-6)


@slow
@pytest.mark.usefixtures("offload_extension")
def test_zero3_with_offload_starts_from_the_weights_of_the_checkpoint(place, steps, tmp_path):
    """With a learning rate of 0 the result is the base, bit for bit, experts included."""
    output = tmp_path / "out"
    done = succeed_ranks(steps(output, "zero3_offload", 2, learning_rate=0), tmp_path / "log")
    assert "MISSING" not in done.out + done.err
    assert_same(output, place / "base")
    assert all(norm > 0 for norm in logged(output, "grad_norm"))


def stop_second_process() -> None:
    if os.environ["RANK"] == "1":
        stop_in_step(3)


@slow
@pytest.mark.parametrize("zero", ["zero2_no_offload", "zero3"])
def test_a_run_stopped_on_one_process_goes_on(zero, place, steps, tmp_path, one_process):
    """Two epochs of three steps, each of two batches, are evaluated at their ends."""
    epochs = ADAM | {"max_steps": 6, "gradient_accumulation_steps": 2, "eval_strategy": "steps"}
    epochs |= {"eval_data_path": place / "held.jsonl", "eval_steps": 3}
    wanted, output = one_process(**epochs, per_device_train_batch_size=4), tmp_path / "out"
    argv = steps(output, zero, 2, **epochs, per_device_train_batch_size=2)
    for stopped in run_ranks(argv, tmp_path / "log", 2, stop_second_process):
        assert stopped.code == 143, stopped.err
        assert "Traceback" not in stopped.err
    assert checkpoints(output) == [2]
    repeated = succeed_ranks(argv, tmp_path / "log")
    assert "step 3/6" in repeated.err and "step 2/6" not in repeated.err
    assert_equal_curves(output, wanted, 6, 2e-4)
    for key in ("eval_loss", "eval_perplexity"):
        assert len(logged(output, key)) == 2
        assert logged(output, key) == pytest.approx(logged(wanted, key), rel=2e-4), key


def test_processes_that_route_to_different_experts_do_not_wait_for_each_other(steps, tmp_path):
    output, base = tmp_path / "out", write_base(tmp_path / "base", num_experts_per_tok=2)
    argv = steps(output, "zero3", 2, model_name_or_path=base)
    succeed_ranks(argv, tmp_path / "log", 2, partial(route_apart, str(tmp_path)))
    picked = [json.loads((tmp_path / f"picks{rank}.json").read_text()) for rank in range(2)]
    assert picked == [[0, 1], [2, 3]]
    found, before = weights(output), weights(base)
    for expert in range(8):  # The gradients of both processes' experts arrived, and no other's.
        name = f"model.layers.1.mlp.experts.{expert}.up_proj.weight"
        assert torch.equal(found[name], before[name]) == (expert >= 4), name


def die_in_third_save() -> None:
    """Dies when the model is written and DeepSpeed's states are not."""
    before_call("deepspeed.runtime.engine.DeepSpeedEngine", "save_checkpoint", 3, die)


@pytest.mark.parametrize(
    ("zero", "stage"), [("zero2_no_offload", 2), pytest.param("zero3", 3, marks=slow)]
)
def test_a_run_killed_in_a_save_goes_on_or_names_the_file(
    zero, stage, steps, tmp_path, one_process
):
    output, log = tmp_path / "out", tmp_path / "log"
    argv = steps(output, zero, 2, **ADAM, save_steps=1)
    killed = run_ranks(argv, log, 2, die_in_third_save)
    assert [done.code for done in killed] == [-9, -9]
    assert checkpoints(output) == [1, 2] and (output / "incomplete" / "checkpoint-3").is_dir()
    checkpoint, layout = output / "checkpoint-2", Layout(2, stage, adapter=False)
    assert find_damage(checkpoint, layout) is None
    files = [file for file, _ in layout.checks(checkpoint)]
    assert set(checkpoint.glob("global_step2/*")) <= set(files)
    for file in files:
        content = file.read_bytes()
        for other in (None, b"", content[: len(content) // 2], b"?" * len(content)):
            file.unlink(missing_ok=True)
            if other is not None:
                file.write_bytes(other)
            assert find_damage(checkpoint, layout).startswith(f"{file} is ")
        file.write_bytes(content)
        with flipped(file):
            assert find_damage(checkpoint, layout).startswith(f"{file} is damaged (")

    last = files[-1].rename(tmp_path / "aside")
    first, second = run_ranks(argv, log, 2)
    remedy = f"remove {checkpoint} to go on from {output / 'checkpoint-1'}"
    assert first.error == f"{files[-1]} is missing; {remedy}"
    assert (first.code, second.code) == (1, 1) and "error" not in second.err
    shutil.copyfile(last, files[-1])
    flip(files[-1])
    found = run_ranks(argv, log, 2)  # One of them has compared the checksums of this file.
    assert all(done.code != 0 for done in found)
    assert any(f"error: {files[-1]} is damaged (the checksum of" in done.err for done in found)
    torch.save({"nothing": 0}, files[-1])  # The same structure: only DeepSpeed finds it wrong.
    found = run_ranks(argv, log, 2)
    assert all(done.code != 0 for done in found)
    said = f"the run cannot go on from {checkpoint} ("
    assert any(said in done.err for done in found), found[0].err
    last.rename(files[-1])
    succeed_ranks(argv, log)
    assert checkpoints(output) == [1, 2, 3]
    assert_equal_curves(output, one_process(**ADAM))
