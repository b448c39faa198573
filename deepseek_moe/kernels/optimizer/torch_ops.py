"""What the kernel of the optimizer computes, in torch, with the random numbers of the kernel."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

ADAMW_BLOCK = 256
"""Weights that share a scale of each of AdamW's averages."""


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
