"""Experts in pinned memory: the same bits however slow copies or kernels are, and less memory."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_fixtures import TEXT

from deepseek_moe.bundled import BUNDLED_MODEL
from deepseek_moe.checkpoint import own_tokenizer
from deepseek_moe.training.arguments import FineTuningArguments, ModelArguments
from deepseek_moe.training.build import build_model
from deepseek_moe.training.offload import BUFFERS, ExpertStream, HostStack

CYCLES = 100_000_000  # 50 ms, longer than a host takes for several layers of this model
SLOW = {"nothing": (0, 0), "copies": (CYCLES, 0), "reads": (0, CYCLES), "both": (CYCLES, CYCLES)}


def build(device: torch.device, folder: Path, offload: bool) -> Any:
    """The bundled model in 4 bits with adapters. Its attention adds in a fixed order."""
    options = {"use_lora": True, "bits": 4, "offload_experts": offload}
    model = ModelArguments(str(BUNDLED_MODEL), attn_implementation="eager", **options)
    training = FineTuningArguments(
        output_dir=str(folder), bf16=True, use_cpu=device.type == "cpu", report_to="none"
    )
    torch.manual_seed(0)
    return build_model(BUNDLED_MODEL, model, training)


def two_steps(model: Any, device: torch.device) -> list[torch.Tensor]:
    """Two losses and all gradients, with layers recomputed."""
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    length = 256 if device.type == "cuda" else 32
    ids = own_tokenizer(BUNDLED_MODEL)(TEXT * 4).input_ids[:length]
    ids_BL = torch.tensor(ids, device=device).view(2, -1)
    found = []
    for _ in range(2):
        torch.manual_seed(0)  # of the dropout
        with torch.autocast(device.type, torch.bfloat16):
            found.append(model.train()(input_ids=ids_BL, labels=ids_BL, use_cache=False).loss)
        found[-1].backward()
    return found + [p.grad for p in model.parameters() if p.requires_grad]


def slow_down(monkeypatch: pytest.MonkeyPatch, copies: int, reads: int) -> None:
    """Lets the GPU sleep so many cycles before each copy, and before each read."""
    fill, lend = ExpertStream._fill, ExpertStream.lend

    def slow_fill(self: ExpertStream, *args: Any) -> None:
        if self.copies:
            with torch.cuda.stream(self.copies):
                torch.cuda._sleep(copies)
        fill(self, *args)

    @contextmanager
    def slow_lend(self: ExpertStream, *args: Any) -> Iterator[torch.Tensor]:
        with lend(self, *args) as packed:
            if self.copies:
                torch.cuda._sleep(reads)
            yield packed

    monkeypatch.setattr(ExpertStream, "_fill", slow_fill)
    monkeypatch.setattr(ExpertStream, "lend", slow_lend)


@pytest.mark.parametrize("slow", SLOW)
def test_the_same_bits_whatever_is_slow(slow, device, tmp_path, monkeypatch):
    wanted = two_steps(build(device, tmp_path, offload=False), device)
    slow_down(monkeypatch, *SLOW[slow])
    found = two_steps(build(device, tmp_path, offload=True), device)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("slow", ["copies", "reads"])
def test_without_the_events_the_bits_would_differ(slow, tmp_path, monkeypatch):
    """So the test above can fail."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU was found")
    device = torch.device("cuda")
    wanted = two_steps(build(device, tmp_path, offload=False), device)
    slow_down(monkeypatch, *SLOW[slow])
    model = build(device, tmp_path, offload=True)
    monkeypatch.setattr(torch.cuda.Stream, "wait_event", lambda *_: None)
    found = two_steps(model, device)
    torch.cuda.synchronize()
    assert not all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_the_gpu_holds_two_layers_of_the_experts(device, tmp_path):
    taken = []
    for offload in (False, True):
        model = None
        gc.collect()  # The model before, and what earlier tests have left in cycles, do not count.
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        model = build(device, tmp_path, offload)
        gc.collect()
        taken.append(torch.cuda.memory_allocated() - before if device.type == "cuda" else 0)
        stacks = [p for p in model.parameters() if isinstance(p, HostStack)]
    hosted, layers = sum(stack.nbytes for stack in stacks), len(stacks) / 2
    assert layers == 5 and all(stack.device.type == "cpu" for stack in stacks)
    if device.type == "cuda":
        assert all(stack.host.is_pinned() for stack in stacks)
        spared = hosted * (1 - BUFFERS / layers)
        assert taken[0] - taken[1] == pytest.approx(spared, abs=2**16)  # blocks are rounded up
