"""With several processes on the CPU: through the real `deepspeed` launcher, which is slow, and the
same in short by processes that are forked.
"""

import json
import math
import os
import shlex
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import finetune_fixtures
import pytest
import torch
from conftest import compile_extensions
from finetune_fixtures import (
    SCRIPT,
    Ended,
    accelerate_on_a_cpu,
    checkpoints,
    command,
    end,
    kill_at,
    kill_group,
    launch,
    launcher,
    logged,
    options,
    route_apart,
    run,
    start,
    weights,
    write_base,
    write_rows,
)
from peft import PeftModel
from transformers import AutoModelForCausalLM

from deepseek_moe.training.arguments import ModelArguments
from deepseek_moe.training.disk_need import disk_need
from deepseek_moe.training.dry_run import meta_model
from deepseek_moe.training.resume import Layout, damage

slow = pytest.mark.slow
pytestmark = pytest.mark.usefixtures("deepspeed_extensions")

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
TRACED = """
import os, runpy, sys
sys.path[:0] = [{tests!r}, os.path.dirname({script!r})]
import finetune_fixtures
{then}
sys.argv[0] = {script!r}
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deepspeed")
    write_base(folder / "base")
    write_rows(folder / "rows.jsonl", 24)
    write_rows(folder / "held.jsonl", 7)
    return folder


@pytest.fixture(autouse=True)
def buffers_are_freed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On CPUs DeepSpeed leaves 69 MB of memory a process."""
    original, used = finetune_fixtures.free_port, []

    def noted() -> int:
        used.append(original())
        return used[-1]

    monkeypatch.setattr(finetune_fixtures, "free_port", noted)
    yield
    for port in used:
        for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
            buffer.unlink(missing_ok=True)


def published(text: str, place: Path, output: Path) -> Ended:
    """The command as published; a smaller batch and length, and a port that is free."""
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
    done = published(FULL, place, output)
    assert done.code == 0, done.err
    assert done.out.splitlines().count(str(output)) == 1
    assert "MISSING" not in done.out + done.err
    rates = [2e-5 * step / 10 for step in range(9)]
    assert logged(output, "learning_rate") == pytest.approx(rates)
    trained, base = weights(output), weights(place / "base")
    assert {name: x.dtype for name, x in trained.items()} == {n: x.dtype for n, x in base.items()}
    # The learning rate is small, and the weights are bf16: most move by less than can be seen.
    changed = {name for name in base if not torch.equal(trained[name], base[name])}
    assert any(".experts." in name for name in changed) and "lm_head.weight" in changed
    assert all((trained[name] - x).abs().max() < 0.01 for name, x in base.items())
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model(torch.tensor([[4094, 5]])).logits.isfinite().all()


@slow
def test_the_published_qlora(place: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    done = published(QLORA, place, output)
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


# --- What is compiled once

AS_TORCH_DOES = """
import os, sys, time
from pathlib import Path
from torch.utils.file_baton import FileBaton
folder = Path(os.environ["TORCH_EXTENSIONS_DIR"], "shm")
folder.mkdir(exist_ok=True)
baton = FileBaton(str(folder / "lock"))
if not baton.try_acquire():
    baton.wait()
    raise SystemExit("somebody else compiled at the same time")
{then}
(folder / "shm.so").write_text("compiled")
baton.release()
"""


def test_a_compilation_that_was_killed_does_not_block_the_next(tmp_path: Path) -> None:
    killed = AS_TORCH_DOES.format(then="os.kill(os.getpid(), 9)")
    with pytest.raises(subprocess.CalledProcessError):
        compile_extensions(tmp_path, killed)
    assert (tmp_path / "shm" / "lock").is_file()
    whole = AS_TORCH_DOES.format(then="time.sleep(0.5)")
    with ThreadPoolExecutor() as pool:  # two at once, which wait for each other
        both = [pool.submit(compile_extensions, tmp_path, whole, 60) for _ in range(2)]
        for one in both:
            one.result()
    assert (tmp_path / "shm" / "shm.so").read_text() == "compiled"
    assert not (tmp_path / "shm" / "lock").exists()


# --- Equal to one process


def arguments(place: Path, output: Path, config: str | None, **changes: Any) -> list[str]:
    """2 epochs of 3 steps of 8 rows on two processes, evaluated after each of them."""
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
    """The same run on one process."""
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
def test_the_rates_are_those_asked_for(alone: Path) -> None:
    rates = [0, 0.5e-3] + [0.5e-3 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]
    assert logged(alone, "learning_rate") == pytest.approx(rates)


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
    signal = 'if os.environ["RANK"] == "1": finetune_fixtures.terminate_at(3)'
    argv = arguments(place, output, "zero2_no_offload")
    stopped = launch(2, argv, traced(tmp_path, signal))
    assert stopped.code == 143, stopped.err
    assert checkpoints(output) == [2]
    assert "Traceback" not in stopped.err
    repeated = launch(2, argv)
    assert repeated.code == 0, repeated.err
    assert "step 3/6" in repeated.err and "step 2/6" not in repeated.err
    assert_equal_curves(output, alone)


def traced(folder: Path, then: str) -> Path:
    """The script, after some Python of the test's."""
    script = folder / "traced.py"
    tests = str(Path(__file__).parents[1])
    script.write_text(TRACED.format(tests=tests, then=then, script=str(SCRIPT)))
    return script


# --- The same, in short and at length


STAGES = pytest.mark.parametrize("config", ["zero2_no_offload", "zero3"])
ADAM = {"learning_rate": 1e-3, "lr_scheduler_type": "cosine", "warmup_steps": 1}
# A step of plain SGD is as large as the gradient, where Adam's would hide its scale; nothing but
# the experts trains, so the logged norms are of their gradients alone.
EXPERTS = {
    "trainable": "experts",
    "optim": "sgd",
    "learning_rate": 20,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0,
    "warmup_steps": 0,
}
EQUAL = ("loss", "balance_loss", "grad_norm")


def steps(place: Path, output: Path, config: str | None, rows: int, **changes: Any) -> list[str]:
    """Some steps of `rows` a process, logged in a checkpoint at the end and not evaluated."""
    plain = {"gradient_accumulation_steps": 1, "save_strategy": "no", "max_steps": 3}
    changes = plain | {"per_device_train_batch_size": rows, "eval_strategy": "no"} | changes
    changes |= {"save_strategy": "steps", "save_steps": changes["max_steps"]}
    argv = arguments(place, output, config, **changes)
    at = argv.index("--eval_data_path")
    return argv[:at] + argv[at + 2 :]


def forked(argv: list[str], log: Path, processes: int, before: Any = None) -> list[Ended]:
    """The script in processes that find each other as the launcher's do."""
    shared = (processes, finetune_fixtures.free_port(), os.environ["TORCH_EXTENSIONS_DIR"], before)
    ranks = range(processes)
    started = [start(argv, Path(f"{log}{r}"), partial(be_one_of, r, *shared)) for r in ranks]
    try:
        return [end(started[r], Path(f"{log}{r}"), timeout=60) for r in ranks]
    finally:
        for process in started:
            kill_group(process)


def succeed(argv: list[str], log: Path, before: Any = None) -> None:
    """Two processes."""
    for done in forked(argv, log, 2, before):
        assert done.code == 0, done.err


def be_one_of(rank: int, processes: int, port: int, extensions: str, before: Any) -> None:
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
    numbers |= {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    os.environ |= {name: str(value) for name, value in numbers.items()}
    os.environ["TORCH_EXTENSIONS_DIR"] = extensions
    if before:
        before()


@pytest.fixture(scope="module")
def one_process(place: Path) -> Any:
    """Runs of one process that others are compared with, each made once."""
    made: dict[str, Path] = {}

    def make(name: str, **changes: Any) -> Path:
        if name not in made:
            made[name] = place / f"one-{name}"
            done = run(steps(place, made[name], None, 8, **changes), place / "one_log")
            assert done.code == 0, done.err
        return made[name]

    return make


def assert_equal_steps(found: Path, wanted: Path, count: int, rel: float) -> None:
    for key in EQUAL:
        curve = logged(wanted, key)
        assert len(curve) == count
        assert logged(found, key) == pytest.approx(curve, rel=rel), key


def assert_equal_experts(found: Path, wanted: Path, base: Path) -> None:
    """Every expert of every layer went the same way as far."""
    found, wanted, base = weights(found), weights(wanted), weights(base)
    moved = {name for name in base if not torch.equal(wanted[name], base[name])}
    assert moved == {name for name in base if ".experts." in name}
    for name in moved:
        way = wanted[name].float() - base[name].float()
        off = (found[name].float() - base[name].float() - way).norm() / way.norm()
        assert off < 0.02, name  # they are saved in bf16


@STAGES
def test_two_processes_take_the_steps_of_one(
    config: str, place: Path, tmp_path: Path, one_process: Any
) -> None:
    alone = one_process("adam", **ADAM)
    argv = steps(place, tmp_path / "out", config, 4, **ADAM)
    succeed(argv, tmp_path / "log")
    assert_equal_steps(tmp_path / "out", alone, 3, 1e-4)


@slow
@pytest.mark.parametrize(
    ("config", "changes"),
    [("zero2_no_offload", {}), ("zero2_no_offload", {"use_lora": True, "lora_rank": 64})],
)
def test_the_disk_that_a_checkpoint_needs_is_what_it_takes(
    config: str, changes: dict[str, Any], place: Path, tmp_path: Path
) -> None:
    """To 10 %: DeepSpeed keeps fp32 copies of what trains, and below stage 3 what computes."""
    argv = steps(place, tmp_path / "out", config, 4, bf16=True, **changes)
    [done] = forked(argv, tmp_path / "log", 1)
    assert done.code == 0, done.err
    folder = tmp_path / "out" / "checkpoint-3"
    files = [file for kind in ("*.pt", "*.safetensors") for file in folder.rglob(kind)]
    model = ModelArguments(str(place / "base"), **changes)
    training = SimpleNamespace(
        bf16=True, single_gpu_full=False, deepspeed={"zero_optimization": {"stage": 2}},
        save_strategy="steps", save_steps=3, save_total_limit=None,
    )  # fmt: skip
    need = disk_need(meta_model(place / "base", model), model, training, 3, 3)
    assert sum(file.stat().st_size for file in files) == pytest.approx(need.checkpoint, rel=0.1)


def zero_content(file: Path) -> None:
    """A file of the same structure, in which a library finds something else."""
    torch.save({"nothing": 0}, file)


@pytest.mark.parametrize(
    ("config", "stage"), [("zero2_no_offload", 2), pytest.param("zero3", 3, marks=slow)]
)
def test_a_damaged_checkpoint_is_one_line(
    config: str, stage: int, place: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    argv = steps(place, output, config, 4, **ADAM, save_total_limit=2)
    argv[argv.index("--save_steps") + 1] = "1"
    accident = kill_at("deepseek_moe.training.trainer.FineTuner", "compute_loss", 3)
    assert [done.code for done in forked(argv, tmp_path / "log", 2, accident)] == [-9, -9]
    checkpoint, layout = output / "checkpoint-2", Layout(2, stage, adapter=False)
    assert damage(checkpoint, layout) is None
    files = [file for file, _ in layout.checks(checkpoint)]
    assert {file.name for file in checkpoint.glob("global_step2/*")} <= {f.name for f in files}
    for file in files:
        content = file.read_bytes()
        for other in (None, b"", content[: len(content) // 2], b"?" * len(content)):
            file.unlink(missing_ok=True)
            if other is not None:
                file.write_bytes(other)
            assert damage(checkpoint, layout).startswith(f"{file} is ")
        file.write_bytes(content)

    last = files[-1]
    last.rename(tmp_path / "aside")
    first, second = forked(argv, tmp_path / "log", 2)
    assert first.error.startswith(f"{last} is missing; remove {checkpoint} to go on from ")
    assert (first.code, second.code) == (1, 1) and "error" not in second.err
    zero_content(last)  # which only a library finds
    found = forked(argv, tmp_path / "log", 2)
    assert all(done.code != 0 for done in found)
    said = f"the states of DeepSpeed of {checkpoint} cannot be read back ("
    assert any(said in done.err for done in found), found[0].err
    (tmp_path / "aside").rename(last)
    succeed(argv, tmp_path / "log")
    assert checkpoints(output) == [2, 3]


def be_alone_on_a_machine() -> None:
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


@STAGES
def test_two_machines_with_one_folder_take_the_steps_of_one(
    config: str, place: Path, tmp_path: Path, one_process: Any
) -> None:
    """Each has a first process; one of them all writes what there is one of."""
    alone = one_process("adam", **ADAM)
    argv = steps(place, tmp_path / "out", config, 4, **ADAM)
    succeed(argv, tmp_path / "log", be_alone_on_a_machine)
    assert_equal_steps(tmp_path / "out", alone, 3, 1e-4)
    assert checkpoints(tmp_path / "out") == [3]


@STAGES
@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_way_of_a_gpu_takes_the_same_steps(
    method: str, config: str, place: Path, tmp_path: Path, one_process: Any
) -> None:
    lora = {"use_lora": True, "lora_r": 4, "lora_dropout": 0} if method == "lora" else {}
    alone = one_process("lora" if lora else "adam", **ADAM, **lora)
    argv = steps(place, tmp_path / "out", config, 4, **ADAM, **lora)
    succeed(argv, tmp_path / "log", accelerate_on_a_cpu)
    assert_equal_steps(tmp_path / "out", alone, 3, 1e-4)


@STAGES
def test_gradients_of_experts_are_as_large_as_on_one_process(
    config: str, place: Path, tmp_path: Path, one_process: Any
) -> None:
    alone = one_process("experts", **EXPERTS)
    argv = steps(place, tmp_path / "out", config, 4, **EXPERTS)
    succeed(argv, tmp_path / "log")
    assert_equal_steps(tmp_path / "out", alone, 3, 1e-4)
    assert_equal_experts(tmp_path / "out", alone, place / "base")


def test_nothing_before_the_experts_trains_and_all_is_kept(
    place: Path, tmp_path: Path, one_process: Any
) -> None:
    lora = {"use_lora": True, "lora_r": 4, "lora_dropout": 0}
    lora |= {"trainable": "experts.gate_up_proj,experts.down_proj"}
    alone = one_process("experts-lora", **ADAM, **lora)
    argv = steps(place, tmp_path / "out", "zero3", 4, **ADAM, **lora)
    succeed(argv, tmp_path / "log")
    assert_equal_steps(tmp_path / "out", alone, 3, 1e-4)


@slow
@STAGES
def test_gradients_of_experts_on_four_processes(
    config: str, place: Path, tmp_path: Path, one_process: Any
) -> None:
    alone = one_process("experts", **EXPERTS)
    done = launch(4, steps(place, tmp_path / "out", config, 2, **EXPERTS))
    assert done.code == 0, done.err
    assert_equal_steps(tmp_path / "out", alone, 3, 1e-4)
    assert_equal_experts(tmp_path / "out", alone, place / "base")


@slow
@STAGES
@pytest.mark.parametrize("processes", [2, 4])
def test_fifty_steps_are_those_of_one_process(
    config: str, processes: int, place: Path, tmp_path: Path, one_process: Any
) -> None:
    fifty = ADAM | {"max_steps": 50, "warmup_steps": 5}
    alone = one_process("fifty", **fifty)
    curve = logged(alone, "loss")
    assert curve[-1] < 0.75 * curve[0]
    done = launch(processes, steps(place, tmp_path / "out", config, 8 // processes, **fifty))
    assert done.code == 0, done.err
    assert_equal_steps(tmp_path / "out", alone, 50, 1e-3)


# --- Routing apart


@slow
def test_four_processes_that_route_to_different_experts_do_not_wait_for_each_other(
    place: Path, tmp_path: Path
) -> None:
    """K is 2 of 8 experts, and process r uses 2r and 2r + 1 only."""
    write_base(tmp_path / "base", num_experts_per_tok=2)
    changes = {
        "model_name_or_path": tmp_path / "base",
        "per_device_train_batch_size": 1,
        "num_train_epochs": 1,
    }
    then = f"finetune_fixtures.route_apart({str(tmp_path)!r})"
    done = launch(4, arguments(place, tmp_path / "out", "zero3", **changes), traced(tmp_path, then))
    assert done.code == 0, done.err
    picked = [set(json.loads((tmp_path / f"picks{r}.json").read_text())) for r in range(4)]
    assert all(len(experts) == 2 for experts in picked)
    assert all(not one & other for one, other in combinations(picked, 2))
    found, base = weights(tmp_path / "out"), weights(tmp_path / "base")
    for expert in range(8):  # the gradients of all ranks' experts arrived
        name = f"model.layers.1.mlp.experts.{expert}.up_proj.weight"
        assert not torch.equal(found[name], base[name])


def test_two_processes_that_route_apart_do_not_wait_for_each_other(
    place: Path, tmp_path: Path
) -> None:
    write_base(tmp_path / "base", num_experts_per_tok=2)
    argv = steps(place, tmp_path / "out", "zero3", 4, model_name_or_path=tmp_path / "base")
    ended = forked(argv, tmp_path / "log", 2, partial(route_apart, str(tmp_path)))
    assert [done.code for done in ended] == [0, 0], ended[0].err
    picked = [json.loads((tmp_path / f"picks{r}.json").read_text()) for r in range(2)]
    assert picked == [[0, 1], [2, 3]]
    found, base = weights(tmp_path / "out"), weights(tmp_path / "base")
    moved = {name for name in base if not torch.equal(found[name], base[name])}
    for expert in range(8):  # gradients of both ranks' experts arrived, and no other's
        name = f"model.layers.1.mlp.experts.{expert}.up_proj.weight"
        assert (name in moved) == (expert < 4), name
