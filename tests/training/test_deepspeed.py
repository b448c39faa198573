"""Several processes on the CPU: started by the real `deepspeed` launcher, or, faster, forked."""

import json
import os
import shlex
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accident_fixtures import die_in_step, stop_in_step
from finetune_fixtures import (
    SCRIPT,
    USED_PORTS,
    Ended,
    checkpoints,
    command,
    launch,
    launcher,
    logged,
    options,
    route_apart,
    run,
    run_ranks,
    use_fused_forwards_on_a_cpu,
    weights,
    write_base,
)
from peft import PeftModel
from transformers import AutoModelForCausalLM

from deepseek_moe.training.resume import Layout, find_damage

slow = pytest.mark.slow
pytestmark = pytest.mark.usefixtures("deepspeed_extensions")
STAGES = pytest.mark.parametrize("config", ["zero2_no_offload", "zero3"])

FULL = """
deepspeed finetune.py --model_name_or_path $MODEL_PATH --data_path $DATA_PATH --output_dir $OUTPUT_PATH \
  --num_train_epochs 3 --model_max_length 1024 --per_device_train_batch_size 16 --per_device_eval_batch_size 1 \
  --gradient_accumulation_steps 4 --evaluation_strategy "no" --save_strategy "steps" --save_steps 100 --save_total_limit 100 \
  --learning_rate 2e-5 --warmup_steps 10 --logging_steps 1 --lr_scheduler_type "cosine" --gradient_checkpointing True \
  --report_to "tensorboard" --deepspeed configs/ds_config_zero3.json --bf16 True --use_lora False
"""  # noqa: E501 - as published
QLORA = FULL.replace(
    "--deepspeed configs/ds_config_zero3.json --bf16 True --use_lora False",
    "--deepspeed configs/ds_config_zero2_no_offload.json --bf16 True --use_lora True --bits 4 "
    "--max_grad_norm 0.3 --double_quant --lora_r 64 --lora_alpha 16 --quant_type nf4",
)


@pytest.fixture(autouse=True)
def free_buffers() -> Iterator[None]:
    """Removes the 69 MB of shared memory that DeepSpeed leaves for each process on a CPU."""
    yield
    while USED_PORTS:
        for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{USED_PORTS.pop()}_*"):
            buffer.unlink(missing_ok=True)


# --- The published commands


def run_published(text: str, place: Path, output: Path) -> Ended:
    """Runs a published command with a smaller batch and length, and with a free port."""
    values = {"MODEL_PATH": place / "base", "DATA_PATH": place / "rows.jsonl"}
    for name, value in (values | {"OUTPUT_PATH": output}).items():
        text = text.replace(f"${name}", shlex.quote(str(value)))
    words = shlex.split(text)
    assert words.pop(0) == "deepspeed"
    for option, value in (("model_max_length", "128"), ("per_device_train_batch_size", "1")):
        words[words.index(f"--{option}") + 1] = value
    words += ["--cache_dir", str(place / "cache")]
    return command([*launcher(2), *words], SCRIPT.parent)


@slow
def test_the_published_full_fine_tuning(place: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    done = run_published(FULL, place, output)
    assert done.code == 0, done.err
    assert done.out.splitlines().count(str(output)) == 1
    assert "MISSING" not in done.out + done.err
    rates = [2e-5 * step / 10 for step in range(9)]
    assert logged(output, "learning_rate") == pytest.approx(rates)
    trained, base = weights(output), weights(place / "base")
    assert {name: x.dtype for name, x in trained.items()} == {n: x.dtype for n, x in base.items()}
    # The rate is small and the weights are bf16, so most of them do not move.
    changed = {name for name in base if not torch.equal(trained[name], base[name])}
    assert any(".experts." in name for name in changed) and "lm_head.weight" in changed
    assert all((trained[name] - x).abs().max() < 0.01 for name, x in base.items())
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model(torch.tensor([[4094, 5]])).logits.isfinite().all()


@slow
def test_the_published_qlora(place: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    done = run_published(QLORA, place, output)
    assert done.code == 0, done.err
    config = json.loads((output / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (64, 16)
    quantization = json.loads((output / "base_quantization.json").read_text())
    assert (quantization["bits"], quantization["quant_type"]) == (4, "nf4")
    assert quantization["double_quant"] is True
    assert all(norm > 0.3 for norm in logged(output, "grad_norm"))  # before it is clipped
    base = AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, output).eval()
    learnt = {n for n, p in adapted.named_parameters() if "lora_B" in n and p.abs().max() > 0}
    assert any("mlp.experts" in name for name in learnt)
    assert any("self_attn" in name for name in learnt)
    ids = torch.tensor([[4094, 17, 5]])
    with torch.no_grad(), adapted.disable_adapter():
        before = adapted(ids).logits
    assert not torch.equal(adapted(ids).logits, before)


@slow
@pytest.mark.usefixtures("offload_extension")
def test_zero3_with_offload_starts_from_the_weights_of_the_checkpoint(
    place: Path, tmp_path: Path
) -> None:
    """With a learning rate of 0 the result is the base, bit for bit, experts included."""
    argv = arguments(place, tmp_path / "out", "zero3_offload", max_steps=2, learning_rate=0)
    done = launch(2, argv)
    assert done.code == 0, done.err
    assert "MISSING" not in done.out + done.err
    found, base = weights(tmp_path / "out"), weights(place / "base")
    assert found.keys() == base.keys()
    assert [name for name in base if not torch.equal(found[name], base[name])] == []
    assert all(norm > 0 for norm in logged(tmp_path / "out", "grad_norm"))


# --- Whole runs equal those of one process


def arguments(place: Path, output: Path, config: str | None, **changes: Any) -> list[str]:
    """A command of 2 epochs of 3 steps of 8 rows on two processes, evaluated after each epoch."""
    plain = {
        "model_name_or_path": place / "base",
        "data_path": place / "rows.jsonl",
        "eval_data_path": place / "held.jsonl",
        "cache_dir": place / "cache",
        "output_dir": output,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "per_device_eval_batch_size": 2,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_steps": 3,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
    }
    if config:
        plain["deepspeed"] = SCRIPT.parent / "configs" / f"ds_config_{config}.json"
    return options(**(plain | changes))


@pytest.fixture(scope="module")
def alone(place: Path) -> Path:
    """The output of the same run on one process."""
    one = arguments(place, place / "alone", None, per_device_train_batch_size=4)
    done = run(one, place / "alone_log")
    assert done.code == 0, done.err
    return place / "alone"


def assert_equal_curves(found: Path, wanted: Path) -> None:
    keys = ("loss", "balance_loss", "grad_norm", "learning_rate", "eval_loss", "eval_perplexity")
    for key in keys:
        curve = logged(wanted, key)
        assert len(curve) == (2 if "eval" in key else 6)
        assert logged(found, key) == pytest.approx(curve, rel=2e-4), key


@slow
def test_zero3_on_two_processes_equals_one(place: Path, alone: Path, tmp_path: Path) -> None:
    done = launch(2, arguments(place, tmp_path / "out", "zero3"))
    assert done.code == 0, done.err
    assert_equal_curves(tmp_path / "out", alone)


@slow
def test_zero2_stopped_on_one_process_goes_on_and_equals_one(
    place: Path, alone: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    argv = arguments(place, output, "zero2_no_offload")
    for stopped in run_ranks(argv, tmp_path / "log", 2, stop_second_process):
        assert stopped.code == 143, stopped.err
        assert "Traceback" not in stopped.err
    assert checkpoints(output) == [2]
    repeated = launch(2, argv)
    assert repeated.code == 0, repeated.err
    assert "step 3/6" in repeated.err and "step 2/6" not in repeated.err
    assert_equal_curves(output, alone)


def stop_second_process() -> None:
    if os.environ["RANK"] == "1":
        stop_in_step(3)


# --- Single steps equal those of one process

ADAM = {"learning_rate": 1e-3, "lr_scheduler_type": "cosine", "warmup_steps": 1}
LORA = {"use_lora": True, "lora_r": 4, "lora_dropout": 0}
# A step of plain SGD is as large as the gradient, while Adam's would hide its scale. Nothing but
# the experts trains, so the logged norms are of their gradients alone.
EXPERTS = {
    "trainable": "experts",
    "optim": "sgd",
    "learning_rate": 20,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0,
    "warmup_steps": 0,
}


def steps(place: Path, output: Path, config: str | None, rows: int, **changes: Any) -> list[str]:
    """A command of some steps of `rows` a process, saved at the end and not evaluated."""
    plain = {"gradient_accumulation_steps": 1, "max_steps": 3, "eval_strategy": "no"}
    changes = plain | {"per_device_train_batch_size": rows} | changes
    changes = {"save_steps": changes["max_steps"]} | changes
    argv = arguments(place, output, config, **changes)
    at = argv.index("--eval_data_path")
    return argv[:at] + argv[at + 2 :]


def succeed(argv: list[str], log: Path, before: Callable[[], None] | None = None) -> None:
    for done in run_ranks(argv, log, 2, before):
        assert done.code == 0, done.err


@pytest.fixture(scope="module")
def one_process(place: Path) -> Callable[..., Path]:
    """Makes runs of one process to compare with, each once."""
    made: dict[str, Path] = {}

    def make(**changes: Any) -> Path:
        key = str(changes)
        if key not in made:
            made[key] = place / f"one-{len(made)}"
            done = run(steps(place, made[key], None, 8, **changes), place / "one_log")
            assert done.code == 0, done.err
        return made[key]

    return make


def assert_equal_steps(found: Path, wanted: Path, count: int = 3, rel: float = 1e-4) -> None:
    for key in ("loss", "balance_loss", "grad_norm"):
        curve = logged(wanted, key)
        assert len(curve) == count
        assert logged(found, key) == pytest.approx(curve, rel=rel), key


def assert_equal_experts(found: Path, wanted: Path, base: Path) -> None:
    """Every expert of every layer moved in the same direction by the same length."""
    found, wanted, base = weights(found), weights(wanted), weights(base)
    moved = {name for name in base if not torch.equal(wanted[name], base[name])}
    assert moved == {name for name in base if ".experts." in name}
    for name in moved:
        way = wanted[name].float() - base[name].float()
        off = (found[name].float() - base[name].float() - way).norm() / way.norm()
        assert off < 0.02, name  # They are saved in bf16.


def be_alone_on_a_machine() -> None:
    """Two machines with one folder: each has a first process, but only one of them writes."""
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


CASES: dict[str, tuple[dict[str, Any], Callable[[], None] | None]] = {
    "two machines": (ADAM, be_alone_on_a_machine),
    "full as on a GPU": (ADAM, use_fused_forwards_on_a_cpu),
    "lora as on a GPU": (ADAM | LORA, use_fused_forwards_on_a_cpu),
    "experts alone": (EXPERTS, None),
    # Nothing before the experts trains here.
    "lora of experts": (
        ADAM | LORA | {"trainable": "experts.gate_up_proj,experts.down_proj"},
        None,
    ),
}


@STAGES
@pytest.mark.parametrize("case", CASES)
def test_two_processes_take_the_steps_of_one(
    case: str, config: str, place: Path, tmp_path: Path, one_process: Callable[..., Path]
) -> None:
    changes, before = CASES[case]
    wanted, output = one_process(**changes), tmp_path / "out"
    succeed(steps(place, output, config, 4, **changes), tmp_path / "log", before)
    assert_equal_steps(output, wanted)
    assert checkpoints(output) == [3]
    if changes is EXPERTS:
        assert_equal_experts(output, wanted, place / "base")


@slow
@STAGES
def test_four_processes_take_the_steps_of_one(
    config: str, place: Path, tmp_path: Path, one_process: Callable[..., Path]
) -> None:
    wanted, output = one_process(**EXPERTS), tmp_path / "out"
    done = launch(4, steps(place, output, config, 2, **EXPERTS))
    assert done.code == 0, done.err
    assert_equal_steps(output, wanted)
    assert_equal_experts(output, wanted, place / "base")


@slow
@pytest.mark.parametrize(("config", "processes"), [("zero2_no_offload", 4), ("zero3", 2)])
def test_fifty_steps_are_those_of_one_process(
    config: str, processes: int, place: Path, tmp_path: Path, one_process: Callable[..., Path]
) -> None:
    fifty = ADAM | {"max_steps": 50, "warmup_steps": 5}
    wanted = one_process(**fifty)
    curve = logged(wanted, "loss")
    assert curve[-1] < 0.75 * curve[0]
    done = launch(processes, steps(place, tmp_path / "out", config, 8 // processes, **fifty))
    assert done.code == 0, done.err
    assert_equal_steps(tmp_path / "out", wanted, 50, 1e-3)


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=slow)])
def test_processes_that_route_to_different_experts_do_not_wait_for_each_other(
    processes: int, place: Path, tmp_path: Path
) -> None:
    write_base(tmp_path / "base", num_experts_per_tok=2)
    output, base = tmp_path / "out", tmp_path / "base"
    argv = steps(place, output, "zero3", 2, model_name_or_path=base)
    for done in run_ranks(argv, tmp_path / "log", processes, partial(route_apart, str(tmp_path))):
        assert done.code == 0, done.err
    picked = [json.loads((tmp_path / f"picks{r}.json").read_text()) for r in range(processes)]
    assert picked == [[2 * rank, 2 * rank + 1] for rank in range(processes)]
    found, before = weights(output), weights(base)
    for expert in range(8):  # The gradients of all processes' experts arrived, and no other's.
        name = f"model.layers.1.mlp.experts.{expert}.up_proj.weight"
        assert torch.equal(found[name], before[name]) == (expert >= 2 * processes), name


@pytest.mark.parametrize(
    ("config", "stage"), [("zero2_no_offload", 2), pytest.param("zero3", 3, marks=slow)]
)
def test_a_damaged_checkpoint_is_one_line(
    config: str, stage: int, place: Path, tmp_path: Path
) -> None:
    output, log = tmp_path / "out", tmp_path / "log"
    argv = steps(place, output, config, 4, **ADAM, save_steps=1, save_total_limit=2)
    killed = run_ranks(argv, log, 2, partial(die_in_step, 3))
    assert [done.code for done in killed] == [-9, -9]
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

    last = files[-1]
    last.rename(tmp_path / "aside")
    first, second = run_ranks(argv, log, 2)
    assert first.error.startswith(f"{last} is missing; remove {checkpoint} to go on from ")
    assert (first.code, second.code) == (1, 1) and "error" not in second.err
    torch.save({"nothing": 0}, last)  # The same structure: only DeepSpeed finds what is wrong.
    found = run_ranks(argv, log, 2)
    assert all(done.code != 0 for done in found)
    said = f"the run cannot go on from {checkpoint} ("
    assert any(said in done.err for done in found), found[0].err
    (tmp_path / "aside").rename(last)
    succeed(argv, log)
    assert checkpoints(output) == [2, 3]
