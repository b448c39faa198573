"""Saving: from the host, one tensor at a time, with room for it; a failure says what failed."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from finetune_fixtures import Ended, assert_same, checkpoints, options, run, write_base, write_rows
from option_fixtures import parse_arguments
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from deepseek_moe import DeepseekConfig, DeepseekForCausalLM
from deepseek_moe.errors import RunError, UserError
from deepseek_moe.training import saving
from deepseek_moe.training.disk_need import DiskNeed, disk_need, free_bytes
from deepseek_moe.training.dry_run import meta_model
from deepseek_moe.training.saving import (
    RehearseSave,
    report_failed_save,
    save_sparingly,
    tensors_on_host,
)

MakeModel = Callable[..., DeepseekForCausalLM]
GPU_FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 352.00 MiB.")


@pytest.fixture(scope="module")
def argv(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """A command of 4 steps and 2 checkpoints; keywords change it."""
    place = tmp_path_factory.mktemp("saving")
    base, rows = write_base(place / "base"), write_rows(place / "rows.jsonl", 16)

    def argv(output: Path, **changes: Any) -> list[str]:
        plain = {
            "model_name_or_path": base,
            "data_path": rows,
            "cache_dir": place / "cache",
            "output_dir": output,
            "num_train_epochs": 1,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "save_steps": 2,
            "report_to": "none",
        }
        return options(**(plain | changes))

    return argv


# --- Tensor by tensor


def test_each_tensor_is_copied_to_the_host_when_it_is_asked_for(tiny_model: MakeModel) -> None:
    """None before it is asked for, and none larger than one of the checkpoint."""
    model, copied = tiny_model(), []

    class Counting(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None):
            result = super().__torch_function__(function, types, args, kwargs or {})
            if function is torch.Tensor.to:
                copied.append(result.numel())
            return result

    state = {name: p.detach().as_subclass(Counting) for name, p in model.named_parameters()}
    tensors = tensors_on_host(model, state)
    assert copied == []
    seen = 0
    for name, tensor in tensors:
        seen += 1
        assert copied == [*copied[: seen - 1], tensor.numel()], name
    assert seen == 3 * 4 + 3 + 2 * (1 + 3 * 8 + 3) + 2 * 3 + 3


def test_what_is_saved_is_what_transformers_saves(tiny_model: MakeModel, tmp_path: Path) -> None:
    for tied in (False, True):
        model = tiny_model(tie_word_embeddings=tied)
        ours, theirs = tmp_path / f"ours{tied}", tmp_path / f"theirs{tied}"
        ours.mkdir()
        saving.save_weights(model, ours, None, shard_bytes=10_000)
        model.save_pretrained(theirs)
        assert len(list(ours.glob("*.safetensors"))) > 1
        one, other = (AutoModelForCausalLM.from_pretrained(folder) for folder in (ours, theirs))
        assert one.config.to_dict() | {"_name_or_path": ""} == other.config.to_dict() | {
            "_name_or_path": ""
        }
        for name, tensor in other.state_dict().items():
            assert torch.equal(one.state_dict()[name], tensor), name


# --- When memory runs out


def test_after_memory_ran_out_each_tensor_gets_its_own_file(tmp_path: Path) -> None:
    tried: list[int] = []

    def save(shard_bytes: int) -> None:
        tried.append(shard_bytes)
        assert not (tmp_path / "half").exists()
        (tmp_path / "half").mkdir()
        if len(tried) == 1:
            raise RunError("it failed") from GPU_FULL

    save_sparingly(save, tmp_path / "half", alone=True)
    assert tried == [saving.SHARD_BYTES, saving.ONE_TENSOR]


@pytest.mark.parametrize("error", [OSError("no space"), GPU_FULL])
def test_a_second_try_is_for_memory_and_one_process_only(error: Exception, tmp_path: Path) -> None:
    tried: list[int] = []

    def save(shard_bytes: int) -> None:
        tried.append(shard_bytes)
        raise error

    with pytest.raises(type(error)):
        save_sparingly(save, tmp_path / "half", alone=isinstance(error, OSError))
    assert len(tried) == 1


def fail_writing(times: int) -> None:
    """The GPU is full at the first writes of weights after the rehearsal, `times` times."""
    from deepseek_moe import export

    original, calls = export.write_shards, 0

    def write_shards(tensors: Iterator[Any], folder: Path, limit: int) -> None:
        nonlocal calls
        calls += 1
        if 1 < calls <= 1 + times:
            next(tensors)
            raise GPU_FULL
        original(tensors, folder, limit)

    export.write_shards = saving.write_shards = write_shards


def fail_once() -> None:
    fail_writing(1)


def fail_always() -> None:
    fail_writing(1000)


def test_a_full_gpu_at_a_save_loses_nothing(argv: Callable[..., list[str]], tmp_path: Path) -> None:
    whole, output = tmp_path / "whole", tmp_path / "out"
    assert run(argv(whole), tmp_path / "log").code == 0
    done = run(argv(output), tmp_path / "log", fail_once)
    assert done.code == 0, done.err
    assert_same(output, whole)
    files = list((output / "checkpoint-2").glob("*.safetensors"))
    with safe_open(files[0], framework="pt") as one:
        assert len(one.keys()) == 1
    assert len(files) > 50
    AutoModelForCausalLM.from_pretrained(output / "checkpoint-2")


def test_a_gpu_that_stays_full_is_not_called_a_full_disk(
    argv: Callable[..., list[str]], tmp_path: Path
) -> None:
    done = run(argv(tmp_path / "out"), tmp_path / "log", fail_always)
    assert done.code == 1
    assert "ran out of memory (CUDA out of memory" in done.error
    assert "the last complete checkpoint is none" in done.error
    assert "written" not in done.error and "room" not in done.error
    assert not (tmp_path / "out" / "incomplete").exists()


def test_of_a_failed_save_nothing_is_left_and_its_cause_is_named(tmp_path: Path) -> None:
    """What is refused keeps its own words."""
    (tmp_path / "checkpoint-7").mkdir()
    host = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")
    for error, said in (
        (host, "ran out of memory"),
        (OSError(12, "Cannot allocate memory"), "ran out of memory"),
        (
            RuntimeError("PytorchStreamWriter\nfailed"),
            r"not be written to \(Py.*point-7: make room",
        ),
        (OSError("no space"), "could not be written to"),
        (RunError("it is full; free space"), r"could not be written to \(it is full; [\d.]+ GB"),
        (GPU_FULL, "ran out of memory .CUDA.*checkpoint-7"),
        (MemoryError(), "ran out of memory .MemoryError"),
        (UserError("it is zero"), "^it is zero$"),
    ):
        (tmp_path / "incomplete").mkdir()
        with pytest.raises(UserError, match=said) as caught, report_failed_save(tmp_path, True):
            raise error
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "incomplete").exists()


# --- Before the first step


def refuse_writes() -> None:
    """The disk takes nothing that is larger than a config."""
    import resource

    original = RehearseSave.on_train_begin

    def on_train_begin(self: Any, *args: Any, **kwargs: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        original(self, *args, **kwargs)

    RehearseSave.on_train_begin = on_train_begin


def test_a_save_that_cannot_work_is_found_before_the_first_step(
    argv: Callable[..., list[str]], tmp_path: Path
) -> None:
    done = run(argv(tmp_path / "out"), tmp_path / "log", refuse_writes)
    assert done.code == 1
    assert "could not be written to" in done.error and "step 1" not in done.err
    assert not (tmp_path / "out" / "incomplete").exists()


def test_a_rehearsal_writes_the_largest_tensor_and_its_states(
    tiny_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, written = tiny_model(), []
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    monkeypatch.setattr(
        saving, "write_shards", lambda tensors, *_: written.append(next(tensors)[1].numel())
    )
    args, state = SimpleNamespace(output_dir=tmp_path), SimpleNamespace(is_world_process_zero=True)
    RehearseSave().on_train_begin(args, state, None, model=model, optimizer=optimizer)
    assert written == [max(parameter.numel() for parameter in model.parameters())]
    assert list(tmp_path.iterdir()) == []


def small_disk() -> None:
    import shutil

    shutil.disk_usage = lambda folder: SimpleNamespace(free=400_000)


def test_a_disk_too_small_for_a_checkpoint_and_the_result_is_refused(
    argv: Callable[..., list[str]], tmp_path: Path
) -> None:
    done: Ended = run(argv(tmp_path / "out"), tmp_path / "log", small_disk)
    assert done.code == 2
    assert "is too small: a checkpoint takes" in done.error and "0.4 MB are free" in done.error
    assert checkpoints(tmp_path / "out") == []
    planned = run(argv(tmp_path / "out", dry_run=True), tmp_path / "log", small_disk)
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
    mode: str, argv: Callable[..., list[str]], tmp_path: Path
) -> None:
    """To 10 %: tokenizer, headers of files and the trainer's state are small."""
    words = argv(tmp_path / "out", save_total_limit=1, **MODES[mode])
    model, _, training = parse_arguments(words)
    base = Path(model.model_name_or_path)
    need = disk_need(meta_model(base, model), model, training, steps=4, steps_in_epoch=4)
    assert (need.saved, need.kept) == (2, 1)
    done = run(words, tmp_path / "log")
    assert done.code == 0, done.err
    kinds = ("*.safetensors", "optimizer.pt")
    checkpoint, result = (
        sum(file.stat().st_size for kind in kinds for file in folder.glob(kind))
        for folder in (tmp_path / "out" / "checkpoint-4", tmp_path / "out")
    )
    if mode == "merged":
        result += (tmp_path / "out" / "adapter" / "adapter_model.safetensors").stat().st_size
    assert checkpoint == pytest.approx(need.checkpoint, rel=0.1)
    assert result == pytest.approx(need.result, rel=0.1)


def test_the_disk_of_the_16b_model() -> None:
    """All weights on one GPU: 2 bytes of bf16 and 2 of averages a weight, and then the result."""
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
    # The one checkpoint that is kept stays until the next is complete.
    training.save_total_limit = 1
    need = disk_need(model, options, training, steps=250, steps_in_epoch=100)
    assert need.least() == need.total == pytest.approx(2 * 66.0e9, rel=1e-3)
    assert need.least(resumes=True) == pytest.approx(66.0e9, rel=1e-3)
    need = disk_need(model, options, training, steps=0, steps_in_epoch=100)  # all are taken
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
