"""Adapted linear layers computed together equal PEFT's own: outputs and all gradients."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from deepseek_moe.kernels.training import torch_ops
from deepseek_moe.training.compute.fused_lora import FusedLinears, linears
from deepseek_moe.training.compute.grouped_experts import new_seed
from deepseek_moe.training.quantized_base import Quantization

WIDTH, OUTS, P = 64, {"q": 48, "k": 64, "v": 32}, 0.4


class Layers(nn.ModuleDict):
    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [layer(x) for layer in self.values()]


def make(bits: int = 16, dropout: float = 0.0, targets: str = "qkv", **options: Any) -> Any:
    torch.manual_seed(1)
    layers = Layers({name: nn.Linear(WIDTH, out, bias=False) for name, out in OUTS.items()})
    fields = {"r": 4, "lora_alpha": 6, "lora_dropout": dropout, "target_modules": list(targets)}
    model = get_peft_model(layers, LoraConfig(**fields, **options)).base_model.model.train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
        elif bits == 4 and "lora" not in name:
            layer = model.get_submodule(name.removesuffix(".weight"))
            layer.weight = Quantization(4, dtype="float32").quantize(parameter)
    return model


def run(forward: Any, model: Any, of_input: bool = True) -> tuple[list, dict[str, torch.Tensor]]:
    """Outputs, and the gradients of the adapters and of the input."""
    torch.manual_seed(2)
    x = torch.randn(2, 7, WIDTH, requires_grad=of_input)
    probes = [torch.randn(2, 7, out) for out in OUTS.values()]
    torch.manual_seed(3)
    outs = forward(x)
    leaves = {name: p for name, p in model.named_parameters() if p.requires_grad}
    leaves |= {"x": x} if of_input else {}
    grads = torch.autograd.grad(outs, list(leaves.values()), probes)
    return outs, dict(zip(leaves, grads, strict=True))


def agree(have: Any, want: Any) -> None:
    torch.testing.assert_close(have[0], want[0], rtol=1e-5, atol=1e-5)
    assert have[1].keys() == want[1].keys()
    for name, other in want[1].items():
        assert other.any(), name
        assert (have[1][name] - other).abs().max() <= 1e-5 * max(1, other.abs().max()), name


def together(model: Any) -> Any:
    return lambda x: linears(x, *model.values())


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each call of `FusedLinears` takes."""
    counts, apply = [], FusedLinears.apply

    def noted(*args: Any) -> Any:
        counts.append(len(args[2]))
        return apply(*args)

    monkeypatch.setattr(FusedLinears, "apply", noted)
    return counts


@pytest.mark.parametrize("of_input", [True, False])
@pytest.mark.parametrize("bits", [16, 4])
def test_three_layers_are_one(bits, of_input, counts):
    """Plain PEFT computes with the weights that 4 bits stand for."""
    model, plain = make(bits), make()
    if bits == 4:
        for layer in plain.values():
            weight = layer.base_layer.weight
            weight.data = Quantization(4, dtype="float32").roundtrip(weight)
    agree(run(together(model), model, of_input), run(plain, plain, of_input))
    assert counts == [3]


def test_the_same_numbers_drop_out_in_both_passes():
    model = make(dropout=P)

    def written_out(x: torch.Tensor) -> list[torch.Tensor]:
        dropped = torch_ops.drop_out(x, P, new_seed(x.device))
        outs = []
        for layer in model.values():
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            outs.append(layer.base_layer(x) + 1.5 * (dropped @ a.T) @ b.T)
        return outs

    agree(run(together(model), model), run(written_out, model))
    model.eval()
    agree(run(together(model), model), run(model, model))


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"rank_pattern": {"v": 8}, "alpha_pattern": {"v": 12}}, [3]),  # the scale stays
        ({"targets": "q"}, [1]),
        ({"targets": "qv", "rank_pattern": {"v": 8}, "alpha_pattern": {"v": 12}}, [1, 1]),
        ({"rank_pattern": {"v": 8}}, [1, 1, 1]),  # and so another scale
        ({"use_dora": True}, []),
        ({"lora_bias": True}, []),
    ],
)
def test_only_layers_of_the_same_scale_are_computed_together(changes, wanted, counts):
    model = make(**changes)
    agree(run(together(model), model), run(model, model))
    assert counts == wanted


@pytest.mark.parametrize("change", ["off", "merged"])
def test_adapters_that_are_off_or_merged_add_nothing(change, counts):
    model, x = make(), torch.randn(3, WIDTH)
    for layer in model.values():
        layer.enable_adapters(False) if change == "off" else layer.merge()
    assert all(map(torch.equal, together(model)(x), model(x)))
    assert counts == []


def test_the_input_is_kept_once_and_no_weight():
    model, kept = make(4, dropout=P), []
    x = torch.randn(14, WIDTH, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        together(model)(x)
    wanted = [(14, WIDTH), (14, 12), (12, WIDTH), (48, 4), (64, 4), (32, 4)]
    assert sorted(tuple(one.shape) for one in kept) == sorted(wanted)
    assert any(one.data_ptr() == x.data_ptr() for one in kept)


def test_gradients_have_the_dtype_of_the_factors():
    """DeepSpeed keeps adapters in bf16."""
    model = make(dropout=P).bfloat16()
    outs = together(model)(torch.randn(7, WIDTH, dtype=torch.bfloat16, requires_grad=True))
    sum(out.sum() for out in outs).backward()
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}
