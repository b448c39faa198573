"""Fine-tuning's fused ways against its plain ones, in outputs and every gradient.

Letters: T tokens, K experts a token, E experts, D hidden, O out, I in, R rank.
"""

from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from gpu_fixtures import TEXT, distance
from torch import nn

from deepseek_moe import DeepseekForCausalLM
from deepseek_moe.checkpoint import own_tokenizer
from deepseek_moe.files import BUNDLED_MODEL
from deepseek_moe.kernels.training import torch_ops
from deepseek_moe.training.arguments import ALL_LINEARS, split_commas
from deepseek_moe.training.compute import grouped_experts
from deepseek_moe.training.compute.fused_experts import drop_again, drop_out
from deepseek_moe.training.compute.grouped_experts import (
    GROUPED,
    RECOMPUTED,
    LowRank,
    grouped_experts_forward,
)
from deepseek_moe.training.compute.liger import use_fused_forwards
from deepseek_moe.training.quantized_base import Quantization, dequantize
from deepseek_moe.training.trainable import add_lora

GRADIENTS = 2e-2
"""The relative distance from fp32 that a gradient in bf16 may have."""
WORSE = 1.5
"""So many times as far from fp32 as the plain way in bf16 may the fused way be."""
ROUTINGS = ("uniform", "half of the picks on 8 experts", "8 experts without tokens")
KINDS = ("all weights", "adapters over bf16", "adapters over nf4")


def test_the_backward_pass_drops_what_the_forward_pass_dropped(device: torch.device) -> None:
    x_TD = torch.randn(1000, 2048, device=device).bfloat16()
    dropped_TD, kept_TD = drop_out(x_TD, 0.1)
    again_TD = drop_again(x_TD, kept_TD, 0.1)
    assert torch.equal(again_TD == 0, dropped_TD == 0)
    assert distance(again_TD, dropped_TD) < 2**-8


@pytest.mark.parametrize("recompute_layers", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_step(kind: str, recompute_layers: bool, device: torch.device) -> None:
    """The loss and all gradients together, since rounding swaps some picks.

    On a CPU both ways are the plain one, because Liger's kernels need a GPU.
    """
    run = partial(step, kind, device=device)
    exact = run(False, dtype=torch.float32, fused=False)
    theirs = run(recompute_layers, dtype=torch.bfloat16, fused=False)
    ours = run(recompute_layers, dtype=torch.bfloat16, fused=device.type == "cuda")
    assert distance(ours, exact) <= WORSE * distance(theirs, exact)


def step(
    kind: str, recompute_layers: bool, device: torch.device, dtype: torch.dtype, fused: bool
) -> torch.Tensor:
    """The loss of the bundled model and all gradients, one after the other."""
    quantization = Quantization(4, dtype=str(dtype).removeprefix("torch."))
    model = DeepseekForCausalLM.from_pretrained(
        BUNDLED_MODEL,
        dtype=dtype,
        device_map={"": str(device)},
        experts_implementation=GROUPED,
        quantization_config=quantization.config([]) if kind.endswith("nf4") else None,
    )
    if kind.startswith("adapters"):
        model = add_lora(model, split_commas(ALL_LINEARS), 8, 16.0, 0.0)
        random = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape, generator=random).to(device) * 0.02
    if recompute_layers:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if fused:
        use_fused_forwards(model)
    length = 256 if device.type == "cuda" else 32
    ids = own_tokenizer(BUNDLED_MODEL)(TEXT * 4).input_ids[:length]
    ids_BL = torch.tensor(ids, device=device).view(2, -1)
    ops_for = grouped_experts.ops_for if fused else lambda device: torch_ops
    with mock.patch.object(grouped_experts, "ops_for", ops_for):
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model.train()(input_ids=ids_BL, labels=ids_BL, use_cache=False).loss
        loss.backward()
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat([loss.detach().view(1), *grads]).float()


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_fused_experts(kind: str, routing: str, device: torch.device) -> None:
    """The output and every gradient, twice bit for bit; on a CPU both ways are the plain one."""
    layer = ExpertLayer(kind, device)
    index_TK = layer.picks(routing)
    exact = layer.run(torch_ops, torch.float32, index_TK)
    theirs = layer.run(torch_ops, torch.bfloat16, index_TK)
    for recompute in (False, True):
        ours, again = (layer.run(None, torch.bfloat16, index_TK, recompute) for _ in range(2))
        for name, wanted in exact.items():
            mine, plain_way = distance(ours[name], wanted), distance(theirs[name], wanted)
            message = f"{name}, recompute {recompute}: {mine:.2g}, the plain way {plain_way:.2g}"
            assert mine <= min(GRADIENTS, WORSE * plain_way + 1e-5), message
            assert torch.equal(ours[name], again[name]), f"{name} of another run is different"


class ExpertLayer:
    """Experts, adapters and inputs whose numbers are the same in bf16 and fp32.

    On a GPU the sizes are the official ones, but for half of the experts: several processes share
    the memory.
    """

    def __init__(self, kind: str, device: torch.device) -> None:
        self.random, self.kind = torch.Generator(device).manual_seed(0), kind
        self.tokens, self.E, self.D, width, self.K, rank = 512, 32, 2048, 1408, 6, 64
        if device.type == "cpu":
            self.tokens, self.E, self.D, width, self.K, rank = 40, 16, 64, 64, 3, 8
        shapes = {"gate_up_proj": (2 * width, self.D), "down_proj": (self.D, width)}
        self.stacks = {n: self.normal(self.E, *s, std=s[1] ** -0.5) for n, s in shapes.items()}
        if kind.endswith("nf4"):
            self.stacks = {n: Quantization(4).quantize(x) for n, x in self.stacks.items()}
        self.factors = {}
        for n, (O, I) in shapes.items() if kind.startswith("adapters") else ():  # noqa: E741
            a_ERI, b_ERO = self.normal(self.E, rank, I), self.normal(self.E, rank, O)
            self.factors[n] = (a_ERI * I**-0.5, b_ERO * rank**-0.5)
        self.hidden_TD, self.probe_TD = (self.normal(self.tokens, self.D) for _ in range(2))
        scores_TK = torch.rand(self.tokens, self.K, generator=self.random, device=device)
        self.weights_TK = scores_TK.bfloat16().float()

    def normal(self, *shape: int, std: float = 1.0) -> torch.Tensor:
        options = {"generator": self.random, "device": self.random.device}
        return (torch.randn(*shape, **options) * std).bfloat16()

    def picks(self, routing: str) -> torch.Tensor:
        """[T, K]; the picks of a token are all different."""
        options = {"generator": self.random, "device": self.random.device}
        scores_TE = torch.rand(self.tokens, self.E, **options)
        if routing.startswith("half"):
            half = self.K // 2
            few_TK = scores_TE[:, :8].topk(half).indices
            many_TK = scores_TE[:, 8:].topk(self.K - half).indices + 8
            return torch.cat([few_TK, many_TK], dim=1)
        if routing.endswith("without tokens"):  # the first, the last, and some between
            scores_TE[:, [0, 1, self.E // 2, -6, -4, -3, -2, -1]] = -1.0
        return scores_TE.topk(self.K).indices

    def run(
        self, ops: Any, dtype: torch.dtype, index_TK: torch.Tensor, recompute: bool = False
    ) -> dict[str, torch.Tensor]:
        """The output, and the gradients of all that can have one.

        `ops` are torch_ops, or None for those of the device.
        """
        config = SimpleNamespace(_experts_implementation=RECOMPUTED if recompute else GROUPED)
        experts = SimpleNamespace(num_experts=self.E, act_fn=nn.SiLU(), config=config)
        leaves = {"hidden": leaf(self.hidden_TD, dtype), "weights": leaf(self.weights_TK)}
        for name, stack in self.stacks.items():
            if self.kind == "all weights":
                leaves[name] = stack = leaf(stack, dtype)
            elif dtype == torch.float32:  # what it is in bf16
                stack = dequantize(stack, torch.bfloat16).float()
            setattr(experts, name, stack)
        adapters = {}
        for name, factors in self.factors.items():
            leaves[f"{name} A"], leaves[f"{name} B"] = a, b = [leaf(x) for x in factors]
            adapters[name] = LowRank(a, b, 0.0)
        out_TD = grouped_experts_forward(
            experts, leaves["hidden"], index_TK, leaves["weights"], adapters, ops
        )
        grads = torch.autograd.grad(out_TD, list(leaves.values()), self.probe_TD.to(out_TD.dtype))
        return {"output": out_TD.detach(), **dict(zip(leaves, grads, strict=True))}


def leaf(x: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return x.detach().to(dtype).clone().requires_grad_()
