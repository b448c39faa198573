"""Passes of CUDA graphs are the plain ones bit for bit."""

from typing import Any

import pytest
import torch
from gpu_fixtures import TEXT

from deepseek_moe import DeepseekForCausalLM
from deepseek_moe.bundled import BUNDLED_MODEL
from deepseek_moe.checkpoint import own_tokenizer
from deepseek_moe.training.arguments import ALL_LINEARS, split_commas
from deepseek_moe.training.compute.grouped_experts import GROUPED
from deepseek_moe.training.compute.liger import use_fused_forwards
from deepseek_moe.training.compute.replayed_model import ReplayedModel, replay
from deepseek_moe.training.compute.varlen_attention import VARLEN
from deepseek_moe.training.examples import FLAT, Collator
from deepseek_moe.training.offload import stream_experts
from deepseek_moe.training.quantized_base import Quantization
from deepseek_moe.training.trainable import add_lora

pytestmark = pytest.mark.gpu
STEPS = [(40, 90), (200, 30, 20), (38, 92), (60, 66), (190, 31, 25), (41, 80), (210, 20, 19)]
"""The examples of each step, in tokens: two shapes, which take turns."""
BASES = ["bf16", "4 bits", "offloaded"]


class Unrecorded(dict):
    """Graphs that are always met for the first time."""

    def __contains__(self, key: object) -> bool:
        return False


@pytest.fixture
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no GPU was found")
    return torch.device("cuda")


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("batches", [1, 2])
def test_losses_and_gradients(base: str, recompute: bool, batches: int, gpu: torch.device) -> None:
    """Of each step, with dropout, and with gradients of several batches added up."""
    plain, replayed = (train(base, recompute, batches, record, gpu) for record in (False, True))
    assert len(plain) == len(STEPS) // batches
    for step, (want, have) in enumerate(zip(plain, replayed, strict=True)):
        for name, value in want.items():
            assert torch.equal(have[name], value), f"step {step}: {name}"
    losses = [step["loss"].item() for step in replayed]
    assert len(set(losses)) == len(losses)


def train(
    base: str, recompute: bool, batches: int, record: bool, device: torch.device
) -> list[dict[str, torch.Tensor]]:
    """The losses, picks, balance losses and gradients of each step."""
    torch.manual_seed(0)
    model = adapted(base, recompute, device)
    [decoder] = [one for one in model.modules() if isinstance(one, ReplayedModel)]
    decoder.graphs = {} if record else Unrecorded()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    found = []
    for number, lengths in enumerate(STEPS[: len(STEPS) // batches * batches]):
        inputs = batch(lengths, device)
        with torch.autocast("cuda", torch.bfloat16):
            outputs = model(**inputs, use_cache=False)
        outputs.loss.backward()
        kept = {
            "loss": outputs.loss.detach().clone(),
            "balance": outputs.aux_losses.detach().clone(),
            "picks": outputs.router_picks[-1].clone(),
        }
        del outputs  # With it the plain pass would live, whose gradients belong to its stream.
        if (number + 1) % batches:
            continue
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        found.append(grads | kept)
        optimizer.step()
        optimizer.zero_grad()
    assert any(decoder.graphs.values()) == record
    return found


def adapted(base: str, recompute: bool, device: torch.device) -> torch.nn.Module:
    """The bundled model with adapters everywhere, as finetune.py makes it."""
    offload = base == "offloaded"
    quantization = None if base == "bf16" else Quantization(4).config([], offload=offload)
    model = DeepseekForCausalLM.from_pretrained(
        BUNDLED_MODEL,
        dtype=torch.bfloat16,
        device_map={"": str(device)},
        attn_implementation=VARLEN,
        experts_implementation=GROUPED,
        quantization_config=quantization,
    )
    model = add_lora(model, split_commas(ALL_LINEARS), 8, 16.0, 0.1)
    if offload:
        stream_experts(model, device)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter, dtype=torch.float32) * 0.02
    use_fused_forwards(model)
    replay(model)
    if recompute:
        options = {"use_reentrant": False, "preserve_rng_state": False}
        model.gradient_checkpointing_enable(options)
    return model.train()


def batch(lengths: tuple[int, ...], device: torch.device) -> dict[str, Any]:
    ids = own_tokenizer(BUNDLED_MODEL)(TEXT * 9).input_ids
    rows, start = [], 0
    for length in lengths:
        trained = [0] + [1] * (length - 1)
        one = {"input_ids": ids[start : start + length], "trained": trained, "length": length}
        rows.append(one | {"source": ""})
        start += length
    made = Collator(pad_token_id=1, packing=False)(rows, flat=FLAT)
    del made["sources"], made["num_tokens"]
    tensors = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in made.items()}
    return tensors | {"num_sequences": len(lengths), "aux_loss_scale": 1.0}
