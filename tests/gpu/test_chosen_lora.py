"""LoRA on chosen experts against LoRA on all of them, whose other adapters are zero."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from gpu_fixtures import TEXT, distance

from deepseek_moe import DeepseekForCausalLM
from deepseek_moe.bundled import BUNDLED_MODEL
from deepseek_moe.checkpoint import own_tokenizer
from deepseek_moe.training.compute.grouped_experts import GROUPED
from deepseek_moe.training.compute.liger import use_fused_forwards
from deepseek_moe.training.expert_lora import with_all_experts
from deepseek_moe.training.quantized_base import Quantization
from deepseek_moe.training.trainable import EXPERT_PARAMETERS, add_lora

CHOSEN = {1: [3, 4, 20], 2: [0], 3: list(range(24)), 4: [7, 23], 5: [11]}


def adapted(
    device: torch.device, bits: int, names: Sequence[str], chosen: Mapping[int, Any] | None
) -> Any:
    """The bundled model in bf16 with adapters of rank 4."""
    model = DeepseekForCausalLM.from_pretrained(
        BUNDLED_MODEL,
        dtype=torch.bfloat16,
        device_map={"": str(device)},
        experts_implementation=GROUPED,
        quantization_config=Quantization(4).config([]) if bits == 4 else None,
    )
    model = add_lora(model, names, 4, 8.0, 0.1, chosen=chosen).train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    if device.type == "cuda":
        use_fused_forwards(model)
    return model


def loss_and_gradients(model: Any, device: torch.device) -> tuple[torch.Tensor, dict[str, Any]]:
    ids = own_tokenizer(BUNDLED_MODEL)(TEXT).input_ids[:64]
    ids_BL = torch.tensor(ids, device=device).view(2, -1)
    torch.manual_seed(0)  # of the dropout
    with torch.autocast(device.type, torch.bfloat16):
        loss = model(input_ids=ids_BL, labels=ids_BL, use_cache=False).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("bits", [16, 4])
def test_chosen_experts_have_the_gradients_that_they_have_among_all(bits, device):
    few = adapted(device, bits, [], CHOSEN)
    every = adapted(device, bits, EXPERT_PARAMETERS, None)
    random = torch.Generator().manual_seed(0)
    for parameter in few.parameters():
        if parameter.requires_grad:
            numbers = torch.randn(parameter.shape, generator=random).to(device) * 0.02
            parameter.data = numbers.to(parameter.dtype)
    whole = with_all_experts(few, {n: p.data for n, p in few.named_parameters() if p.requires_grad})
    for name, parameter in every.named_parameters():
        if parameter.requires_grad:
            parameter.data = whole[name]
    (loss, found), (wanted_loss, wanted) = (loss_and_gradients(m, device) for m in (few, every))
    assert torch.equal(loss, wanted_loss)
    assert found.keys() == wanted.keys() and len(found) == 4 * len(CHOSEN)
    kept = with_all_experts(few, {name: torch.ones_like(x) for name, x in found.items()})
    for name, gradient in with_all_experts(few, found).items():
        assert gradient.any(), name
        # On a GPU the backward pass of attention adds in no fixed order.
        most = 1e-2 if device.type == "cuda" else 0.0
        assert distance(gradient, wanted[name] * kept[name]) <= most, name
