"""The routed experts in training, as autograd sees them: two Functions around fused kernels.

They compute what `DeepseekExperts.forward` does, with adapters added, and keep little for the
backward pass:

- The weight of a pick multiplies the input of down, [N, F], not its output, [N, D]. So the output
  is not needed in the backward pass.
- Only the output of gate and up is kept, or not even that (`recompute`). The backward pass gathers
  the tokens again, and gets the input of down from a kernel that it calls anyway.
- Frozen weights may be quantised. Each pass dequantises them where a product takes them.
- If only the first C experts train, no gradient of the others is formed. Their products take one
  stack all the same: the trained weights are copied into the first places of the frozen one.
- Dropout keeps nothing: each pass drops again what the seed says.

`_Experts` saves all tensors and finds all gradients. `_Down` saves nothing:

    forward     x -> _Experts: gate and up, weighted SwiGLU -> _Down: down, sum of picks -> out
    backward    _Experts: every gradient <- carrier <- _Down: passes on the gradient of out

They are two because checkpointing repeats a forward pass only up to the last tensor that it saved:
so it does not repeat the product with down. `carrier` is all that autograd sees between them. It is
a zero in the shape of x, without memory of its own.

Letters: T tokens, K experts a token, N = T*K picks, E experts, C of them that train, D hidden,
F expert width, R rank.
"""

from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from ...kernels.training.torch_ops import Seed
from ..quantized_base import dequantize

Maybe = torch.Tensor | None
Stack = tuple[torch.Tensor, Maybe, Maybe, Maybe]
"""A weight [E, O, I], trained or frozen and maybe quantised, and None. Or the weight [C, O, I] of
the first experts, which train, and the frozen stack of all [E, O, I], whose first C places mean
nothing. Then the scaled A [E, R, I] and B [E, R, O] of an adapter, or None."""


class Picks(NamedTuple):
    """Where the picks go, and how they are computed. Places are numbered expert by expert."""

    ops: ModuleType  # kernels.training.triton_ops or its twin torch_ops
    token_N: torch.Tensor  # the token at each place
    place_TK: torch.Tensor  # the place of each pick, -1 for a pick that another rank computes
    ends_E: torch.Tensor  # where the places of each expert end
    recompute: bool  # computes gate and up again in the backward pass
    token_dropout: float  # before the adapter of gate and up, alike for all picks of a token
    pick_dropout: float  # before the adapter of down
    token_seed: Seed
    pick_seed: Seed


def fused_experts(
    picks: Picks, x_TD: torch.Tensor, weights_TK: torch.Tensor, gate_up: Stack, down: Stack
) -> torch.Tensor:
    """The output of the experts, [T, D], for x in the dtype of the products."""
    carrier_TD, act_NF, down_NR = _Experts.apply(picks, x_TD, weights_TK, *gate_up, *down)
    # autograd does not look into a tuple.
    return _Down.apply(picks, carrier_TD, (act_NF, down_NR, *down[:2], down[3]))


def all_experts(weight: torch.Tensor, frozen: Maybe, dtype: torch.dtype) -> torch.Tensor:
    """The numbers [E, O, I] of the first two of a `Stack`. Autograd must not watch: they may be the
    frozen stack itself, with the trained weights copied into it."""
    if frozen is None:
        return dequantize(weight, dtype)
    stack = dequantize(frozen, dtype)
    if stack.data_ptr() != weight.data_ptr():  # else the trained weights are a part of the stack
        stack[: len(weight)].copy_(weight)
    return stack


class _Experts(torch.autograd.Function):
    """Everything but the product with down, whose inputs it returns beside the carrier: the
    weighted activations [N, F] and what B multiplies [N, R]. Its backward pass is that of the
    whole. `stacks` are two `Stack`s, that of gate and up first."""

    @staticmethod
    def forward(
        ctx: Any, picks: Picks, x_TD: torch.Tensor, weights_TK: torch.Tensor, *stacks: Maybe
    ) -> tuple[torch.Tensor, torch.Tensor, Maybe]:
        gate_up, frozen_up, a_up, b_up, down, frozen_down, a_down, b_down = stacks
        weights_N = weights_TK.new_zeros(weights_TK.numel() + 1)
        weights_N[picks.place_TK.flatten()] = weights_TK.flatten()
        weights_N = weights_N[:-1]  # place -1 was the last
        dropped_TD = picks.ops.drop_out(x_TD, picks.token_dropout, picks.token_seed)
        gate_up_NF, act_NF, dropped_NF, up_NR = _gate_and_up(
            picks, x_TD, dropped_TD, weights_N, (gate_up, frozen_up, a_up, b_up)
        )
        down_NR = None
        if a_down is not None:
            down_NR = F.grouped_mm(dropped_NF, a_down.mT, offs=picks.ends_E)
        ctx.mark_non_differentiable(*(x for x in (act_NF, down_NR) if x is not None))
        ctx.set_materialize_grads(False)  # would be zeros of [N, F] and [N, R]
        ctx.picks = picks
        # The parameters themselves, not copies.
        ctx.stacks = (gate_up, frozen_up), (down, frozen_down)
        kept_NF = None if picks.recompute else gate_up_NF
        ctx.save_for_backward(x_TD, weights_N, kept_NF, a_up, b_up, up_NR, a_down, b_down, down_NR)
        return x_TD.new_zeros(()).expand_as(x_TD), act_NF, down_NR

    @staticmethod
    def backward(ctx: Any, grad_TD: torch.Tensor, *_: None) -> tuple[Maybe, ...]:
        picks, ((gate_up, frozen_up), (down, frozen_down)) = ctx.picks, ctx.stacks
        x_TD, weights_N, gate_up_NF, a_up, b_up, up_NR, a_down, b_down, down_NR = ctx.saved_tensors
        product = partial(F.grouped_mm, offs=picks.ends_E)
        drop = partial(picks.ops.drop_out, dropout=picks.token_dropout, seed=picks.token_seed)
        needs = dict(zip(NAMES, ctx.needs_input_grad, strict=True))
        grads: dict[str, Maybe] = dict.fromkeys(NAMES)
        if gate_up_NF is None:
            stack = (gate_up, frozen_up, a_up, b_up)
            gate_up_NF = _gate_and_up(picks, x_TD, drop(x_TD), weights_N, stack)[0]

        # Nothing as large as [N, D] or [N, F] stays longer than it is needed.
        grad_ND = grad_TD.contiguous()[picks.token_N]
        grad_NF = product(grad_ND, all_experts(down, frozen_down, x_TD.dtype))
        grad_dropped_NF = None
        if a_down is not None:
            grad_down_NR = product(grad_ND, b_down.mT)
            grad_dropped_NF = product(grad_down_NR, a_down)
            grads["b_down"] = product(down_NR.t(), grad_ND)
        grad_ND = grad_ND if needs["down"] else None
        grad_gate_up_NF, grad_N = picks.ops.weighted_swiglu_backward(
            grad_NF, grad_dropped_NF, gate_up_NF, weights_N, needs["down"] or needs["a_down"],
            picks.pick_dropout, picks.pick_seed,
        )  # fmt: skip
        act_NF = grad_NF  # the kernel has written the activations over their gradient
        del gate_up_NF, grad_NF, grad_dropped_NF
        grads["weights_TK"] = grad_N[picks.place_TK].masked_fill(picks.place_TK < 0, 0.0)
        if needs["down"]:
            ends = picks.ends_E[: len(down)]  # what follows the first C experts is not multiplied
            grads["down"] = product(grad_ND.t(), act_NF, offs=ends).to(down.dtype)
        if a_down is not None:
            grads["a_down"] = product(grad_down_NR.t(), act_NF)
        del grad_ND, act_NF

        if needs["x_TD"]:
            grad_ND = product(grad_gate_up_NF, all_experts(gate_up, frozen_up, x_TD.dtype))
            grads["x_TD"] = picks.ops.sum_picks(grad_ND, None, picks.place_TK)
            del grad_ND
        if needs["gate_up"]:
            ends = picks.ends_E[: len(gate_up)]
            outer_CFD = product(grad_gate_up_NF.t(), x_TD[picks.token_N], offs=ends)
            grads["gate_up"] = outer_CFD.to(gate_up.dtype)
        if a_up is not None:
            grads["b_up"] = product(up_NR.t(), grad_gate_up_NF)
            grad_up_NR = product(grad_gate_up_NF, b_up.mT)
            del grad_gate_up_NF
            grads["a_up"] = product(grad_up_NR.t(), drop(x_TD)[picks.token_N])
            if needs["x_TD"]:
                grad_ND = product(grad_up_NR, a_up)
                grads["x_TD"] += drop(picks.ops.sum_picks(grad_ND, None, picks.place_TK))
        return tuple(grads.values())


NAMES = ["picks", "x_TD", "weights_TK"]
NAMES += ["gate_up", "frozen_up", "a_up", "b_up", "down", "frozen_down", "a_down", "b_down"]
"""The arguments of `_Experts`, in their order."""


class _Down(torch.autograd.Function):
    """The product with down, and the sum of each token's picks. `_Experts` finds its gradients."""

    @staticmethod
    def forward(
        ctx: Any, picks: Picks, carrier_TD: torch.Tensor, inputs: tuple[Maybe, ...]
    ) -> torch.Tensor:
        act_NF, down_NR, down, frozen_down, b_down = inputs
        down_EDF = all_experts(down, frozen_down, act_NF.dtype)
        out_ND = F.grouped_mm(act_NF, down_EDF.mT, offs=picks.ends_E)
        del down_EDF
        low_ND = None if b_down is None else F.grouped_mm(down_NR, b_down, offs=picks.ends_E)
        return picks.ops.sum_picks(out_ND, low_ND, picks.place_TK)

    @staticmethod
    def backward(ctx: Any, grad_TD: torch.Tensor) -> tuple[None, torch.Tensor, None]:
        return None, grad_TD, None


def _gate_and_up(
    picks: Picks,
    x_TD: torch.Tensor,
    dropped_TD: torch.Tensor,
    weights_N: torch.Tensor,
    stack: Stack,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Maybe]:
    """gate and up [N, 2F]; the weighted activations [N, F] without and with dropout; and, if there
    is an adapter, which takes `dropped_TD`, what its B multiplies [N, R]."""
    gate_up, frozen_up, a_up, b_up = stack
    product = partial(F.grouped_mm, offs=picks.ends_E)
    x_ND = x_TD[picks.token_N]
    gate_up_NF = product(x_ND, all_experts(gate_up, frozen_up, x_TD.dtype).mT)
    low_NF = up_NR = None
    if a_up is not None:
        x_ND = x_ND if dropped_TD is x_TD else dropped_TD[picks.token_N]
        up_NR = product(x_ND, a_up.mT)
        del x_ND  # what follows is larger
        low_NF = product(up_NR, b_up)
    act_NF, dropped_NF = picks.ops.weighted_swiglu(
        gate_up_NF, low_NF, weights_N, picks.pick_dropout, picks.pick_seed
    )
    return gate_up_NF, act_NF, dropped_NF, up_NR
