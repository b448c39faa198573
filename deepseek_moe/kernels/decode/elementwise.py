"""What comes between the products of a step of many tokens, in one pass over memory each."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch_options, wait
from ..launch import swiglu as _swiglu
from ..plan import launch
from . import CosSin, Place


@triton.jit
def _normed(x_D, norm_ptr, d_D, ok_D, D: tl.constexpr, eps):
    norm_D = tl.load(norm_ptr + d_D, mask=ok_D, other=0.0).to(tl.float32)
    return x_D * tl.rsqrt(tl.sum(x_D * x_D, 0) / D + eps) * norm_D


@triton.jit
def _add_norm(
    x_ptr,
    residual_ptr,
    norm_ptr,
    sum_ptr,
    out_ptr,
    eps,
    D: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PDL: tl.constexpr,
):
    wait(PDL)
    d_D = tl.arange(0, triton.next_power_of_2(D))
    ok_D = d_D < D
    row = tl.program_id(0).to(tl.int64) * D
    x_D = tl.load(x_ptr + row + d_D, mask=ok_D, other=0.0).to(tl.float32)
    if RESIDUAL:
        x_D += tl.load(residual_ptr + row + d_D, mask=ok_D, other=0.0).to(tl.float32)
        x_D = x_D.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row + d_D, x_D, mask=ok_D)
        x_D = x_D.to(tl.float32)
    tl.store(out_ptr + row + d_D, _normed(x_D, norm_ptr, d_D, ok_D, D, eps), mask=ok_D)


def add_norm(
    x_TD: Tensor, residual_TD: Tensor | None, norm_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """As `torch_ops.add_norm`."""
    T, D = x_TD.shape
    sum_TD = x_TD if residual_TD is None else torch.empty_like(x_TD)
    out_TD = torch.empty_like(x_TD)
    launch(_add_norm, (T,),
        x_TD, x_TD if residual_TD is None else residual_TD, norm_D, sum_TD, out_TD, eps,
        D=D, RESIDUAL=residual_TD is not None, **launch_options(4),
    )  # fmt: skip
    return sum_TD, out_TD


@triton.jit
def _rotate(
    qkv_ptr,  # [T, (H + 2 * KV) * D], whose queries are rotated in place
    cos_ptr,
    sin_ptr,
    position_ptr,
    slot_ptr,
    k_ptr,
    v_ptr,
    capacity,
    H: tl.constexpr,
    KV: tl.constexpr,
    D: tl.constexpr,
):
    t = tl.program_id(0)
    h_H = tl.arange(0, triton.next_power_of_2(H + 2 * KV))[:, None]
    d_D = tl.arange(0, D // 2)[None, :]
    position = tl.load(position_ptr + t)
    slot = tl.load(slot_ptr + t).to(tl.int64)
    a_HD = qkv_ptr + t.to(tl.int64) * ((H + 2 * KV) * D) + h_H * D + d_D
    ok_H = h_H < tl.where(position >= 0, H + 2 * KV, 0)
    first_HD = tl.load(a_HD, mask=ok_H, other=0.0).to(tl.float32)
    second_HD = tl.load(a_HD + D // 2, mask=ok_H, other=0.0).to(tl.float32)
    at_D = tl.maximum(position, 0) * (D // 2) + d_D
    turned_H = h_H < H + KV
    cos_HD = tl.where(turned_H, tl.load(cos_ptr + at_D), 1.0)
    sin_HD = tl.where(turned_H, tl.load(sin_ptr + at_D), 0.0)
    new_first_HD = first_HD * cos_HD - second_HD * sin_HD
    new_second_HD = second_HD * cos_HD + first_HD * sin_HD
    query_H = ok_H & (h_H < H)
    tl.store(a_HD, new_first_HD, mask=query_H)
    tl.store(a_HD + D // 2, new_second_HD, mask=query_H)
    place_HD = ((slot * KV + (h_H - H) % KV) * capacity + position) * D + d_D
    key_H = ok_H & (h_H >= H) & (h_H < H + KV)
    tl.store(k_ptr + place_HD, new_first_HD, mask=key_H)
    tl.store(k_ptr + place_HD + D // 2, new_second_HD, mask=key_H)
    value_H = ok_H & (h_H >= H + KV)
    tl.store(v_ptr + place_HD, new_first_HD, mask=value_H)
    tl.store(v_ptr + place_HD + D // 2, new_second_HD, mask=value_H)


def rotate(qkv_TO: Tensor, cos_sin: CosSin, place: Place) -> Tensor:
    """As `torch_ops.rotate`, in place: what it returns is a view of `qkv_TO`."""
    _, kv_heads, capacity, width = place.keys.shape
    heads = qkv_TO.shape[1] // width - 2 * kv_heads
    launch(_rotate, (qkv_TO.shape[0],),
        qkv_TO, *cos_sin, place.position_T, place.slot_T, place.keys, place.values, capacity,
        H=heads, KV=kv_heads, D=width, num_warps=8,
    )  # fmt: skip
    return qkv_TO[:, : heads * width]


@triton.jit
def _act(x_ptr, out_ptr, F: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    f_F = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok_F = f_F < F
    gate_F = tl.load(x_ptr + row * (2 * F) + f_F, mask=ok_F, other=0.0).to(tl.float32)
    up_F = tl.load(x_ptr + row * (2 * F) + F + f_F, mask=ok_F, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * F + f_F, _swiglu(gate_F, up_F), mask=ok_F)


def swiglu(gate_up_NF: Tensor) -> Tensor:
    """As `torch_ops.swiglu`."""
    N, width = gate_up_NF.shape[0], gate_up_NF.shape[1] // 2
    out_NF = gate_up_NF.new_empty(N, width)
    block = min(2048, triton.next_power_of_2(width))
    launch(
        _act, (N, triton.cdiv(width, block)), gate_up_NF, out_NF, F=width, BLOCK=block, num_warps=4
    )
    return out_NF


@triton.jit
def _combine(
    out_ptr,  # [N, D]
    place_ptr,  # [T, K]
    weights_ptr,  # [T, K]
    shared_ptr,  # [T, D]
    residual_ptr,  # [T, D]
    norm_ptr,  # [D]
    sum_ptr,  # [T, D]
    normed_ptr,  # [T, D]
    eps,
    K: tl.constexpr,
    D: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    d_D = tl.arange(0, triton.next_power_of_2(D))
    ok_D = d_D < D
    sum_D = tl.load(residual_ptr + t * D + d_D, mask=ok_D, other=0.0).to(tl.float32)
    sum_D += tl.load(shared_ptr + t * D + d_D, mask=ok_D, other=0.0).to(tl.float32)
    for k in tl.static_range(K):
        place = tl.load(place_ptr + t * K + k).to(tl.int64)
        weight = tl.load(weights_ptr + t * K + k)
        sum_D += weight * tl.load(out_ptr + place * D + d_D, mask=ok_D, other=0.0).to(tl.float32)
    sum_D = sum_D.to(sum_ptr.dtype.element_ty)
    tl.store(sum_ptr + t * D + d_D, sum_D, mask=ok_D)
    normed_D = _normed(sum_D.to(tl.float32), norm_ptr, d_D, ok_D, D, eps)
    tl.store(normed_ptr + t * D + d_D, normed_D, mask=ok_D)


def combine(
    out_ND: Tensor,
    place_TK: Tensor,
    weights_TK: Tensor,
    shared_TD: Tensor,
    residual_TD: Tensor,
    norm_D: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """As `torch_ops.combine`."""
    (T, K), D = place_TK.shape, out_ND.shape[1]
    sum_TD, normed_TD = torch.empty_like(residual_TD), torch.empty_like(residual_TD)
    launch(_combine, (T,),
        out_ND, place_TK, weights_TK, shared_TD, residual_TD, norm_D, sum_TD, normed_TD, eps,
        K=K, D=D, num_warps=4,
    )  # fmt: skip
    return sum_TD, normed_TD


@triton.jit
def _advance(new_ptr, ids_ptr, position_ptr, seen_ptr, last, V):
    row = tl.program_id(0)
    new = tl.load(new_ptr + row)
    tl.store(ids_ptr + row, new)
    tl.store(seen_ptr + row.to(tl.int64) * V + new, 1)
    position = tl.load(position_ptr + row)
    tl.store(position_ptr + row, tl.where(position < 0, -1, tl.minimum(position + 1, last)))


def advance(new_B: Tensor, ids_B: Tensor, position_B: Tensor, seen_BV: Tensor, last: int) -> None:
    """As `torch_ops.advance`."""
    seen = seen_BV.view(torch.uint8)
    launch(
        _advance, (len(new_B),), new_B, ids_B, position_B, seen, last, seen.shape[1], num_warps=1
    )
