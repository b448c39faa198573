"""What each kernel of fine-tuning computes, in torch. The experts use it where no GPU is."""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..torch_ops import sort_picks as sort_picks
from ..torch_ops import swiglu

if TYPE_CHECKING:  # experts are measured without this package too
    from bitsandbytes.functional import QuantState

ADAMW_BLOCK = 256
"""Weights that share a scale of each of AdamW's averages."""

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


# The optimizer of --single_gpu_full, with the random numbers of its kernel.


def adamw(
    weight: Tensor, grad: Tensor, state: dict[str, Tensor], options: dict[str, Any], seed: int
) -> Tensor:
    """A step of AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101), in place.

    `weight` is bf16. `state` has the number of this step, from 1, and the averages: `m` and `v`,
    one byte a weight, with a scale for each ADAMW_BLOCK in `m_scale` and `v_scale`. All are rounded
    stochastically by `seed`, 31 random bits. `options` are those of torch's AdamW: lr, betas, eps
    and weight_decay. Returns the sum of the squared gradients in fp32, which is NaN if a weight or
    an average has become NaN or inf.
    """
    rate, step, (beta1, beta2) = options["lr"], int(state["step"]), options["betas"]
    m, v = read_averages(state)
    x, g = _blocks(weight).float(), _blocks(grad).float()
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    times1, times2 = 1 / (1 - beta1**step), 1 / (1 - beta2**step)
    change = (m * times1) / ((v * times2).sqrt() + options["eps"])
    x = x * (1 - rate * options["weight_decay"]) - rate * change

    random = _mixed(torch.arange(x.numel(), device=x.device).view_as(x) ^ seed)
    bits = (x.view(torch.int32).long() + (random & 0xFFFF)) & 0xFFFF0000
    state["m_scale"].copy_(m.abs().amax(1))
    state["v_scale"].copy_(v.amax(1))
    more = (random * 0x9E3779B1 & 0xFFFFFFFF) >> 12
    m_code = _stored(m.abs(), state["m_scale"], more, 4) + 128 * (m < 0)
    v_code = _stored(v, state["v_scale"], random >> 12, 5)
    rounded = torch.where(x.isnan(), x, _float(bits))
    for place, new in ((weight, rounded), (state["m"], m_code), (state["v"], v_code)):
        place.copy_(new.flatten()[: place.numel()].view(place.shape))
    broken = ((x - x) + (v - v)).flatten()[: weight.numel()]  # 0 where both are finite, else NaN
    return g.square().sum() + broken.sum()


def read_averages(state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """m and v, [blocks, ADAMW_BLOCK], in fp32."""
    code = _blocks(state["m"]).long()
    size = _read(code & 127, 4) * state["m_scale"][:, None]
    v = _read(_blocks(state["v"]).long(), 5) * state["v_scale"][:, None]
    return torch.where(code > 127, -size, size).masked_fill(code & 127 == 0, 0.0), v


def _blocks(x: Tensor) -> Tensor:
    """x [numel] as [blocks, ADAMW_BLOCK], with zeros at the end."""
    return F.pad(x.flatten(), (0, -x.numel() % ADAMW_BLOCK)).view(-1, ADAMW_BLOCK)


def _mixed(x: Tensor) -> Tensor:
    x = (x ^ (x >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
    return x ^ (x >> 16)


def _float(bits: Tensor) -> Tensor:
    signed = torch.where(bits >= 2**31, bits - 2**32, bits)
    return signed.to(torch.int32).view(torch.float32)


def _stored(x: Tensor, scale: Tensor, random: Tensor, exponent: int) -> Tensor:
    lowest = (128 - (1 << exponent)) << 3
    share = x * (1 / scale.masked_fill(scale == 0, 1.0))[:, None]
    code = ((share.view(torch.int32).long() + random) >> 20) - lowest
    return code.clamp(0, (1 << (exponent + 3)) - 1)


def _read(code: Tensor, exponent: int) -> Tensor:
    lowest = (128 - (1 << exponent)) << 3
    return _float((code + lowest) << 20)
