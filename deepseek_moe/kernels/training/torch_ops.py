"""What each kernel of fine-tuning computes, in torch."""

import torch
from torch.nn import functional as F

from ..torch_ops import sort_picks, swiglu

__all__ = [
    "adamw", "sort_picks", "sum_picks", "unpack_4bit", "weighted_swiglu",
    "weighted_swiglu_backward",
]  # fmt: skip

ADAMW_BLOCK = 256
"""Weights that share a scale of each of AdamW's averages."""


# Between the products of the experts in training.


def weighted_swiglu(
    gate_up_NF: torch.Tensor,
    low_NF: torch.Tensor | None,
    weights_N: torch.Tensor,
    dropout: float,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What down takes of [N, 2F]: weight * silu(gate) * up, [N, F], and the same with the share
    `dropout` of it dropped, which `seed` chooses. `low_NF` is added to `gate_up_NF` in place."""
    if low_NF is not None:
        gate_up_NF.add_(low_NF)
    act_NF = swiglu(gate_up_NF.float()) * weights_N[:, None]
    kept_NF = _kept(act_NF, dropout, seed)
    return act_NF.to(gate_up_NF.dtype), (act_NF * kept_NF).to(gate_up_NF.dtype)


def weighted_swiglu_backward(
    grad_NF: torch.Tensor,
    low_grad_NF: torch.Tensor | None,
    gate_up_NF: torch.Tensor,
    weights_N: torch.Tensor,
    need_act: bool,
    dropout: float,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of gate and up [N, 2F] and of the weights [N].

    `grad_NF` and `low_grad_NF` are the gradients of the two results of `weighted_swiglu`. If
    `need_act`, its second result is written over `grad_NF`.
    """
    given_NF = grad_NF
    gate_NF, up_NF = gate_up_NF.float().chunk(2, dim=-1)
    open_NF, silu_NF = torch.sigmoid(gate_NF), F.silu(gate_NF)
    kept_NF = _kept(gate_NF, dropout, seed)
    grad_NF, dtype = grad_NF.float(), grad_NF.dtype
    if low_grad_NF is not None:
        grad_NF = grad_NF + low_grad_NF.float() * kept_NF
    act_NF = silu_NF * up_NF
    grad_weights_N = (grad_NF * act_NF).sum(-1)
    act_NF = act_NF * weights_N[:, None] * kept_NF
    grad_NF = grad_NF * weights_N[:, None]
    grad_gate_NF = grad_NF * up_NF * (open_NF + silu_NF * (1 - open_NF))
    grad_gate_up_NF = torch.cat([grad_gate_NF, grad_NF * silu_NF], dim=-1)
    if need_act:
        given_NF.copy_(act_NF)
    return grad_gate_up_NF.to(dtype), grad_weights_N.to(weights_N.dtype)


def _kept(x_NF: torch.Tensor, dropout: float, seed: int) -> torch.Tensor:
    random = torch.Generator(x_NF.device).manual_seed(seed)
    kept_NF = torch.rand(x_NF.shape, generator=random, device=x_NF.device) >= dropout
    return kept_NF / (1 - dropout)


def sum_picks(
    x_ND: torch.Tensor, low_ND: torch.Tensor | None, place_TK: torch.Tensor
) -> torch.Tensor:
    """The sum of x (and of low) over the places of each token's picks, [T, D]; -1 is no place."""
    picked_TKD = x_ND[place_TK.long()].float()
    if low_ND is not None:
        picked_TKD = picked_TKD + low_ND[place_TK.long()].float()
    picked_TKD = picked_TKD.masked_fill((place_TK < 0)[..., None], 0.0)
    return picked_TKD.sum(1).to(x_ND.dtype)


# The step of the optimizer.


def adamw(
    weight: torch.Tensor,
    grad: torch.Tensor,
    m: torch.Tensor,
    v: torch.Tensor,
    m_scale: torch.Tensor,
    v_scale: torch.Tensor,
    rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    step: int,
    seed: int,
) -> torch.Tensor:
    """A step of AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101), the `step`-th from 1, in
    place: `weight` in bf16, its averages `m` and `v` as one byte a weight with a scale for each
    BLOCK. What is stored is rounded stochastically by `seed`, 31 random bits. Returns the sum of
    the squared gradients, fp32."""
    shape, numel = weight.shape, weight.numel()
    m_now, v_now = read_averages(m, v, m_scale, v_scale)
    x, g = weight.flatten().float(), grad.flatten().float()
    m_now = betas[0] * m_now + (1 - betas[0]) * g
    v_now = betas[1] * v_now + (1 - betas[1]) * g * g
    times = [1 / (1 - beta**step) for beta in betas]
    change = (m_now * times[0]) / ((v_now * times[1]).sqrt() + eps)
    x = x * (1 - rate * weight_decay) - rate * change

    random = _mixed(torch.arange(numel, device=x.device) ^ seed)
    bits = (x.view(torch.int32).long() + (random & 0xFFFF)) & 0xFFFF0000
    rounded = torch.where(x.isnan(), x, _float(bits))
    weight.copy_(rounded.to(weight.dtype).view(shape))
    m_scale.copy_(_largest(m_now.abs()))
    v_scale.copy_(_largest(v_now))
    m_part, v_part = _over(m_now.abs(), m_scale), _over(v_now, v_scale)
    more = (random * 0x9E3779B1 & 0xFFFFFFFF) >> 12
    m_code = _stored(m_part, more, 4) + 128 * (m_now < 0)
    m.copy_(m_code.to(torch.uint8).view(m.shape))
    v.copy_(_stored(v_part, random >> 12, 5).to(torch.uint8).view(v.shape))
    return g.square().sum()


def read_averages(
    m: torch.Tensor, v: torch.Tensor, m_scale: torch.Tensor, v_scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """m and v, [numel], in fp32."""
    code = m.flatten().long()
    size = _read(code & 127, 4) * _each(m_scale, len(code))
    v_now = _read(v.flatten().long(), 5) * _each(v_scale, len(code))
    m_now = torch.where(code > 127, -size, size).masked_fill(code & 127 == 0, 0.0)
    return m_now, v_now


def _mixed(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ (x >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
    return x ^ (x >> 16)


def _float(bits: torch.Tensor) -> torch.Tensor:
    signed = torch.where(bits >= 2**31, bits - 2**32, bits)
    return signed.to(torch.int32).view(torch.float32)


def _stored(x: torch.Tensor, random: torch.Tensor, exponent: int) -> torch.Tensor:
    lowest = (128 - (1 << exponent)) << 3
    code = ((x.view(torch.int32).long() + random) >> 20) - lowest
    return code.clamp(0, (1 << (exponent + 3)) - 1)


def _read(code: torch.Tensor, exponent: int) -> torch.Tensor:
    lowest = (128 - (1 << exponent)) << 3
    return _float((code + lowest) << 20)


def _largest(x: torch.Tensor) -> torch.Tensor:
    return F.pad(x, (0, -len(x) % ADAMW_BLOCK)).view(-1, ADAMW_BLOCK).amax(1)


def _each(scale: torch.Tensor, numel: int) -> torch.Tensor:
    return scale.repeat_interleave(ADAMW_BLOCK)[:numel]


def _over(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x * _each(1 / scale.masked_fill(scale == 0, 1.0), len(x))


# The frozen base of QLoRA.


def unpack_4bit(
    packed: torch.Tensor,
    code: torch.Tensor,
    absmax: torch.Tensor,
    code2: torch.Tensor | None,
    absmax2: torch.Tensor | None,
    offset: torch.Tensor | None,
    shape: torch.Size,
    dtype: torch.dtype,
    blocksize: int = 64,
    blocksize2: int = 256,
) -> torch.Tensor:
    """A weight as bitsandbytes packs it in 4 bits (Dettmers et al. 2023, arXiv 2305.14314), in
    `dtype`: of each `packed` byte the high half, then the low, is an index into `code` [16], and
    `blocksize` weights share a scale. Those are `absmax`, fp32, or with double quantisation one
    byte each, code2[absmax] * absmax2 + offset, where `blocksize2` of them share an `absmax2`.
    Computed in fp32 and rounded once."""
    index = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).flatten()
    scale = absmax
    if code2 is not None:
        scale = code2[absmax.int()] * absmax2.repeat_interleave(blocksize2)[: len(absmax)] + offset
    scale = scale.repeat_interleave(blocksize)[: shape.numel()]
    return (code[index[: shape.numel()].int()] * scale).to(dtype).view(shape)
