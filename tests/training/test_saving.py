"""Saving: one tensor at a time from the host. A failed save names its cause and loses nothing."""

import resource
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from finetune_fixtures import assert_same, run
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from deepseek_moe import DeepseekForCausalLM
from deepseek_moe.errors import RunError, UserError
from deepseek_moe.training import saving
from deepseek_moe.training.saving import (
    RehearseSave,
    report_failed_write,
    save_sparingly,
    tensors_on_host,
)

MakeArgv = Callable[..., list[str]]
MakeModel = Callable[..., DeepseekForCausalLM]
HOST_FULL = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")
GPU_FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 352.00 MiB.")
SHORT = {"max_steps": 4, "save_steps": 2}


# --- Tensor by tensor


def test_each_tensor_is_copied_to_the_host_when_it_is_asked_for(tiny_model: MakeModel) -> None:
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


@pytest.mark.parametrize("tied", [False, True])
def test_a_save_equals_that_of_transformers(
    tied: bool, tiny_model: MakeModel, tmp_path: Path
) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    saving.save_trained(model, tmp_path / "ours", None, shard_bytes=10_000)
    model.save_pretrained(tmp_path / "theirs")
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("ours", "theirs")
    )
    assert ours.config.to_dict() | {"_name_or_path": theirs.name_or_path} == theirs.config.to_dict()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name


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
def test_a_save_is_tried_again_only_for_memory_and_on_one_process(
    error: Exception, tmp_path: Path
) -> None:
    tried: list[int] = []

    def save(shard_bytes: int) -> None:
        tried.append(shard_bytes)
        raise error

    with pytest.raises(type(error)):
        save_sparingly(save, tmp_path / "half", alone=isinstance(error, OSError))
    assert len(tried) == 1


def fill_gpu(times: int) -> None:
    """The GPU is full in the first `times` writes of weights after the rehearsal."""
    original, calls = saving.write_shards, 0

    def write_shards(tensors: Iterator[Any], folder: Path, limit: int) -> None:
        nonlocal calls
        calls += 1
        if 1 < calls <= 1 + times:
            next(tensors)
            raise GPU_FULL
        original(tensors, folder, limit)

    saving.write_shards = write_shards


def test_a_full_gpu_at_a_save_loses_nothing(argv: MakeArgv, tmp_path: Path) -> None:
    whole, output = tmp_path / "whole", tmp_path / "out"
    assert run(argv(whole, **SHORT), tmp_path / "log").code == 0
    done = run(argv(output, **SHORT), tmp_path / "log", partial(fill_gpu, 1))
    assert done.code == 0, done.err
    assert_same(output, whole)
    files = list((output / "checkpoint-2").glob("*.safetensors"))
    with safe_open(files[0], framework="pt") as one:
        assert len(one.keys()) == 1
    assert len(files) > 50
    AutoModelForCausalLM.from_pretrained(output / "checkpoint-2")


def test_a_gpu_that_stays_full_is_not_called_a_full_disk(argv: MakeArgv, tmp_path: Path) -> None:
    done = run(argv(tmp_path / "out", **SHORT), tmp_path / "log", partial(fill_gpu, 1000))
    assert done.code == 1
    assert "ran out of memory (CUDA out of memory" in done.error
    assert "the last complete checkpoint is none" in done.error
    assert "written" not in done.error and "room" not in done.error
    assert not (tmp_path / "out" / "incomplete").exists()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (HOST_FULL, "ran out of memory"),
        (OSError(12, "Cannot allocate memory"), "ran out of memory"),
        (GPU_FULL, "ran out of memory .CUDA.*checkpoint-7"),
        (MemoryError(), "ran out of memory .MemoryError"),
        (RuntimeError("Pytorch\nfailed"), r"not be written to \(Py.*point-7: make room"),
        (OSError("no space"), "could not be written to"),
        (RunError("it is full; free space"), r"could not be written to \(it is full; [\d.]+ GB"),
        (UserError("it is zero"), "^it is zero$"),  # A refusal keeps its own words.
    ],
)
def test_a_failed_write_names_its_cause_and_leaves_nothing(
    error: Exception, said: str, tmp_path: Path
) -> None:
    for name in ("checkpoint-7", "incomplete"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=said) as caught, report_failed_write(tmp_path, True):
        raise error
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "incomplete").exists()


# --- Before the first step


def refuse_writes() -> None:
    """The disk takes nothing that is larger than a config."""
    original = RehearseSave.on_train_begin

    def on_train_begin(self: Any, *args: Any, **kwargs: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        original(self, *args, **kwargs)

    RehearseSave.on_train_begin = on_train_begin


def test_a_save_that_cannot_work_is_found_before_the_first_step(
    argv: MakeArgv, tmp_path: Path
) -> None:
    done = run(argv(tmp_path / "out", **SHORT), tmp_path / "log", refuse_writes)
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
