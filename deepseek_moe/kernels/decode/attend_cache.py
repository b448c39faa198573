"""Attention of one new token a sequence over the cache. It is split over the length, so that a few
sequences fill the GPU too.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import arrive_last, launch_options, wait
from ..plan import launch
from . import Place

# For few sequences, and for many, which fill the GPU by themselves: positions that are read at
# once, positions that one program takes alone, warps, stages. Measured on an H200.
SHAPES = (64, 64, 4, 1), (32, 256, 2, 4)
SPLITS = 16  # at most so many programs share a sequence


@triton.jit
def _attend(
    q_ptr,  # [T, H * D], rows q_stride apart
    k_ptr,  # [slots, KV, capacity, D]
    v_ptr,
    position_ptr,  # [T], -1: no token
    slot_ptr,  # [T]
    out_ptr,  # [T, H * D]
    part_ptr,  # [T, H, SPLITS, D], fp32: numerators
    stat_ptr,  # [T, H, SPLITS, 2], fp32: largest score, denominator
    counter_ptr,  # [T * H], zeros
    scale,
    q_stride,
    capacity,
    H: tl.constexpr,
    KV: tl.constexpr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,  # positions that are not worth splitting
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    t, h, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    d_D = tl.arange(0, D)
    position = tl.load(position_ptr + t)
    slot = tl.load(slot_ptr + t).to(tl.int64)
    chunk = tl.maximum(tl.cdiv(tl.cdiv(position, SPLITS), BLOCK) * BLOCK, CHUNK)
    active = tl.maximum(tl.cdiv(position, chunk), 1)
    out_D = out_ptr + t * (H * D) + h * D + d_D
    if position < 0 or split >= active:
        wait(PDL)
        if split == 0:
            tl.store(out_D, tl.zeros([D], tl.float32))
    else:
        # What earlier steps wrote to the cache can be read before the last kernel is done. The
        # token that this adds comes separately, in the first program.
        base = (slot * KV + h // (H // KV)) * capacity * D
        end = tl.minimum(position, (split + 1) * chunk)
        n_N = split * chunk + tl.arange(0, BLOCK)
        place_ND = base + n_N[:, None] * D + d_D[None, :]
        k_ND = tl.load(k_ptr + place_ND, mask=(n_N < end)[:, None], other=0.0)
        v_ND = tl.load(v_ptr + place_ND, mask=(n_N < end)[:, None], other=0.0)
        wait(PDL)
        q_D = tl.load(q_ptr + t * q_stride + h * D + d_D).to(tl.float32) * scale
        new_D = base + position * D + d_D
        new_score = tl.sum(tl.load(k_ptr + new_D).to(tl.float32) * q_D, 0)
        top = tl.where(split == 0, new_score, float("-inf"))
        total = tl.where(split == 0, 1.0, 0.0)
        acc_D = tl.load(v_ptr + new_D).to(tl.float32) * total
        top, total, acc_D = _more(top, total, acc_D, q_D, k_ND, v_ND, n_N < end)
        for at in tl.range(split * chunk + BLOCK, end, BLOCK, num_stages=STAGES):
            m_N = at + tl.arange(0, BLOCK)
            at_ND = base + m_N[:, None] * D + d_D[None, :]
            more_k_ND = tl.load(k_ptr + at_ND, mask=(m_N < end)[:, None], other=0.0)
            more_v_ND = tl.load(v_ptr + at_ND, mask=(m_N < end)[:, None], other=0.0)
            top, total, acc_D = _more(top, total, acc_D, q_D, more_k_ND, more_v_ND, m_N < end)
        if active == 1:
            tl.store(out_D, acc_D / total)
        else:
            first = (t * H + h) * SPLITS
            tl.store(part_ptr + (first + split) * D + d_D, acc_D)
            tl.store(stat_ptr + (first + split) * 2, top)
            tl.store(stat_ptr + (first + split) * 2 + 1, total)
            if arrive_last(counter_ptr + t * H + h, active):
                _merge(part_ptr + first * D, stat_ptr + first * 2, out_D, active, D, SPLITS)


@triton.jit
def _merge(part_ptr, stat_ptr, out_D, active, D: tl.constexpr, SPLITS: tl.constexpr):
    """Merges what the first `active` programs of a head found."""
    s_S = tl.arange(0, SPLITS)
    ok_S = s_S < active
    stat_S = stat_ptr + s_S * 2
    top_S = tl.load(stat_S, mask=ok_S, other=float("-inf"), cache_modifier=".cg")
    total_S = tl.load(stat_S + 1, mask=ok_S, other=0.0, cache_modifier=".cg")
    share_S = tl.exp(top_S - tl.max(top_S, 0))
    part_SD = part_ptr + s_S[:, None] * D + tl.arange(0, D)[None, :]
    part_SD = tl.load(part_SD, mask=ok_S[:, None], other=0.0, cache_modifier=".cg")
    sum_D = tl.sum(part_SD * share_S[:, None], 0)
    tl.store(out_D, sum_D / tl.sum(total_S * share_S, 0))


@triton.jit
def _more(top, total, acc_D, q_D, k_ND, v_ND, ok_N):
    """The running softmax (Milakov and Gimelshein 2018, arXiv 1805.02867) after more positions."""
    score_N = tl.where(ok_N, tl.sum(k_ND.to(tl.float32) * q_D[None, :], 1), float("-inf"))
    new_top = tl.maximum(top, tl.max(score_N, 0))
    weight_N = tl.exp(score_N - new_top)
    shrink = tl.exp(top - new_top)
    acc_D = acc_D * shrink + tl.sum(v_ND.to(tl.float32) * weight_N[:, None], 0)
    return new_top, total * shrink + tl.sum(weight_N, 0), acc_D


def attend(q_TD: Tensor, place: Place, counters: Tensor) -> Tensor:
    """As `torch_ops.attend`. `counters` holds min(512, T * heads) int32 zeros, before and after."""
    T = q_TD.shape[0]
    _, kv_heads, capacity, width = place.keys.shape
    heads = q_TD.shape[1] // width
    block, chunk, warps, stages = SHAPES[T > 8]
    splits = SPLITS
    # Not by the capacity: a sum in other parts has other last bits, and the cache may grow.
    while splits > 1 and splits * T * heads > 512:
        splits //= 2
    out_TD = q_TD.new_empty(q_TD.shape)
    part = q_TD.new_empty(T, heads, splits, width, dtype=torch.float32)
    stat = q_TD.new_empty(T, heads, splits, 2, dtype=torch.float32)
    launch(_attend, (T, heads, splits),
        q_TD, *place, out_TD, part, stat, counters, width**-0.5,
        q_TD.stride(0), capacity, H=heads, KV=kv_heads, D=width, SPLITS=splits, BLOCK=block,
        CHUNK=chunk, STAGES=stages, **launch_options(warps),
    )  # fmt: skip
    return out_TD
