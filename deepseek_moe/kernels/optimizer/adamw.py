"""A step of AdamW with averages of 8 bits, in one pass: 10 bytes of memory traffic a weight.

The averages of a block of 256 weights are stored as shares of the block's largest. m has a sign and
4 + 3 bits of exponent and mantissa. v has no sign but a wide range: 5 + 3 bits. Both are rounded
stochastically, like the weights: v changes by a thousandth in a step, which rounding to the nearest
would lose. v is never read as less than 2^-31 of its block's largest, because m is kept down to
2^-15 of its largest, and m over a v of 0 would be a step without bounds.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .torch_ops import ADAMW_BLOCK

ROWS = 4  # blocks a program


@triton.jit
def _mixed(x):
    """Bits in which each depends on all of x (the finaliser of MurmurHash3)."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _stored(x_RB, random_RB, EXPONENT: tl.constexpr):
    """x from 0 to 1 as EXPONENT + 3 bits; `random_RB` are 20 bits."""
    lowest: tl.constexpr = (128 - (1 << EXPONENT)) << 3
    code_RB = ((x_RB.to(tl.int32, bitcast=True) + random_RB) >> 20) - lowest
    return tl.minimum(tl.maximum(code_RB, 0), (1 << (EXPONENT + 3)) - 1)


@triton.jit
def _read(code_RB, EXPONENT: tl.constexpr):
    lowest: tl.constexpr = (128 - (1 << EXPONENT)) << 3
    return ((code_RB + lowest) << 20).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["seed", "numel"])
def _adamw(
    weight_ptr,  # [numel], bf16
    grad_ptr,
    m_ptr,  # [numel], uint8
    v_ptr,
    m_scale_ptr,  # [numel / 256], fp32
    v_scale_ptr,
    squares_ptr,  # [programs], fp32: the sum of the squared gradients of each; NaN if it broke one
    numel,
    rate,  # of learning
    decay,  # 1 - rate * weight decay
    beta1,
    beta2,
    eps,
    times1,  # 1 / (1 - beta1^step)
    times2,
    seed,
    WHOLE: tl.constexpr,  # numel is a multiple of BLOCK
    BLOCK: tl.constexpr,  # weights that share a scale
    ROWS: tl.constexpr,
):
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at_RB = row_R[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    ok_R = row_R * BLOCK < numel
    # Masks that hold for whole rows leave the loads side by side.
    ok_RB = (ok_R[:, None] & (tl.arange(0, BLOCK) >= 0)[None, :]) if WHOLE else at_RB < numel
    grad_RB = tl.load(grad_ptr + at_RB, mask=ok_RB, other=0.0).to(tl.float32)
    weight_RB = tl.load(weight_ptr + at_RB, mask=ok_RB, other=0.0).to(tl.float32)
    m_code_RB = tl.load(m_ptr + at_RB, mask=ok_RB, other=0).to(tl.int32)
    v_code_RB = tl.load(v_ptr + at_RB, mask=ok_RB, other=0).to(tl.int32)
    m_scale_R = tl.load(m_scale_ptr + row_R, mask=ok_R, other=0.0)
    v_scale_R = tl.load(v_scale_ptr + row_R, mask=ok_R, other=0.0)

    m_RB = _read(m_code_RB & 127, 4) * m_scale_R[:, None]
    m_RB = tl.where((m_code_RB & 127) == 0, 0.0, tl.where(m_code_RB > 127, -m_RB, m_RB))
    v_RB = _read(v_code_RB, 5) * v_scale_R[:, None]
    m_RB = beta1 * m_RB + (1 - beta1) * grad_RB
    v_RB = beta2 * v_RB + (1 - beta2) * grad_RB * grad_RB
    change_RB = (m_RB * times1) / (tl.sqrt(v_RB * times2) + eps)
    weight_RB = weight_RB * decay - rate * change_RB

    # One number decides all three roundings: by its low bits, its high bits, and a product of it.
    random_RB = _mixed(at_RB.to(tl.uint32) ^ seed.to(tl.uint32))
    bits_RB = weight_RB.to(tl.int32, bitcast=True) + (random_RB & 0xFFFF).to(tl.int32)
    rounded_RB = ((bits_RB >> 16) << 16).to(tl.float32, bitcast=True)
    rounded_RB = tl.where(weight_RB == weight_RB, rounded_RB, weight_RB)  # a NaN would overflow
    tl.store(weight_ptr + at_RB, rounded_RB, mask=ok_RB)
    broken_RB = (weight_RB - weight_RB) + (v_RB - v_RB)  # 0 if both are finite, else NaN
    squares_RB = grad_RB * grad_RB + tl.where(ok_RB, broken_RB, 0.0)
    tl.store(squares_ptr + tl.program_id(0), tl.sum(tl.sum(squares_RB, 1), 0))

    m_scale_R, v_scale_R = tl.max(tl.abs(m_RB), 1), tl.max(v_RB, 1)
    more_RB = (random_RB * 0x9E3779B1) >> 12
    m_part_RB = tl.abs(m_RB) * (1.0 / tl.where(m_scale_R > 0, m_scale_R, 1.0))[:, None]
    m_code_RB = _stored(m_part_RB, more_RB.to(tl.int32), 4)
    m_code_RB += tl.where(m_RB < 0, 128, 0)
    v_part_RB = v_RB * (1.0 / tl.where(v_scale_R > 0, v_scale_R, 1.0))[:, None]
    v_code_RB = _stored(v_part_RB, (random_RB >> 12).to(tl.int32), 5)
    tl.store(m_ptr + at_RB, m_code_RB.to(tl.uint8), mask=ok_RB)
    tl.store(v_ptr + at_RB, v_code_RB.to(tl.uint8), mask=ok_RB)
    tl.store(m_scale_ptr + row_R, m_scale_R, mask=ok_R)
    tl.store(v_scale_ptr + row_R, v_scale_R, mask=ok_R)


def adamw(
    weight: Tensor, grad: Tensor, state: dict[str, Tensor], options: dict[str, Any], seed: int
) -> Tensor:
    """As `torch_ops.adamw`."""
    numel, rate, betas = weight.numel(), options["lr"], options["betas"]
    programs = triton.cdiv(numel, ADAMW_BLOCK * ROWS)
    squares = torch.empty(programs, device=weight.device)
    averages = [state[name] for name in ("m", "v", "m_scale", "v_scale")]
    times = [1 / (1 - beta ** int(state["step"])) for beta in betas]
    _adamw[(programs,)](
        weight, grad, *averages, squares, numel, rate, 1 - rate * options["weight_decay"],
        *betas, options["eps"], *times, seed,
        WHOLE=numel % ADAMW_BLOCK == 0, BLOCK=ADAMW_BLOCK, ROWS=ROWS, num_warps=4,
    )  # fmt: skip
    return squares.sum()
