"""A run goes on from a checkpoint that is whole, and says which file is not: nothing in between."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_fixtures import (
    assert_same,
    checkpoints,
    kill_at,
    logged,
    options,
    run,
    write_base,
    write_rows,
)
from safetensors.torch import load_file, save_file

from deepseek_moe.errors import CollectiveRunError, RunError
from deepseek_moe.training.resume import (
    Layout,
    damage,
    reading_back,
    refuse_damaged,
    refuse_other_states,
)

LORA = {"use_lora": True, "lora_dropout": 0.2, "lora_rank": 3}
MODES: dict[str, dict[str, Any]] = {
    "full": {},
    "single_gpu_full": {"single_gpu_full": True, "bf16": True},
    "lora": LORA,
    "lora and whole modules": LORA | {"modules_to_save": "embed_tokens,lm_head,gate"},
    "qlora": LORA | {"bits": 4},
    "8-bit": {"optim": "adamw_bnb_8bit"},
}
COMMON = ["trainer_state.json", "rng_state.pth", "scheduler.pt", "optimizer.pt"]
FILES = {
    "full": [*COMMON, "config.json", "model.safetensors"],
    "lora": [*COMMON, "adapter_config.json", "adapter_model.safetensors"],
}
BROKEN: dict[str, Callable[[bytes], bytes | None]] = {
    "missing": lambda content: None,
    "empty": lambda content: b"",
    "truncated": lambda content: content[: len(content) // 2],
    "garbage": lambda content: bytes(range(256)) * (1 + len(content) // 256),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    write_base(folder / "base")
    write_rows(folder / "rows.jsonl")
    return folder


@pytest.fixture(scope="module")
def argv(place: Path) -> Callable[..., list[str]]:
    """A command of 12 steps with a checkpoint every 3; keywords change it."""

    def argv(output: Path, **changes: Any) -> list[str]:
        plain = {
            "model_name_or_path": place / "base",
            "data_path": place / "rows.jsonl",
            "cache_dir": place / "cache",
            "output_dir": output,
            "num_train_epochs": 2,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "save_steps": 3,
            "report_to": "none",
        }
        return options(**(plain | changes))

    return argv


@pytest.fixture(scope="module")
def interrupted(place: Path, argv: Callable[..., list[str]]) -> Callable[[str], Path]:
    """The output folder of a run that was killed after 6 of 12 steps; made once for each mode."""
    made: dict[str, Path] = {}

    def make(mode: str) -> Path:
        if mode not in made:
            made[mode] = place / mode
            accident = kill_at("deepseek_moe.training.trainer.FineTuner", "compute_loss", 8)
            killed = run(argv(made[mode], **MODES[mode]), place / "log", accident)
            assert killed.code == -9, killed.err
            assert checkpoints(made[mode]) == [3, 6]
        return made[mode]

    return make


@pytest.fixture
def copied(interrupted: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda mode: shutil.copytree(interrupted(mode), tmp_path / "out")


def layout_of(mode: str) -> Layout:
    return Layout(processes=1, stage=None, adapter="lora" in mode)


def change(file: Path, how: Callable[[bytes], bytes | None]) -> None:
    content = how(file.read_bytes())
    file.unlink()
    if content is not None:
        file.write_bytes(content)


# --- What is looked at


@pytest.mark.parametrize("mode", MODES)
def test_each_file_that_is_read_back_is_looked_at(
    mode: str, interrupted: Callable[[str], Path], tmp_path: Path
) -> None:
    """Of every kind of run; missing, empty, truncated, and of other bytes."""
    layout, output = layout_of(mode), interrupted(mode)
    assert damage(output / "checkpoint-6", layout) is None
    files = [file.name for file, _ in layout.checks(output / "checkpoint-6")]
    assert list(dict.fromkeys(files)) == FILES["lora" if "lora" in mode else "full"]
    for name in files:
        for kind, how in BROKEN.items():
            shutil.copytree(output, tmp_path / "out")
            checkpoint = tmp_path / "out" / "checkpoint-6"
            change(checkpoint / name, how)
            with pytest.raises(CollectiveRunError) as caught:
                refuse_damaged(checkpoint, layout)
            said = str(caught.value)
            wrong = kind if kind in ("missing", "empty") else "damaged ("
            assert said.startswith(f"{checkpoint / name} is {wrong}"), said
            earlier = checkpoint.with_name("checkpoint-3")
            assert said.endswith(f"; remove {checkpoint} to go on from {earlier}")
            assert "\n" not in said and caught.value.exit_code == 1
            shutil.rmtree(tmp_path / "out")


def save(file: Path, change: Callable[[Any], Any]) -> None:
    content = torch.load(file, weights_only=False)
    change(content)
    torch.save(content, file)


def of_step_5(file: Path) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | {"global_step": 5}))


def flip_a_bit(file: Path) -> None:
    """In the numbers, which have no structure that could break."""
    content = bytearray(file.read_bytes())
    content[content.index(b"/data/0") + 200] ^= 1
    file.write_bytes(content)


def lose_a_weight(file: Path) -> None:
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "how", "found"),
    [
        ("trainer_state.json", of_step_5, "it is of step 5"),
        ("trainer_state.json", lambda file: file.write_text("[]"), "damaged"),
        ("scheduler.pt", lambda file: save(file, lambda x: x.update(last_epoch=3)), "of step 3"),
        ("scheduler.pt", lambda file: torch.save([1], file), "damaged"),
        ("optimizer.pt", lambda file: torch.save({"state": {}}, file), "damaged"),
        ("optimizer.pt", flip_a_bit, "the checksum of"),
        ("rng_state.pth", lambda file: file.write_bytes(b"PK\x05\x06" + bytes(18)), "torch did"),
        ("config.json", lambda file: file.write_text("[]"), "no JSON object"),
        ("model.safetensors", lose_a_weight, "experts.3.up_proj.weight is missing"),
    ],
)
def test_what_is_of_another_checkpoint_or_run_is_damaged(
    name: str, how: Callable[[Path], Any], found: str, copied: Callable[[str], Path]
) -> None:
    checkpoint = copied("full") / "checkpoint-6"
    how(checkpoint / name)
    said = damage(checkpoint, layout_of("full"))
    assert said and said.startswith(f"{checkpoint / name} is damaged (") and found in said


def test_a_base_that_was_quantised_is_looked_for(copied: Callable[[str], Path]) -> None:
    checkpoint = copied("lora") / "checkpoint-6"
    layout = Layout(1, None, adapter=True, quantized=True)
    assert damage(checkpoint, layout) == f"{checkpoint / 'base_quantization.json'} is missing"
    (checkpoint / "base_quantization.json").write_text("{}")
    assert damage(checkpoint, layout) is None


def test_what_is_pickled_is_not_executed(copied: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint = copied("full") / "checkpoint-6"
    for name in ("scheduler.pt", "optimizer.pt"):
        before = (checkpoint / name).read_bytes()
        torch.save(Spy(tmp_path / "executed"), checkpoint / name)
        assert f"{name} is damaged" in damage(checkpoint, layout_of("full"))
        (checkpoint / name).write_bytes(before)
    assert not (tmp_path / "executed").exists()


class Spy:
    """When it is unpickled, it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def test_each_shard_of_the_weights_is_looked_at(copied: Callable[[str], Path]) -> None:
    checkpoint = copied("full") / "checkpoint-6"
    tensors = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for shard, some in shards.items():
        save_file({n: tensors[n] for n in some}, checkpoint / shard, metadata={"format": "pt"})
    index = {"weight_map": {name: shard for shard, some in shards.items() for name in some}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    assert damage(checkpoint, layout_of("full")) is None
    for name in [*shards, "model.safetensors.index.json"]:
        for how in BROKEN.values():
            before = (checkpoint / name).read_bytes()
            change(checkpoint / name, how)
            assert damage(checkpoint, layout_of("full"))
            (checkpoint / name).write_bytes(before)


def test_the_remedy_leads_to_a_checkpoint_that_is_whole(copied: Callable[[str], Path]) -> None:
    output, layout = copied("full"), layout_of("full")
    (output / "checkpoint-3" / "scheduler.pt").unlink()
    shutil.copytree(
        output / "checkpoint-3", output / "checkpoint-10"
    )  # later, though before in text
    (output / "checkpoint-6" / "scheduler.pt").unlink()
    with pytest.raises(CollectiveRunError) as caught:
        refuse_damaged(output / "checkpoint-6", layout)
    both = f"{output / 'checkpoint-6'} and {output / 'checkpoint-3'}"
    assert f"; remove {both} to begin anew" in str(caught.value)


def test_another_number_of_processes_is_said(copied: Callable[[str], Path]) -> None:
    checkpoint = copied("full") / "checkpoint-6"
    with pytest.raises(
        CollectiveRunError, match=r"by 1 processes, and this run has 2; repeat .* with 1,"
    ):
        refuse_damaged(checkpoint, Layout(2, None, False))
    for rank in range(2):
        shutil.copyfile(checkpoint / "rng_state.pth", checkpoint / f"rng_state_{rank}.pth")
    (checkpoint / "rng_state.pth").unlink()
    assert damage(checkpoint, Layout(2, None, False)) is None
    with pytest.raises(
        CollectiveRunError, match=r"by 2 processes, and this run has 1; repeat .* with 2,"
    ):
        refuse_damaged(checkpoint, Layout(1, None, False))
    (checkpoint / "rng_state_1.pth").unlink()
    assert damage(checkpoint, Layout(2, None, False)).endswith("rng_state_1.pth is missing")


# --- What a library finds while it loads


def test_what_fails_in_loading_is_one_line(copied: Callable[[str], Path]) -> None:
    checkpoint = copied("full") / "checkpoint-6"
    with (
        pytest.raises(
            RunError, match=r"^the x of .*point-6 cannot be read back \(a b\); if re.* move "
        ),
        reading_back(checkpoint, "the x", layout_of("full")),
    ):
        raise RuntimeError("a\nb")
    host = RuntimeError("DefaultCPUAllocator: can't allocate memory")
    for passed in (RunError("known"), torch.OutOfMemoryError("memory"), MemoryError(), host):
        with (
            pytest.raises(type(passed)) as caught,
            reading_back(checkpoint, "the x", layout_of("full")),
        ):
            raise passed
        assert caught.value is passed


def test_states_of_other_weights_are_refused(tmp_path: Path) -> None:
    def optimizer(*shapes: tuple[int, ...]) -> torch.optim.AdamW:
        weights = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
        sum(weight.sum() for weight in weights).backward()
        return torch.optim.AdamW(weights)

    file, one = tmp_path / "optimizer.pt", optimizer((3, 4), (5,))
    torch.save(one.state_dict(), file)
    with pytest.raises(ValueError, match="no states"):
        refuse_other_states(one, file)
    one.step()
    torch.save(one.state_dict(), file)
    refuse_other_states(one, file)
    with pytest.raises(ValueError, match=r"a state is \[3, 4\] for a weight of \[4, 3\]"):
        refuse_other_states(optimizer((4, 3), (5,)), file)
    with pytest.raises(ValueError, match="of 2 weights, and this run trains 1"):
        refuse_other_states(optimizer((3, 4)), file)


# --- The script


@pytest.mark.parametrize("mode", MODES)
def test_a_run_goes_on_as_if_it_had_not_been_interrupted_or_not_at_all(
    mode: str, copied: Callable[[str], Path], argv: Callable[..., list[str]], tmp_path: Path
) -> None:
    """At the rates of the schedule. Without it, Trainer would begin a new one: 1e-2 for 5e-3."""
    whole, output, log = tmp_path / "whole", copied(mode), tmp_path / "log"
    schedule = output / "checkpoint-6" / "scheduler.pt"
    saved = schedule.read_bytes()
    schedule.unlink()
    refused = run(argv(output, **MODES[mode]), log)
    assert (refused.code, refused.out) == (1, "")
    assert refused.error.startswith(f"{schedule} is missing; remove {output / 'checkpoint-6'} to")
    assert checkpoints(output) == [3, 6]
    schedule.write_bytes(saved)

    assert run(argv(output, **MODES[mode]), log).code == 0
    assert run(argv(whole, **MODES[mode]), log).code == 0
    assert logged(output, "learning_rate") == pytest.approx([(12 - i) / 1200 for i in range(12)])
    for key in ("learning_rate", "loss", "grad_norm"):
        assert logged(output, key) == logged(whole, key)
    assert_same(output, whole)


def test_the_remedy_mends_the_run(
    copied: Callable[[str], Path], argv: Callable[..., list[str]], tmp_path: Path
) -> None:
    output, log = copied("full"), tmp_path / "log"
    change(output / "checkpoint-6" / "optimizer.pt", BROKEN["truncated"])
    refused = run(argv(output), log)
    assert refused.code == 1 and "optimizer.pt is damaged (" in refused.error
    shutil.rmtree(output / "checkpoint-6")
    mended = run(argv(output), log)
    assert mended.code == 0 and "step 4/12" in mended.err and "step 3/12" not in mended.err


def of_other_shapes(file: Path) -> None:
    def flatten(content: Any) -> None:
        for state in content["state"].values():
            state["exp_avg"] = state["exp_avg"].flatten()

    save(file, flatten)


def lose_a_factor(file: Path) -> None:
    tensors = load_file(file)
    del tensors[min(tensors)]
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("mode", "name", "how", "found"),
    [
        ("full", "optimizer.pt", of_other_shapes, "a state is"),
        ("full", "rng_state.pth", lambda file: save(file, lambda x: x.pop("numpy")), "numpy"),
        ("lora", "adapter_model.safetensors", lose_a_factor, "it lacks base_model"),
    ],
)
def test_a_file_that_does_not_fit_is_one_line(
    mode: str,
    name: str,
    how: Callable[[Path], Any],
    found: str,
    copied: Callable[[str], Path],
    argv: Callable[..., list[str]],
    tmp_path: Path,
) -> None:
    output = copied(mode)
    checkpoint = output / "checkpoint-6"
    how(checkpoint / name)
    assert damage(checkpoint, layout_of(mode)) is None  # its structure is whole
    done = run(argv(output, **MODES[mode]), tmp_path / "log")
    assert done.code == 1, done.err
    assert "cannot be read back" in done.error and found in done.error
    assert f"move {checkpoint} away to go on from {output / 'checkpoint-3'}" in done.error
    assert checkpoints(output) == [3, 6]
