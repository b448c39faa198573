"""The way through the experts of grouped_experts.py on a GPU.

All that stands between the products is fused, in the forward and the backward pass.

The same function, arranged so that little passes through memory and little is kept:

- a pick's weight multiplies what down takes, [N, F], not what it gives, [N, D], of which then
  nothing is needed again
- only the output of gate and up is kept for the backward pass, or not even that (`recompute`); the
  permuted tokens and what down takes are made again in passes that are made anyway
- nothing is kept after the product with down, so that checkpointing does not make it again
- of dropout before the adapter only what is kept is known, not the product
- an adapter's part is added by the kernel that reads the product next

The plain twin of the whole is `experts.grouped_experts_forward`, of each kernel a function in
kernels/training/torch_ops.py.

Letters: T tokens, K experts a token, N = T*K picks, E experts, D hidden, F expert width, R rank.
"""

from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch.nn import functional as F

from ..quantized_base import dequantize

Maybe = torch.Tensor | None


@dataclass
class Picks:
    """Where the picks go, and how they are computed."""

    ops: ModuleType  # kernels.fused or kernels.plain
    token_N: torch.Tensor
    place_TK: torch.Tensor  # -1: of an expert that another rank has
    ends_E: torch.Tensor
    recompute: bool  # gate and up again in the backward pass
    token_dropout: float = 0.0  # before the adapter of gate and up, alike in all picks of a token
    pick_dropout: float = 0.0  # before down's
    seed: int = 0  # of the latter
    opened: Any = None  # of `_Down`: what down takes, down, what B takes, B

    def product(self, x_NI: torch.Tensor, weight_EIO: torch.Tensor) -> torch.Tensor:
        """x[n] @ weight[e] for the places of each expert."""
        return F.grouped_mm(x_NI, weight_EIO, offs=self.ends_E)

    def outer(self, x_NI: torch.Tensor, y_NO: torch.Tensor) -> torch.Tensor:
        """x^T y over the places of each expert, [E, I, O]; 0 for one without."""
        return F.grouped_mm(x_NI.t(), y_NO, offs=self.ends_E)


def fused_experts(picks: Picks, *arguments: Maybe) -> torch.Tensor:
    """[T, D] of what `FusedExperts` takes after the picks."""
    return _Down.apply(picks, FusedExperts.apply(picks, *arguments))


class FusedExperts(torch.autograd.Function):
    """All of it in the backward pass, in the forward pass all but the product with down, which
    takes `picks.opened`. What it gives, [T, D], takes the gradient and holds nothing.

    Arguments: x [T, D] in the dtype of the products, weights [T, K], then of each stack the weight
    [E, O, I] (frozen and maybe quantised, or not) with an adapter's scaled A [E, R, I] and
    B [E, R, O], or None."""

    @staticmethod
    def forward(
        ctx: Any,
        picks: Picks,
        x_TD: torch.Tensor,
        weights_TK: torch.Tensor,
        gate_up: torch.Tensor,
        a_up: Maybe,
        b_up: Maybe,
        down: torch.Tensor,
        a_down: Maybe,
        b_down: Maybe,
    ) -> torch.Tensor:
        weights_N = weights_TK.new_zeros(weights_TK.numel() + 1)
        weights_N[picks.place_TK.flatten()] = weights_TK.flatten()
        weights_N = weights_N[:-1]  # without what stood at place -1
        low_x_TD, kept_TD = drop_out(x_TD, picks.token_dropout)
        gate_up_NF, act_NF, low_act_NF, up_NR = _open(
            picks, x_TD, low_x_TD, weights_N, gate_up, a_up, b_up
        )
        down_NR = None if a_down is None else picks.product(low_act_NF, a_down.mT)
        picks.opened = (act_NF, down, down_NR, b_down)
        ctx.picks, ctx.stacks = picks, (gate_up, down)  # the parameters themselves, not copies
        kept_NF = None if picks.recompute else gate_up_NF
        ctx.save_for_backward(
            x_TD, kept_TD, weights_N, kept_NF, a_up, b_up, up_NR, a_down, b_down, down_NR
        )
        return x_TD.new_zeros(()).expand_as(x_TD)

    @staticmethod
    def backward(ctx: Any, grad_TD: torch.Tensor) -> tuple[Maybe, ...]:
        picks, (gate_up, down) = ctx.picks, ctx.stacks
        x_TD, kept_TD, weights_N, gate_up_NF, a_up, b_up, up_NR, a_down, b_down, down_NR = (
            ctx.saved_tensors
        )
        drop = partial(drop_again, kept=kept_TD, p=picks.token_dropout)
        needs = dict(zip(NAMES, ctx.needs_input_grad, strict=True))
        grads: dict[str, Maybe] = dict.fromkeys(NAMES)
        if gate_up_NF is None:
            gate_up_NF = _open(picks, x_TD, drop(x_TD), weights_N, gate_up, a_up, b_up)[0]

        # Nothing as large as [N, D] or [N, F] stays longer than it is needed.
        grad_ND = grad_TD.contiguous()[picks.token_N]
        act_NF = picks.product(grad_ND, dequantize(down, x_TD.dtype))  # its gradient, for now
        grad_low_NF = None
        if a_down is not None:
            grad_down_NR = picks.product(grad_ND, b_down.mT)
            grad_low_NF = picks.product(grad_down_NR, a_down)
            grads["b_down"] = picks.outer(down_NR, grad_ND)
        grad_ND = grad_ND if needs["down"] else None
        grad_gate_up_NF, grad_N = picks.ops.weighted_swiglu_backward(
            act_NF, grad_low_NF, gate_up_NF, weights_N, needs["down"] or needs["a_down"],
            picks.pick_dropout, picks.seed,
        )  # fmt: skip
        del gate_up_NF, grad_low_NF
        grads["weights_TK"] = grad_N[picks.place_TK].masked_fill(picks.place_TK < 0, 0.0)
        if needs["down"]:
            grads["down"] = picks.outer(grad_ND, act_NF).to(down.dtype)
        if a_down is not None:
            grads["a_down"] = picks.outer(grad_down_NR, act_NF)
        del grad_ND, act_NF

        if needs["x_TD"]:
            grad_ND = picks.product(grad_gate_up_NF, dequantize(gate_up, x_TD.dtype))
            grads["x_TD"] = picks.ops.sum_picks(grad_ND, None, picks.place_TK)
            del grad_ND
        if needs["gate_up"]:
            outer_EFD = picks.outer(grad_gate_up_NF, x_TD[picks.token_N])
            grads["gate_up"] = outer_EFD.to(gate_up.dtype)
        if a_up is not None:
            grads["b_up"] = picks.outer(up_NR, grad_gate_up_NF)
            grad_up_NR = picks.product(grad_gate_up_NF, b_up.mT)
            del grad_gate_up_NF
            grads["a_up"] = picks.outer(grad_up_NR, drop(x_TD)[picks.token_N])
            if needs["x_TD"]:
                low_ND = picks.product(grad_up_NR, a_up)
                grads["x_TD"] += drop(picks.ops.sum_picks(low_ND, None, picks.place_TK))
        return tuple(grads.values())


class _Down(torch.autograd.Function):
    """The last product and the sum of the picks; its gradients are found by `FusedExperts`."""

    @staticmethod
    def forward(ctx: Any, picks: Picks, opened_TD: torch.Tensor) -> torch.Tensor:
        (act_NF, down, down_NR, b_down), picks.opened = picks.opened, None
        out_ND = picks.product(act_NF, dequantize(down, act_NF.dtype).mT)
        low_ND = None if b_down is None else picks.product(down_NR, b_down)
        return picks.ops.sum_picks(out_ND, low_ND, picks.place_TK)

    @staticmethod
    def backward(ctx: Any, grad_TD: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, grad_TD


NAMES = (
    "picks", "x_TD", "weights_TK",
    "gate_up", "a_up", "b_up", "down", "a_down", "b_down",
)  # fmt: skip


def _open(
    picks: Picks,
    x_TD: torch.Tensor,
    low_x_TD: torch.Tensor,
    weights_N: torch.Tensor,
    gate_up: torch.Tensor,
    a_up: Maybe,
    b_up: Maybe,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Maybe]:
    """gate and up [N, 2F]; what down and its adapter take, [N, F]; x A [N, R]. The adapter takes
    `low_x_TD`."""
    x_ND = x_TD[picks.token_N]
    gate_up_NF = picks.product(x_ND, dequantize(gate_up, x_TD.dtype).mT)
    low_NF = up_NR = None
    if a_up is not None:
        x_ND = x_ND if low_x_TD is x_TD else low_x_TD[picks.token_N]
        up_NR = picks.product(x_ND, a_up.mT)
        del x_ND  # what follows is larger
        low_NF = picks.product(up_NR, b_up)
    opened = picks.ops.weighted_swiglu(
        gate_up_NF, low_NF, weights_N, picks.pick_dropout, picks.seed
    )
    return gate_up_NF, *opened, up_NR


def drop_out(x: torch.Tensor, p: float) -> tuple[torch.Tensor, Maybe]:
    """x with dropout, and what of it was kept: a byte a number. x itself and None without any."""
    return torch.native_dropout(x, p, True) if p else (x, None)


def drop_again(x: torch.Tensor, kept: Maybe, p: float) -> torch.Tensor:
    """The same of x, or of a gradient, as `drop_out` did."""
    if kept is None:
        return x
    return torch.ops.aten.native_dropout_backward(x, kept, 1 / (1 - p))
