"""Saving: one tensor at a time from the host. A failed save names its cause and loses nothing."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accident_fixtures import before_call, limit_file_size
from finetune_fixtures import assert_same, run, succeed
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from deepseek_moe.errors import RunError, UserError
from deepseek_moe.training import saving
from deepseek_moe.training.saving import report_failed_write, tensors_on_host
from deepseek_moe.training.trainer import FineTuner

HOST_FULL = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")
GPU_FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 352.00 MiB.")
SHORT = {"max_steps": 4, "save_steps": 2}


def test_each_tensor_is_copied_to_the_host_when_it_is_asked_for(tiny_model, monkeypatch):
    model, copied, original = tiny_model(), [], torch.Tensor.to

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        copied.append(self.numel())
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", to)
    seen = []
    for name, tensor in tensors_on_host(model):
        seen.append(tensor.numel())
        assert copied == seen, name
    assert len(seen) == 3 * 4 + 3 + 2 * (1 + 3 * 8 + 3) + 2 * 3 + 3


@pytest.mark.parametrize("tied", [False, True])
def test_a_save_equals_that_of_transformers(tied, tiny_model, tmp_path):
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


@pytest.mark.parametrize(
    ("limit", "kept"), [(2, ["10", "9"]), (-1, ["10", "3", "9"]), (None, ["10", "3", "9"])]
)
def test_a_complete_checkpoint_gets_its_name_and_old_ones_go(limit, kept, tmp_path):
    for name in ("checkpoint-3", "checkpoint-9", "incomplete/checkpoint-10"):
        (tmp_path / name).mkdir(parents=True)
    saving.publish_checkpoint(tmp_path, "checkpoint-10", limit)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == [f"checkpoint-{n}" for n in kept]


@pytest.mark.parametrize(
    ("error", "processes", "tries"),
    [(OSError("no space"), 1, 1), (GPU_FULL, 2, 1), (GPU_FULL, 1, 2)],
)
def test_a_save_is_tried_again_for_memory_on_one_process(error, processes, tries, tmp_path):
    tried: list[int] = []
    trainer = SimpleNamespace(args=SimpleNamespace(world_size=processes))

    def save() -> None:
        tried.append(trainer.shard_bytes)
        raise error

    with pytest.raises(type(error)):
        FineTuner.save_sparingly(trainer, save, tmp_path / "incomplete")
    assert tried == [saving.SHARD_BYTES, saving.ONE_TENSOR][:tries]


def fill_gpu(*_: Any) -> None:
    raise GPU_FULL


def test_a_full_gpu_at_a_save_loses_nothing(argv, tmp_path):
    """The first write is that of the rehearsal."""
    whole, output, log = tmp_path / "whole", tmp_path / "out", tmp_path / "log"
    in_save = partial(before_call, "deepseek_moe.training.saving", "write_shards", 2, fill_gpu)
    succeed(argv(whole, **SHORT), log)
    succeed(argv(output, **SHORT), log, in_save)
    assert_same(output, whole)
    files = list((output / "checkpoint-2").glob("*.safetensors"))
    with safe_open(files[0], framework="pt") as one:
        assert len(one.keys()) == 1
    assert len(files) > 50
    AutoModelForCausalLM.from_pretrained(output / "checkpoint-2")


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
def test_a_failed_write_names_its_cause_and_leaves_nothing(error, said, tmp_path):
    for name in ("checkpoint-7", "incomplete"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=said) as caught, report_failed_write(tmp_path, True):
        raise error
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "incomplete").exists()


def test_a_save_that_cannot_work_is_found_before_the_first_step(argv, tmp_path):
    """The disk takes nothing that is larger than a config; the largest tensor is."""
    rehearsal = ("deepseek_moe.training.saving.RehearseSave", "on_train_begin")
    full = partial(before_call, *rehearsal, 1, partial(limit_file_size, 10_000))
    done = run(argv(tmp_path / "out", **SHORT), tmp_path / "log", full)
    assert done.code == 1
    assert "could not be written to" in done.error and "step 1" not in done.err
    assert not (tmp_path / "out" / "incomplete").exists()
