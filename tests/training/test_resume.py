"""A run goes on from a checkpoint as if never interrupted, or names the file that is broken."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accident_fixtures import die_in_step
from finetune_fixtures import assert_same, checkpoints, logged, run, succeed
from flip_fixtures import flip, flipped
from safetensors.torch import load_file, save_file

from deepseek_moe.checkpoint_writer import write_shards
from deepseek_moe.errors import RunError
from deepseek_moe.processes import CollectiveRunError
from deepseek_moe.training.resume import (
    Layout,
    find_damage,
    refuse_damaged,
    refuse_other_states,
    report_unreadable,
)

MakeArgv = Callable[..., list[str]]
Copy = Callable[[str], Path]
LORA = {"use_lora": True, "lora_dropout": 0.2, "lora_rank": 3}
MODES: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": LORA,
    "chosen experts": {"train_experts": "expert_cfg.json"},
    "qlora": LORA
    | {"bits": 4, "modules_to_save": "embed_tokens,lm_head,gate", "optim": "adamw_bnb_8bit"},
    # These weights are in fp32 among others in bf16.
    "chosen modules": {"trainable": "self_attn", "bf16": True, "learning_rate": 1e-4},
    "in the backward pass": {"single_gpu_full": True, "bf16": True, "weight_decay": 0.1},
    "chosen experts, in the backward pass": {"train_experts": "expert_cfg.json"}
    | {"single_gpu_full": True, "bf16": True},
    "chosen experts over 4 bits": {"train_experts": "expert_cfg.json", "bits": 4, "bf16": True}
    | {"eval_strategy": "epoch", "eval_fraction": 0.1, "recompute_experts": True}
    | {"packing": True, "model_max_length": 128, "per_device_train_batch_size": 1}
    | {"max_steps": 12},
    "lora of chosen experts": LORA | {"train_experts": "expert_cfg.json"},
}
COMMON = {"trainer_state.json", "rng_state.pth", "scheduler.pt", "optimizer.pt"}
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
FILES = {
    "full": COMMON | {"config.json", "model.safetensors"},
    "lora": COMMON | ADAPTER,
    "qlora": COMMON | ADAPTER | {"base_quantization.json"},
    "chosen experts": COMMON | {"delta.safetensors"},
}
BROKEN: dict[str, Callable[[bytes], bytes | None]] = {
    "missing": lambda content: None,
    "empty": lambda content: b"",
    "truncated": lambda content: content[: len(content) // 2],
    "garbage": lambda content: bytes(range(256)) * (1 + len(content) // 256),
}


@pytest.fixture(scope="module")
def interrupted(place: Path, argv: MakeArgv) -> Copy:
    """Makes, once for each mode, the output folder of a run that was killed after 6 of 12 steps."""
    made: dict[str, Path] = {}

    def make(mode: str) -> Path:
        if mode not in made:
            made[mode] = place / mode
            command = argv(made[mode], **MODES[mode])
            killed = run(command, place / "log", partial(die_in_step, 8))
            assert killed.code == -9, killed.err
            assert checkpoints(made[mode]) == [3, 6]
        return made[mode]

    return make


@pytest.fixture
def copied(interrupted: Copy, tmp_path: Path) -> Copy:
    return lambda mode: shutil.copytree(interrupted(mode), tmp_path / "out")


def layout_of(mode: str) -> Layout:
    more = {"adapter": "lora" in mode, "quantized": mode == "qlora", "delta": "chosen" in mode}
    return Layout(processes=1, stage=None, **more)


@contextmanager
def broken(file: Path, how: Callable[[bytes], bytes | None]) -> Iterator[None]:
    """Changes or removes a file for a while."""
    before = file.read_bytes()
    file.unlink()
    if (content := how(before)) is not None:
        file.write_bytes(content)
    yield
    file.write_bytes(before)


@pytest.mark.parametrize("mode", FILES)
def test_every_file_that_is_read_back_is_checked(mode, copied):
    layout, checkpoint = layout_of(mode), copied(mode) / "checkpoint-6"
    assert find_damage(checkpoint, layout) is None
    files = [file for file, _ in layout.checks(checkpoint)]
    assert {file.name for file in files} == FILES[mode]
    remedy = f"; remove {checkpoint} to go on from {checkpoint.parent / 'checkpoint-3'}"
    for file in files:
        for kind, how in BROKEN.items():
            with broken(file, how), pytest.raises(CollectiveRunError) as caught:
                refuse_damaged(checkpoint, layout)
            said, wrong = str(caught.value), kind if kind in ("missing", "empty") else "damaged ("
            assert said.startswith(f"{file} is {wrong}"), said
            assert said.endswith(remedy)
            assert "\n" not in said and caught.value.exit_code == 1


def save(file: Path, change: Callable[[Any], Any]) -> None:
    content = torch.load(file, weights_only=False)
    change(content)
    torch.save(content, file)


def set_step_5(file: Path) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | {"global_step": 5}))


def lose_a_weight(file: Path) -> None:
    tensors = load_file(file)
    del tensors[min(name for name in tensors if "experts.3." in name or "lora" in name)]
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "how", "found"),
    [
        ("trainer_state.json", set_step_5, "it is of step 5"),
        ("trainer_state.json", lambda file: file.write_text("[]"), "damaged"),
        ("scheduler.pt", lambda file: save(file, lambda x: x.update(last_epoch=3)), "of step 3"),
        ("scheduler.pt", lambda file: torch.save([1], file), "damaged"),
        # Nothing that could execute code is loaded.
        ("scheduler.pt", lambda file: torch.save(Path("x"), file), "Weights only load failed"),
        ("optimizer.pt", lambda file: torch.save(Path("x"), file), "Weights only load failed"),
        ("optimizer.pt", lambda file: torch.save({"state": {}}, file), "damaged"),
        ("optimizer.pt", flip, "the checksum of"),
        ("rng_state.pth", lambda file: file.write_bytes(b"PK\x05\x06" + bytes(18)), "torch did"),
        ("config.json", lambda file: file.write_text("[]"), "no JSON object"),
        ("model.safetensors", lose_a_weight, "experts.3.down_proj.weight is missing"),
    ],
)
def test_a_file_of_another_checkpoint_or_format_is_damaged(name, how, found, copied):
    checkpoint = copied("full") / "checkpoint-6"
    how(checkpoint / name)
    (checkpoint / "checksums.json").unlink()
    said = find_damage(checkpoint, layout_of("full"))
    assert said and said.startswith(f"{checkpoint / name} is damaged (") and found in said


@pytest.mark.parametrize("mode", FILES)
def test_a_flipped_bit_of_any_file_is_named(mode, copied):
    layout, checkpoint = layout_of(mode), copied(mode) / "checkpoint-6"
    files = sorted(set(checkpoint.iterdir()) - {checkpoint / "checksums.json"})
    assert {file.name for file in files} > FILES[mode]
    for file in files:
        with flipped(file):
            said = find_damage(checkpoint, layout)
            assert said and said.startswith(f"{file} is damaged ("), said
    (checkpoint / "checksums.json").unlink()  # as an older version of this code left it
    with flipped(checkpoint / "tokenizer.json"):
        assert find_damage(checkpoint, layout) is None


def test_a_base_that_is_damaged_is_refused(place, argv, tmp_path):
    base = shutil.copytree(place / "base", tmp_path / "base")
    write_shards(iter(load_file(base / "model.safetensors").items()), base, 10**9)
    flip(base / "model.safetensors")
    done = run(argv(tmp_path / "out", model_name_or_path=base), tmp_path / "log")
    assert done.refusal.startswith(f"{base / 'model.safetensors'} is damaged (the checksum of ")


def test_every_shard_of_the_weights_is_checked(copied):
    checkpoint = copied("full") / "checkpoint-6"
    tensors = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    write_shards(iter(tensors.items()), checkpoint, 10**6)
    assert find_damage(checkpoint, layout_of("full")) is None
    files = list(checkpoint.glob("model*"))
    assert len(files) > 2  # with the index
    for file in files:
        for how in BROKEN.values():
            with broken(file, how):
                assert find_damage(checkpoint, layout_of("full"))


def test_the_remedy_skips_checkpoints_that_are_broken_too(copied):
    output, layout = copied("full"), layout_of("full")
    (output / "checkpoint-3" / "scheduler.pt").unlink()
    later = output / "checkpoint-10"  # though before the others in the alphabet
    shutil.copytree(output / "checkpoint-3", later)
    (output / "checkpoint-6" / "scheduler.pt").unlink()
    with pytest.raises(CollectiveRunError, match=r"; remove \S+-6 and \S+-3 to begin anew"):
        refuse_damaged(output / "checkpoint-6", layout)


def test_another_number_of_processes_is_refused(copied):
    checkpoint = copied("full") / "checkpoint-6"
    one, two = Layout(1, None, adapter=False), Layout(2, None, adapter=False)
    said = r"by 1 processes, and this run has 2; repeat .* with 1,"
    with pytest.raises(CollectiveRunError, match=said):
        refuse_damaged(checkpoint, two)
    states = (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_1.pth")
    shutil.copyfile(states, checkpoint / "rng_state_0.pth")
    assert find_damage(checkpoint, two) is None
    said = r"by 2 processes, and this run has 1; repeat .* with 2,"
    with pytest.raises(CollectiveRunError, match=said):
        refuse_damaged(checkpoint, one)
    states.unlink()
    assert find_damage(checkpoint, two).endswith("rng_state_1.pth is missing")


def test_an_error_of_loading_becomes_one_line(copied):
    checkpoint, layout = copied("full") / "checkpoint-6", layout_of("full")

    def resume(error: Exception, is_read: bool = False) -> None:
        with report_unreadable(checkpoint, layout, lambda: is_read):
            raise error

    said = r"^the run cannot go on from .*point-6 \(RuntimeError: a b\); if re.* move .*point-3$"
    with pytest.raises(RunError, match=said):
        resume(RuntimeError("a\nb"))
    with pytest.raises(RuntimeError, match="in a step"):
        resume(RuntimeError("in a step"), is_read=True)
    host = RuntimeError("DefaultCPUAllocator: can't allocate memory")
    for unchanged in (RunError("known"), torch.OutOfMemoryError("memory"), MemoryError(), host):
        with pytest.raises(type(unchanged)) as caught:
            resume(unchanged)
        assert caught.value is unchanged


def test_states_of_other_weights_are_refused(tmp_path):
    file = tmp_path / "optimizer.pt"
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = torch.optim.AdamW(weights)
    torch.save(optimizer.state_dict(), file)
    with pytest.raises(ValueError, match="no states"):
        refuse_other_states(optimizer, file)
    sum(weight.sum() for weight in weights).backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), file)
    refuse_other_states(optimizer, file)
    with pytest.raises(ValueError, match="of 2 weights, and this run trains 1"):
        refuse_other_states(torch.optim.AdamW(weights[:1]), file)


@pytest.mark.parametrize("mode", list(MODES)[3:])
def test_a_resumed_run_equals_a_whole_one(mode, copied, argv, tmp_path):
    """test_finetune.py kills runs of the first two modes. The third has the fewest parts."""
    whole, output, log = tmp_path / "whole", copied(mode), tmp_path / "log"
    for folder in (output, whole):
        succeed(argv(folder, **MODES[mode]), log)
    highest = MODES[mode].get("learning_rate", 1e-2)
    rates = [highest * (12 - step) / 12 for step in range(12)]
    assert logged(output, "learning_rate") == pytest.approx(rates)
    for key in ("learning_rate", "loss", "grad_norm", "balance_loss", "load_over_mean"):
        assert logged(output, key) == logged(whole, key)
    for folder in (Path(), Path("checkpoint-12")):
        assert_same(output / folder, whole / folder)


def flatten_states(content: Any) -> None:
    for state in content["state"].values():
        state["exp_avg"] = state["exp_avg"].flatten()


@pytest.mark.parametrize(
    ("mode", "name", "how", "found"),
    [
        ("full", "optimizer.pt", lambda file: save(file, flatten_states), "a state is"),
        ("full", "rng_state.pth", lambda file: save(file, lambda x: x.pop("numpy")), "numpy"),
        ("lora", "adapter_model.safetensors", lose_a_weight, "it lacks base_model"),
    ],
)
def test_a_whole_file_that_does_not_fit_is_one_line(mode, name, how, found, copied, argv, tmp_path):
    output = copied(mode)
    checkpoint = output / "checkpoint-6"
    how(checkpoint / name)
    assert find_damage(checkpoint, layout_of(mode)) is None  # Its structure is whole.
    done = run(argv(output, **MODES[mode]), tmp_path / "log")
    assert done.code == 1, done.err
    assert f"cannot go on from {checkpoint} (" in done.error and found in done.error
    assert f"move {checkpoint} away to go on from {output / 'checkpoint-3'}" in done.error
    assert checkpoints(output) == [3, 6]
