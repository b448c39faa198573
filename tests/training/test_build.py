"""What is put together for training: which weights are kept, quantised and cast, and how."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from deepseek_moe import DeepseekForCausalLM
from deepseek_moe.training.arguments import FineTuningArguments, ModelArguments
from deepseek_moe.training.build import build_model
from deepseek_moe.training.compute import grouped_experts as experts

MakeModel = Callable[..., DeepseekForCausalLM]
IDS = torch.tensor([[0, 17, 5, 44, 80, 2, 91], [0, 3, 62, 9, 9, 31, 7]])


@pytest.fixture
def base(tiny_model: MakeModel, tmp_path: Path) -> Path:
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def build(base: Path, bf16: bool, **options: Any) -> nn.Module:
    training = FineTuningArguments(
        output_dir=str(base.parent / "out"), bf16=bf16, use_cpu=True, report_to="none"
    )
    return build_model(base, ModelArguments(str(base), **options), training)


@pytest.mark.parametrize(("bits", "bf16"), [(16, True), (16, False), (8, True), (4, True)])
def test_router_and_norms_stay_as_loaded(bits: int, bf16: bool, base: Path) -> None:
    """They are not wrapped, quantised or cast, though other names have "gate" in them too."""
    model = build(base, bf16, use_lora=True, bits=bits, modules_to_save="lm_head")
    low = torch.bfloat16 if bf16 else torch.float32
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if parameter.requires_grad:  # adapters, and what is saved whole
            assert parameter.dtype == torch.float32, name
        elif bits == 16 or "_proj" not in name:
            assert parameter.dtype == low, name
    for ending, count in {"gate.weight": 2, "layernorm.weight": 6, "model.norm.weight": 1}.items():
        found = [name for name in parameters if name.endswith(ending)]
        assert len(found) == count
        assert not any("base_layer" in name or "modules_to_save" in name for name in found)
    stored = {16: low, 8: torch.int8, 4: torch.uint8}[bits]
    for ending, count in {"gate_proj.base_layer.weight": 3, "gate_up_proj": 2}.items():
        assert [p.dtype for n, p in parameters.items() if n.endswith(ending)] == [stored] * count
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model.train()(IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    assert loss.isfinite()
    assert parameters["base_model.model.lm_head.modules_to_save.default.weight"].grad.any()


@pytest.mark.parametrize(
    ("saved", "bits"),
    [("shared_experts", 4), ("layers.0", 4), ("mlp", 8), ("experts", 4), ("gate", 16)],
)
def test_what_is_saved_whole_is_not_quantised(saved: str, bits: int, base: Path) -> None:
    model = build(base, True, use_lora=True, bits=bits, trainable="k_proj", modules_to_save=saved)
    stored = {16: torch.bfloat16, 8: torch.int8, 4: torch.uint8}[bits]
    copies = {n: p for n, p in model.named_parameters() if ".modules_to_save." in n}
    frozen = {p.dtype for n, p in model.named_parameters() if ".original_module." in n}
    assert copies and all(f"{saved}." in name for name in copies)
    assert {p.dtype for p in copies.values()} == {torch.float32}
    assert frozen == {torch.bfloat16}
    [last, *_] = [p for n, p in model.named_parameters() if "layers.2.self_attn.k_proj.base" in n]
    assert last.dtype == stored
    with torch.autocast("cpu", torch.bfloat16):
        model.train()(IDS, labels=IDS, use_cache=False).loss.backward()
    assert all(parameter.grad.any() for parameter in copies.values())


def test_full_training_is_in_fp32(base: Path) -> None:
    model = build(base, True)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert all(p.requires_grad for p in model.parameters())
    chosen = build(base, True, trainable="lm_head")
    assert [n for n, p in chosen.named_parameters() if p.requires_grad] == ["lm_head.weight"]
    assert chosen.lm_head.weight.dtype == torch.float32
    frozen = {p.dtype for p in chosen.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16}
    assert model.config._experts_implementation == experts.GROUPED
    again = build(base, True, recompute_experts=True)
    assert again.config._experts_implementation == experts.RECOMPUTED
