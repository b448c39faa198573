"""What is put together for training: which weights are kept, quantised and cast, and how."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from deepseek_moe.training.arguments import FineTuningArguments, ModelArguments
from deepseek_moe.training.build import build_model
from deepseek_moe.training.compute import grouped_experts as experts

IDS = torch.tensor([[0, 17, 5, 44, 80, 2, 91], [0, 3, 62, 9, 9, 31, 7]])


def build(base: Path, bf16: bool, **options: Any) -> nn.Module:
    training = FineTuningArguments(
        output_dir=str(base.parent / "out"), bf16=bf16, use_cpu=True, report_to="none"
    )
    return build_model(base, ModelArguments(str(base), **options), training)


@pytest.mark.parametrize(
    ("bits", "bf16", "trainable", "saved"),
    [
        (16, True, None, "lm_head"),
        (16, False, None, "lm_head"),
        (8, True, None, "lm_head"),
        (4, True, None, "lm_head"),
        (4, True, "k_proj", "shared_experts"),
        (4, True, "k_proj", "experts"),
        (8, True, "k_proj", "mlp"),
        (16, True, "k_proj", "gate"),
    ],
)
def test_all_but_what_is_saved_whole_is_adapted_and_quantised(bits, bf16, trainable, saved, base):
    """Router and norms never are, though other names have "gate" in them too."""
    lora = {"use_lora": True, "trainable": trainable, "modules_to_save": saved}
    model = build(base, bf16, bits=bits, **lora)
    low = torch.bfloat16 if bf16 else torch.float32
    stored = {16: low, 8: torch.int8, 4: torch.uint8}[bits]
    for name, parameter in model.named_parameters():
        whole = ".modules_to_save." in name or ".original_module." in name
        assert whole == (f"{saved}." in name), name
        if parameter.requires_grad:  # adapters, and what is saved whole
            assert parameter.dtype == torch.float32, name
        elif "_proj" in name and not whole:
            assert parameter.dtype == stored, name
        else:
            assert parameter.dtype == low and "base_layer" not in name, name
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model.train()(IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_full_training_is_in_fp32(base):
    model = build(base, True)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert all(p.requires_grad for p in model.parameters())
    chosen = build(base, True, trainable="lm_head")
    assert [n for n, p in chosen.named_parameters() if p.requires_grad] == ["lm_head.weight"]
    assert chosen.lm_head.weight.dtype == torch.float32
    assert chosen.model.norm.weight.dtype == torch.bfloat16
    assert model.config._experts_implementation == experts.GROUPED
    again = build(base, True, recompute_experts=True)
    assert again.config._experts_implementation == experts.RECOMPUTED
