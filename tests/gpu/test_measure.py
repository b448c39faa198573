"""A profile measured with kernels and in bf16 beside one in fp32, and that nothing waits."""

from types import SimpleNamespace

import pytest
import torch
from expert_fixtures import ROUTINGS, ExpertLayer
from gpu_fixtures import TEXT, distance
from torch import nn

from deepseek_moe import DeepseekForCausalLM, load
from deepseek_moe.bundled import BUNDLED_MODEL
from deepseek_moe.experts.measure import PickSums, experts_and_norms, measure
from deepseek_moe.experts.profile import SCORES, Profile

BF16 = 1e-2  # the relative distance from fp32 of what one layer computes
OFFICIAL = (2048, 64, 2048, 1408, 6)
SMALL = (21, 16, 64, 48, 3)


def bundled(device: torch.device, dtype: str) -> tuple[DeepseekForCausalLM, list[list[int]]]:
    model, tokenizer = load(str(BUNDLED_MODEL), dtype, str(device))
    return model, tokenizer([TEXT, TEXT[:100], TEXT[50:]]).input_ids


@pytest.mark.parametrize("routing", [one for one in ROUTINGS if one != "other ranks"])
def test_outputs_and_norms(routing, device):
    layer = ExpertLayer(sizes=OFFICIAL if device.type == "cuda" else SMALL, device=device)
    index_TK = layer.picks(routing)

    def computed(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        stacks = {name: stack.to(dtype) for name, stack in layer.stacks.items()}
        experts = SimpleNamespace(num_experts=layer.E, act_fn=nn.SiLU(), **stacks)
        return experts_and_norms(experts, layer.hidden_TD.to(dtype), index_TK, layer.weights_TK)

    for ours, exact in zip(computed(torch.bfloat16), computed(torch.float32), strict=True):
        assert distance(ours, exact) < BF16


def test_profiles_in_bf16_and_fp32(device):
    """Rounding swaps some picks."""

    def scores(profile: Profile, name: str) -> torch.Tensor:
        return torch.tensor([getattr(layer, name) for layer in profile.layers.values()])

    profiles = []
    for dtype in ("bfloat16", "float32"):
        model, ids = bundled(device, dtype)
        profiles.append(measure(model, ids, fingerprint=dtype))
    for name in SCORES:
        assert distance(*(scores(one, name) for one in profiles)) < 5 * BF16, name


def test_the_host_waits_for_no_layer(device):
    model, _ = bundled(device, "bfloat16")
    moe, sums = model.model.layers[1].mlp, PickSums()
    hidden_TD = torch.randn(64, model.config.hidden_size, device=device).bfloat16()
    sums.is_token_T = torch.arange(64, device=device) < 50
    with torch.inference_mode(), sums.collected_from(model):
        _, weights_TK, index_TK = moe.gate(hidden_TD)
        moe.experts(hidden_TD, index_TK, weights_TK)  # compiles
        try:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("error")
            moe.experts(hidden_TD, index_TK, weights_TK)
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    assert sums.of[moe.experts][0].sum() == 2 * 50 * model.config.num_experts_per_tok
