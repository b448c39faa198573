"""The routed experts of one layer with inputs, run by any forward, in any dtype, on any device.

Letters: T tokens, K experts a token, E experts, C of them that train, D hidden, O out, I in, R
rank.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from deepseek_moe.training.compute.grouped_experts import (
    GROUPED,
    RECOMPUTED,
    LowRank,
    grouped_experts_forward,
)
from deepseek_moe.training.quantized_base import Quantization, dequantize, is_quantized

ROUTINGS = ("uniform", "half of the picks on 8 experts", "8 experts without tokens", "other ranks")


class ExpertLayer:
    """Experts, adapters and inputs, whose numbers are the same in bf16 and fp32.

    `sizes` are tokens, E, D, width and K. With `bits` 8 or 4 the weights are quantised. Of the
    experts only the first `chosen` train, beside a frozen stack whose places for them are NaN, or
    zeros in 8 or 4 bits.
    """

    def __init__(
        self,
        trained: bool = False,
        chosen: int = 0,
        bits: int = 16,
        adapted: tuple[str, ...] = (),
        rank: int = 5,
        dropout: float = 0.0,
        sizes: tuple[int, ...] = (21, 16, 64, 48, 3),
        device: str | torch.device = "cpu",
    ) -> None:
        self.tokens, self.E, self.D, self.width, self.K = sizes
        self.random = torch.Generator(device).manual_seed(0)
        self.trained, self.dropout, self.factors = trained, dropout, {}
        shapes = {"gate_up_proj": (2 * self.width, self.D), "down_proj": (self.D, self.width)}
        self.stacks = {n: self.normal(self.E, *s) * s[1] ** -0.5 for n, s in shapes.items()}
        self.first = {n: x[:chosen].clone() for n, x in self.stacks.items() if chosen}
        for stack in self.stacks.values():
            stack[:chosen] = float("nan") if bits == 16 else 0.0
        if bits < 16:
            self.stacks = {n: Quantization(bits).quantize(x) for n, x in self.stacks.items()}
        for name in adapted:
            out, width = shapes[name]
            a_ERI, b_ERO = self.normal(self.E, rank, width), self.normal(self.E, rank, out)
            self.factors[name] = (a_ERI * width**-0.5, b_ERO * rank**-0.5)
        self.hidden_TD, self.probe_TD = (self.normal(self.tokens, self.D) for _ in range(2))
        self.weights_TK = self.scores(self.K).bfloat16().float()

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.random, device=self.random.device).bfloat16()

    def scores(self, count: int) -> torch.Tensor:
        return torch.rand(self.tokens, count, generator=self.random, device=self.random.device)

    def picks(self, routing: str) -> torch.Tensor:
        """[T, K]; the picks of a token are all different, and E for those of other ranks."""
        scores_TE = self.scores(self.E)
        if routing.startswith("half"):
            half = self.K // 2
            few_TK = scores_TE[:, :8].topk(half).indices
            many_TK = scores_TE[:, 8:].topk(self.K - half).indices + 8
            return torch.cat([few_TK, many_TK], dim=1)
        if routing.endswith("without tokens"):  # the first, the last, and some between
            scores_TE[:, [0, 1, self.E // 2, -6, -4, -3, -2, -1]] = -1.0
        index_TK = scores_TE.topk(self.K).indices
        if routing == "other ranks":
            index_TK[::3, 1] = self.E
            index_TK[5] = self.E
        return index_TK

    def run(
        self,
        index_TK: torch.Tensor,
        dtype: torch.dtype = torch.float32,
        recompute: bool = False,
        in_full: bool = False,
        forward: Callable[..., torch.Tensor] = grouped_experts_forward,
    ) -> dict[str, torch.Tensor]:
        """The output, and the gradients of all that can have one.

        With `in_full` frozen weights are given as the numbers that they stand for.
        """
        config = SimpleNamespace(_experts_implementation=RECOMPUTED if recompute else GROUPED)
        experts = SimpleNamespace(num_experts=self.E, act_fn=nn.SiLU(), config=config)
        first: dict[str, torch.Tensor] = {}
        leaves = {"hidden": leaf(self.hidden_TD, dtype), "weights": leaf(self.weights_TK)}
        for name, stack in self.stacks.items():
            if self.trained:
                leaves[name] = stack = leaf(stack, dtype)
            elif name in self.first:
                leaves[name] = first[name] = leaf(self.first[name], dtype)
                stack = stack if is_quantized(stack) else stack.to(dtype).clone()  # written to
            if in_full:
                stack = dequantize(stack, dtype)
                stack = torch.cat([first[name], stack[len(first[name]) :]]) if first else stack
            setattr(experts, name, stack)
        adapters: dict[str, Any] = {}
        more = [adapters, first] if first and not in_full else [adapters]
        for name, factors in self.factors.items():
            leaves[f"{name} A"], leaves[f"{name} B"] = a_ERI, b_ERO = [leaf(x) for x in factors]
            b_ORE = b_ERO.permute(2, 1, 0).contiguous()  # as PEFT stores it, the experts fastest
            adapters[name] = LowRank(a_ERI, b_ORE.permute(2, 1, 0), self.dropout)
        torch.manual_seed(0)  # of the dropout
        out_TD = forward(experts, leaves["hidden"], index_TK, leaves["weights"], *more)
        grads = torch.autograd.grad(out_TD, list(leaves.values()), self.probe_TD.to(out_TD.dtype))
        return {"output": out_TD.detach(), **dict(zip(leaves, grads, strict=True))}


def leaf(x: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return x.detach().to(dtype).clone().requires_grad_()
