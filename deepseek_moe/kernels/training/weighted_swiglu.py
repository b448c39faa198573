"""What the experts compute between their products in training, each in one pass over memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dropout import kept
from .torch_ops import Seed


@triton.jit(do_not_specialize=["salt"])
def _weighted_swiglu(
    gate_up_ptr,  # [N, 2F]; with LOW the sum is written here
    low_ptr,  # [N, 2F], read with LOW
    weights_ptr,  # [N]
    act_ptr,  # [N, F]
    dropped_ptr,  # [N, F], written with DROPOUT
    seed_ptr,  # one number, read with DROPOUT
    salt,
    F: tl.constexpr,
    COLUMNS: tl.constexpr,
    LOW: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights_ptr + row).to(tl.float32)
    for first in tl.static_range(0, F, COLUMNS):
        f_F = first + tl.arange(0, COLUMNS)
        ok_F = f_F < F
        at_F = row * (2 * F) + f_F
        gate_F = tl.load(gate_up_ptr + at_F, mask=ok_F, other=0.0)
        up_F = tl.load(gate_up_ptr + at_F + F, mask=ok_F, other=0.0)
        if LOW:
            gate_F = (gate_F + tl.load(low_ptr + at_F, mask=ok_F, other=0.0)).to(gate_F.dtype)
            up_F = (up_F + tl.load(low_ptr + at_F + F, mask=ok_F, other=0.0)).to(up_F.dtype)
            tl.store(gate_up_ptr + at_F, gate_F, mask=ok_F)
            tl.store(gate_up_ptr + at_F + F, up_F, mask=ok_F)
        gate_F = gate_F.to(tl.float32)
        act_F = gate_F * tl.sigmoid(gate_F) * up_F.to(tl.float32) * weight
        out_F = row * F + f_F
        tl.store(act_ptr + out_F, act_F, mask=ok_F)
        if DROPOUT > 0:
            tl.store(dropped_ptr + out_F, act_F * kept(seed_ptr, salt, out_F, DROPOUT), mask=ok_F)


@triton.jit(do_not_specialize=["salt"])
def _weighted_swiglu_backward(
    grad_ptr,  # [N, F]; with ACT the weighted activations are written here
    low_grad_ptr,  # [N, F], the gradient of the adapter's input, read with LOW
    gate_up_ptr,  # [N, 2F]
    weights_ptr,  # [N]
    grad_gate_up_ptr,  # [N, 2F]
    grad_weights_ptr,  # [N]
    seed_ptr,  # one number, read with DROPOUT
    salt,
    F: tl.constexpr,
    COLUMNS: tl.constexpr,
    LOW: tl.constexpr,
    ACT: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights_ptr + row).to(tl.float32)
    grad_weight_F = tl.zeros([COLUMNS], tl.float32)
    for first in tl.static_range(0, F, COLUMNS):
        f_F = first + tl.arange(0, COLUMNS)
        ok_F = f_F < F
        at_F, out_F = row * (2 * F) + f_F, row * F + f_F
        gate_F = tl.load(gate_up_ptr + at_F, mask=ok_F, other=0.0).to(tl.float32)
        up_F = tl.load(gate_up_ptr + at_F + F, mask=ok_F, other=0.0).to(tl.float32)
        grad_F = tl.load(grad_ptr + out_F, mask=ok_F, other=0.0).to(tl.float32)
        if LOW:
            low_F = tl.load(low_grad_ptr + out_F, mask=ok_F, other=0.0).to(tl.float32)
            grad_F += low_F * kept(seed_ptr, salt, out_F, DROPOUT) if DROPOUT > 0 else low_F
        sigmoid_F = tl.sigmoid(gate_F)
        silu_F = gate_F * sigmoid_F
        act_F = silu_F * up_F
        grad_weight_F += grad_F * act_F
        if ACT:
            act_F *= weight
            act_F = act_F * kept(seed_ptr, salt, out_F, DROPOUT) if DROPOUT > 0 else act_F
            tl.store(grad_ptr + out_F, act_F, mask=ok_F)
        grad_F *= weight
        grad_gate_F = grad_F * up_F * (sigmoid_F + silu_F * (1 - sigmoid_F))
        tl.store(grad_gate_up_ptr + at_F, grad_gate_F, mask=ok_F)
        tl.store(grad_gate_up_ptr + at_F + F, grad_F * silu_F, mask=ok_F)
    tl.store(grad_weights_ptr + row, tl.sum(grad_weight_F, 0))


@triton.jit
def _sum_picks(
    x_ptr,  # [N, D]
    low_ptr,  # [N, D], added with LOW
    place_ptr,  # [T, K], -1: nowhere
    out_ptr,  # [T, D]
    K: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    LOW: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    d_D = tl.arange(0, DP)
    ok_D = d_D < D
    sum_D = tl.zeros([DP], tl.float32)
    for k in tl.static_range(K):
        place = tl.load(place_ptr + t * K + k).to(tl.int64)
        at_D = place * D + d_D
        there_D = d_D < tl.where(place < 0, 0, D)
        sum_D += tl.load(x_ptr + at_D, mask=there_D, other=0.0).to(tl.float32)
        if LOW:
            sum_D += tl.load(low_ptr + at_D, mask=there_D, other=0.0).to(tl.float32)
    tl.store(out_ptr + t * D + d_D, sum_D, mask=ok_D)


COLUMNS = 512  # of the expert width, which a program computes at once


def weighted_swiglu(
    gate_up_NF: Tensor, low_NF: Tensor | None, weights_N: Tensor, dropout: float, seed: Seed | None
) -> tuple[Tensor, Tensor]:
    """As `torch_ops.weighted_swiglu`."""
    N, width = gate_up_NF.shape[0], gate_up_NF.shape[1] // 2
    act_NF = gate_up_NF.new_empty(N, width)
    dropped_NF = torch.empty_like(act_NF) if dropout else act_NF
    step, salt = seed if dropout else (weights_N, 0)  # which is not read
    _weighted_swiglu[(N,)](
        gate_up_NF, gate_up_NF if low_NF is None else low_NF, weights_N, act_NF, dropped_NF,
        step, salt,
        F=width, COLUMNS=COLUMNS, LOW=low_NF is not None, DROPOUT=dropout, num_warps=4,
    )  # fmt: skip
    return act_NF, dropped_NF


def weighted_swiglu_backward(
    grad_NF: Tensor,
    low_grad_NF: Tensor | None,
    gate_up_NF: Tensor,
    weights_N: Tensor,
    need_act: bool,
    dropout: float,
    seed: Seed | None,
) -> tuple[Tensor, Tensor]:
    """As `torch_ops.weighted_swiglu_backward`."""
    N, width = grad_NF.shape
    grad_gate_up_NF, grad_weights_N = torch.empty_like(gate_up_NF), torch.empty_like(weights_N)
    step, salt = seed if dropout else (weights_N, 0)  # which is not read
    _weighted_swiglu_backward[(N,)](
        grad_NF, grad_NF if low_grad_NF is None else low_grad_NF, gate_up_NF, weights_N,
        grad_gate_up_NF, grad_weights_N, step, salt,
        F=width, COLUMNS=COLUMNS, LOW=low_grad_NF is not None, ACT=need_act, DROPOUT=dropout,
        num_warps=4,
    )  # fmt: skip
    return grad_gate_up_NF, grad_weights_N


def sum_picks(x_ND: Tensor, low_ND: Tensor | None, place_TK: Tensor) -> Tensor:
    """As `torch_ops.sum_picks`."""
    (T, K), D = place_TK.shape, x_ND.shape[1]
    out_TD = x_ND.new_empty(T, D)
    _sum_picks[(T,)](
        x_ND, x_ND if low_ND is None else low_ND, place_TK, out_TD,
        K=K, D=D, DP=triton.next_power_of_2(D), LOW=low_ND is not None, num_warps=4,
    )  # fmt: skip
    return out_TD
