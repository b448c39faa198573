"""Causal attention of the new tokens of prompts over all that their slots of the cache hold (Dao
2023, arXiv 2307.08691).
"""

import triton
import triton.language as tl
from torch import Tensor

from ..plan import launch
from . import Place

M, N, WARPS, STAGES = 128, 64, 8, 3
"""Queries and keys of a tile, measured on an H200."""


@triton.jit
def _attend_prompt(
    q_ptr,  # [T, H * D], rows q_stride apart
    k_ptr,  # [slots, KV, capacity, D]
    v_ptr,
    ends_ptr,  # [B + 1]: sequence b has the queries ends[b] to ends[b + 1] - 1
    position_ptr,  # [B]: of the last query of each sequence
    slot_ptr,  # [B]
    out_ptr,  # [T, H * D]
    scale,  # times log2(e)
    q_stride,
    capacity,
    H: tl.constexpr,
    KV: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    STAGES: tl.constexpr,
):
    b, h = tl.program_id(2), tl.program_id(1)
    start, end = tl.load(ends_ptr + b), tl.load(ends_ptr + b + 1)
    # The last queries have most to do, so they begin first.
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * M
    if start + first < end:
        seen = tl.load(position_ptr + b) + 1 - (end - start)  # positions before the first query
        row_M = start + first + tl.arange(0, M)
        position_M = seen + first + tl.arange(0, M)
        d_D = tl.arange(0, D)
        q_MD = q_ptr + row_M.to(tl.int64)[:, None] * q_stride + h * D + d_D[None, :]
        q_MD = tl.load(q_MD, mask=(row_M < end)[:, None], other=0.0)
        slot = tl.load(slot_ptr + b).to(tl.int64)
        base = (slot * KV + h // (H // KV)) * capacity * D
        k_DN = k_ptr + base + tl.arange(0, N)[None, :] * D + d_D[:, None]
        v_ND = v_ptr + base + tl.arange(0, N)[:, None] * D + d_D[None, :]
        top_M = tl.full([M], float("-inf"), tl.float32)
        total_M = tl.zeros([M], tl.float32)
        acc_MD = tl.zeros([M, D], tl.float32)
        whole = (seen + first + 1) // N * N  # keys that every query sees
        for at in tl.range(0, whole, N, num_stages=STAGES):
            score_MN = tl.dot(q_MD, tl.load(k_DN + at * D), input_precision="ieee")
            v_now_ND = tl.load(v_ND + at * D)
            acc_MD, top_M, total_M = _more(score_MN, v_now_ND, scale, acc_MD, top_M, total_M)
        for at in tl.range(whole, tl.minimum(seen + first + M, seen + end - start), N):
            n_N = at + tl.arange(0, N)
            ok_N = n_N < seen + end - start
            more_k_DN = tl.load(k_DN + at * D, mask=ok_N[None, :], other=0.0)
            more_v_ND = tl.load(v_ND + at * D, mask=ok_N[:, None], other=0.0)
            score_MN = tl.dot(q_MD, more_k_DN, input_precision="ieee")
            score_MN = tl.where(n_N[None, :] <= position_M[:, None], score_MN, float("-inf"))
            acc_MD, top_M, total_M = _more(score_MN, more_v_ND, scale, acc_MD, top_M, total_M)
        out_MD = out_ptr + row_M.to(tl.int64)[:, None] * (H * D) + h * D + d_D[None, :]
        tl.store(out_MD, acc_MD / total_M[:, None], mask=(row_M < end)[:, None])


@triton.jit
def _more(score_MN, v_ND, scale, acc_MD, top_M, total_M):
    new_top_M = tl.maximum(top_M, tl.max(score_MN, 1) * scale)
    weight_MN = tl.exp2(score_MN * scale - new_top_M[:, None])
    shrink_M = tl.exp2(top_M - new_top_M)
    acc_MD = acc_MD * shrink_M[:, None]
    acc_MD = tl.dot(weight_MN.to(v_ND.dtype), v_ND, acc_MD, input_precision="ieee")
    return acc_MD, new_top_M, total_M * shrink_M + tl.sum(weight_MN, 1)


def attend_prompt(q_TD: Tensor, place: Place, ends: Tensor, longest: int) -> Tensor:
    """As `torch_ops.attend_prompt`."""
    _, kv_heads, capacity, width = place.keys.shape
    heads = q_TD.shape[1] // width
    out_TD = q_TD.new_empty(q_TD.shape)
    m = min(M, max(16, triton.next_power_of_2(longest)))
    launch(_attend_prompt, (triton.cdiv(longest, m), heads, len(ends) - 1),
        q_TD, place.keys, place.values, ends, place.position_T, place.slot_T, out_TD,
        width**-0.5 * 1.4426950408889634,
        q_TD.stride(0), capacity, H=heads, KV=kv_heads, D=width, M=m, N=N, STAGES=STAGES,
        num_warps=WARPS if m >= 128 else 4,
    )  # fmt: skip
    return out_TD
