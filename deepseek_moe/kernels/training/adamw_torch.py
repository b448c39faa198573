"""What the kernel of adamw.py computes, in torch, with the same random numbers."""

import torch
from torch.nn import functional as F

__all__ = ["adamw"]

ADAMW_BLOCK = 256
"""Weights that share a scale of each of AdamW's averages."""


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
    """The `step`-th step, from 1, of AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101).

    It works in place. `weight` is bf16. Its averages `m` and `v` are one byte a weight, with a
    scale for each ADAMW_BLOCK of them. All are rounded stochastically by `seed`, 31 random bits.
    Returns the sum of the squared gradients in fp32.
    """
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
