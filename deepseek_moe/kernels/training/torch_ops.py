"""What each kernel of fine-tuning computes, in torch. The experts use it where no GPU is."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..torch_ops import sort_picks as sort_picks
from ..torch_ops import swiglu

if TYPE_CHECKING:  # experts are measured without this package too
    from bitsandbytes.functional import QuantState

# Dropout before adapters.


class Seed(NamedTuple):
    """Which numbers drop out. Passes that have the same seed drop the same."""

    step: Tensor  # one int64 on the device of the numbers, so that a CUDA graph can read a new one
    salt: int  # keeps apart what drops out in one step


def drop_out(x: Tensor, dropout: float, seed: Seed | None) -> Tensor:
    """x with the share `dropout` of its numbers 0 and the others / (1 - dropout)."""
    return (x * _kept(x, dropout, seed)).to(x.dtype) if dropout else x


# Between the products of the experts in training.


def weighted_swiglu(
    gate_up_NF: Tensor, low_NF: Tensor | None, weights_N: Tensor, dropout: float, seed: Seed | None
) -> tuple[Tensor, Tensor]:
    """weight * silu(gate) * up, [N, F], without and with dropout, of gate and up in [N, 2F].

    `low_NF` is added to `gate_up_NF` in place. `seed` chooses the share `dropout` that is dropped.
    """
    if low_NF is not None:
        gate_up_NF.add_(low_NF)
    act_NF = swiglu(gate_up_NF.float()) * weights_N[:, None]
    dropped_NF = act_NF * _kept(act_NF, dropout, seed)
    return act_NF.to(gate_up_NF.dtype), dropped_NF.to(gate_up_NF.dtype)


def weighted_swiglu_backward(
    grad_NF: Tensor,
    low_grad_NF: Tensor | None,
    gate_up_NF: Tensor,
    weights_N: Tensor,
    need_act: bool,
    dropout: float,
    seed: Seed | None,
) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up [N, 2F] and of the weights [N].

    `grad_NF` and `low_grad_NF` are the gradients of the two results of `weighted_swiglu`. With
    `need_act`, the second result itself is written over `grad_NF`.
    """
    kept_NF = _kept(grad_NF, dropout, seed)
    total_NF = grad_NF.float()
    if low_grad_NF is not None:
        total_NF = total_NF + low_grad_NF.float() * kept_NF
    gate_NF, up_NF = gate_up_NF.float().chunk(2, dim=-1)
    sigmoid_NF, silu_NF = torch.sigmoid(gate_NF), F.silu(gate_NF)
    act_NF = silu_NF * up_NF
    grad_weights_N = (total_NF * act_NF).sum(-1)
    total_NF = total_NF * weights_N[:, None]
    grad_gate_NF = total_NF * up_NF * (sigmoid_NF + silu_NF * (1 - sigmoid_NF))
    grad_gate_up_NF = torch.cat([grad_gate_NF, total_NF * silu_NF], dim=-1)
    if need_act:
        grad_NF.copy_(act_NF * weights_N[:, None] * kept_NF)
    return grad_gate_up_NF.to(grad_NF.dtype), grad_weights_N.to(weights_N.dtype)


def _kept(x_NF: Tensor, dropout: float, seed: Seed | None) -> Tensor | float:
    """What dropout multiplies numbers of the shape of x with: 0, or 1 / (1 - dropout)."""
    if not dropout:
        return 1.0
    random = torch.Generator(x_NF.device).manual_seed(int(seed.step) + seed.salt)
    kept_NF = torch.rand(x_NF.shape, generator=random, device=x_NF.device) >= dropout
    return kept_NF / (1 - dropout)


def sum_picks(x_ND: Tensor, low_ND: Tensor | None, place_TK: Tensor) -> Tensor:
    """The sum of x (and of low) over the places of each token's picks, [T, D]; -1 is no place."""
    picked_TKD = x_ND[place_TK.long()].float()
    if low_ND is not None:
        picked_TKD = picked_TKD + low_ND[place_TK.long()].float()
    picked_TKD = picked_TKD.masked_fill((place_TK < 0)[..., None], 0.0)
    return picked_TKD.sum(1).to(x_ND.dtype)


# The frozen base of QLoRA.


def unpack_4bit(packed: Tensor, state: "QuantState") -> Tensor:
    """A 4-bit weight of bitsandbytes (Dettmers et al. 2023, arXiv 2305.14314) in state.dtype.

    The high half of each `packed` byte, then the low half, is an index into state.code [16].
    `blocksize` weights share a scale. The scales are `absmax` in fp32. With double quantisation
    `absmax` has one byte for each scale, which is state2.code[absmax] * state2.absmax + offset, and
    state2.blocksize of them share a state2.absmax. The product of code and scale is computed in
    fp32 and rounded once.
    """
    numel, scale = state.shape.numel(), state.absmax
    index = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).flatten()
    if state.nested:
        scale2 = state.state2.absmax.repeat_interleave(state.state2.blocksize)
        scale = state.state2.code[scale.int()] * scale2[: len(scale)] + state.offset
    scale = scale.repeat_interleave(state.blocksize)[:numel]
    return (state.code[index[:numel].int()] * scale).to(state.dtype).view(state.shape)
