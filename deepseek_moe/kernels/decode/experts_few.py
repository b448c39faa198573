"""The chosen experts for a few tokens. One kernel computes gate and up of each pick; the other
computes down, the weighted sum, the shared experts and the residual. An expert that several tokens
chose is read once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..int_weights import Weight
from ..launch import arrive_last, padded_tokens, product_options, scale_of, wait
from ..plan import launch
from .dot import dot_few, dot_one, product, product_one, store_swiglu, swiglu_rows
from .dot_int import dot_picks

# How the programs of a tile of down's rows share the experts. Measured.
SPLITS = 9  # programs for several tokens, the last of them for the shared experts
PICKS = 2  # picks a program for one token with int8 or int4 weights


@triton.jit
def _picked(index_ptr, e, T: tl.constexpr, TP: tl.constexpr, K: tl.constexpr):
    """Which tokens picked expert e, and as which of their picks."""
    t_T, k_K = tl.arange(0, TP), tl.arange(0, triton.next_power_of_2(K))
    ok_TK = (t_T < T)[:, None] & (k_K < K)[None, :]
    index_TK = tl.load(index_ptr + t_T[:, None] * K + k_K[None, :], mask=ok_TK, other=-1)
    hit_TK = (index_TK == e).to(tl.int32)
    return tl.sum(hit_TK, 1) > 0, tl.sum(hit_TK * k_K[None, :], 1)


@triton.jit
def _gate_up(
    x_ptr,  # [T, P * W]
    weight_ptr,  # [E, 2 * F, W]
    scale_ptr,
    index_ptr,  # [T, K]
    act_ptr,  # [T, K, F]
    T: tl.constexpr,
    TP: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    F: tl.constexpr,
    W: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    wait(PDL)
    first = tl.program_id(0) * (R // 2)
    t_T = tl.arange(0, TP)
    if T == 1:  # a program for each pick
        k_T = tl.program_id(1) + tl.zeros([TP], tl.int32)
        e = tl.load(index_ptr + tl.program_id(1))
        hit_T = t_T < tl.where(e < E, T, 0)
    else:  # a program for each expert
        e = tl.program_id(1)
        hit_T, k_T = _picked(index_ptr, e, T, TP, K)
    if tl.max(hit_T.to(tl.int32), 0) > 0:
        row_R = (e * (2 * F) + swiglu_rows(first, F, R)).to(tl.int64)
        out_RT = product(
            x_ptr, x_ptr, 0.0, weight_ptr + row_R * W, scale_ptr + row_R * GROUPS,
            T, TP, W, BITS, False, R, BLOCK, STAGES, False,
        )  # fmt: skip
        store_swiglu(act_ptr, t_T * K + k_T, hit_T, out_RT, first, F, R, TP)


@triton.jit
def _down_one(
    act_ptr,  # [K, W]
    shared_act_ptr,  # [SW]
    weight_ptr,  # [E, D, W]
    shared_ptr,  # [D, SW]
    index_ptr,  # [K]
    weights_ptr,  # [K]
    residual_ptr,  # [D]
    out_ptr,  # [D]
    E: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    SW: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row_R = tl.program_id(0) * R + tl.arange(0, R)
    there_R = tl.minimum(row_R, D - 1)
    acc_RB = tl.zeros([R, BLOCK], tl.float32)
    unused_B = tl.zeros([BLOCK], tl.float32)
    # The shared experts come first, because which they are is known before the router is done.
    shared_R = shared_ptr + there_R * SW
    acc_RB, unused_B = dot_one(
        acc_RB, unused_B, shared_act_ptr, shared_act_ptr, shared_R, shared_R, 1.0,
        SW, 16, False, R, BLOCK, PDL,
    )  # fmt: skip
    for k in tl.static_range(K):
        e = tl.minimum(tl.load(index_ptr + k), E - 1)  # the only row always has a token
        row_of_R = weight_ptr + (e * D + there_R).to(tl.int64) * W
        acc_RB, unused_B = dot_one(
            acc_RB, unused_B, act_ptr + k * W, act_ptr, row_of_R, row_of_R,
            tl.load(weights_ptr + k), W, 16, False, R, BLOCK, False,
        )  # fmt: skip
    out_R = tl.sum(acc_RB, 1) + tl.load(residual_ptr + there_R).to(tl.float32)
    tl.store(out_ptr + row_R, out_R, mask=row_R < D)


@triton.jit
def _down_one_int(
    act_ptr,  # [K, P * W]
    shared_act_ptr,  # [P * SW]
    weight_ptr,  # [E, D, W]
    scale_ptr,
    shared_ptr,  # [D, SW]
    shared_scale_ptr,
    index_ptr,  # [K]
    weights_ptr,  # [K]
    residual_ptr,  # [D]
    out_ptr,  # [D]
    part_ptr,  # [SPLITS, D], fp32
    counter_ptr,  # [D / R]
    E: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    SW: tl.constexpr,
    GROUPS: tl.constexpr,
    SHARED_GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    R: tl.constexpr,
    Q: tl.constexpr,
    SPLITS: tl.constexpr,  # ceil(K / Q) programs that share the picks, one for the shared experts
    PDL: tl.constexpr,
):
    P: tl.constexpr = 32 // BITS
    BLOCK: tl.constexpr = max(16, triton.next_power_of_2(W))
    SHARED_BLOCK: tl.constexpr = max(16, triton.next_power_of_2(SW))
    split = tl.program_id(1)
    row_R = tl.program_id(0) * R + tl.arange(0, R)
    there_R = tl.minimum(row_R, D - 1)
    if split == SPLITS - 1:
        out_R = product_one(
            shared_act_ptr, shared_act_ptr, 0.0, shared_ptr + there_R * SW,
            shared_scale_ptr + there_R * SHARED_GROUPS, SW, BITS, False, R, SHARED_BLOCK, PDL,
        )  # fmt: skip
    else:
        k_Q = split * Q + tl.arange(0, Q)
        # The choice can be read: the router was done before the kernel that this one waits for.
        e_Q = tl.minimum(tl.load(index_ptr + k_Q, mask=k_Q < K, other=0), E - 1)
        times_Q = tl.load(weights_ptr + k_Q, mask=k_Q < K, other=0.0)
        row_of_QR = (e_Q[:, None] * D + there_R[None, :]).to(tl.int64)
        out_R = dot_picks(
            act_ptr + k_Q * (P * W), times_Q, k_Q < K, weight_ptr + row_of_QR * W,
            scale_ptr + row_of_QR * GROUPS, W, BITS, Q, R, BLOCK, PDL,
        )  # fmt: skip
    tl.store(part_ptr + split * D + row_R, out_R, mask=row_R < D)
    if arrive_last(counter_ptr + tl.program_id(0), SPLITS):
        sum_R = tl.load(residual_ptr + there_R).to(tl.float32)
        for s in tl.static_range(SPLITS):
            sum_R += tl.load(part_ptr + s * D + there_R, cache_modifier=".cg")
        tl.store(out_ptr + row_R, sum_R, mask=row_R < D)


@triton.jit
def _down_few(
    act_ptr,  # [T, K, P * W]
    shared_act_ptr,  # [T, P * SW]
    weight_ptr,
    scale_ptr,
    shared_ptr,
    shared_scale_ptr,
    index_ptr,  # [T, K]
    weights_ptr,  # [T, K]
    residual_ptr,  # [T, D]
    out_ptr,  # [T, D]
    part_ptr,  # [SPLITS, T, D], fp32
    counter_ptr,  # [D / R]
    T: tl.constexpr,
    TP: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    SW: tl.constexpr,
    GROUPS: tl.constexpr,
    SHARED_GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):
    P: tl.constexpr = 1 if BITS == 16 else 32 // BITS
    split = tl.program_id(1)
    row_R = tl.program_id(0) * R + tl.arange(0, R)
    there_R = tl.minimum(row_R, D - 1)
    t_T = tl.arange(0, TP)
    total_RT = tl.zeros([R, TP], tl.float32)
    wait(PDL)
    if split == SPLITS - 1:
        total_RT = dot_few(
            total_RT, shared_act_ptr + t_T * (P * SW), t_T < T, shared_ptr + there_R * SW,
            shared_scale_ptr + there_R * SHARED_GROUPS, SW, BITS, R, BLOCK, STAGES,
        )  # fmt: skip
    else:
        for e in range(split, E, SPLITS - 1):
            hit_T, k_T = _picked(index_ptr, e, T, TP, K)
            if tl.max(hit_T.to(tl.int32), 0) > 0:
                pick_T = t_T * K + k_T
                row_of_R = (e * D + there_R).to(tl.int64)
                acc_RT = tl.zeros([R, TP], tl.float32)
                acc_RT = dot_few(
                    acc_RT, act_ptr + pick_T * (P * W), hit_T, weight_ptr + row_of_R * W,
                    scale_ptr + row_of_R * GROUPS, W, BITS, R, BLOCK, STAGES,
                )  # fmt: skip
                weight_T = tl.load(weights_ptr + pick_T, mask=hit_T, other=0.0)
                total_RT += acc_RT * weight_T[None, :]
    place_RT = t_T[None, :] * D + row_R[:, None]
    ok_RT = (row_R < D)[:, None] & (t_T < T)[None, :]
    tl.store(part_ptr + split * T * D + place_RT, total_RT, mask=ok_RT)
    if arrive_last(counter_ptr + tl.program_id(0), SPLITS):
        # Whichever program is last sums in the same order, so each run has the same result.
        sum_RT = tl.load(residual_ptr + place_RT, mask=ok_RT, other=0.0).to(tl.float32)
        for s in range(SPLITS):
            part_RT = part_ptr + s * T * D + place_RT
            sum_RT += tl.load(part_RT, mask=ok_RT, other=0.0, cache_modifier=".cg")
        tl.store(out_ptr + place_RT, sum_RT, mask=ok_RT)


def experts_gate_up(x_TD: Tensor, weight: Weight, index_TK: Tensor) -> Tensor:
    """As `torch_ops.experts_gate_up`."""
    T, K = index_TK.shape
    E, width = weight.data.shape[0], weight.data.shape[1] // 2
    act_TKF = x_TD.new_empty(T, K, width)
    options = product_options("gate_up", T, weight)
    launch(_gate_up, (triton.cdiv(width, options["R"] // 2), K if T == 1 else E),
        x_TD, weight.data, scale_of(weight), index_TK, act_TKF,
        T=T, TP=padded_tokens(T), E=E, K=K, F=width, **options,
    )  # fmt: skip
    return act_TKF


def experts_down(
    act_TKF: Tensor,
    shared_act_TF: Tensor,
    weight: Weight,
    shared: Weight,
    index_TK: Tensor,
    weights_TK: Tensor,
    residual_TD: Tensor,
    counters: Tensor,
) -> Tensor:
    """As `torch_ops.experts_down`. `counters` holds D int32 zeros, before and after."""
    (T, K), (E, D, _) = index_TK.shape, weight.data.shape
    out_TD = torch.empty_like(residual_TD)
    sizes = {"E": E, "K": K, "D": D, "SW": shared.data.shape[1]}
    options = product_options("down", T, weight) | sizes
    tiles = triton.cdiv(D, options["R"])
    routing = (index_TK, weights_TK, residual_TD, out_TD)
    if T == 1 and weight.bits == 16:
        for name in ("GROUPS", "BITS", "STAGES"):
            del options[name]
        launch(
            _down_one,
            (tiles,),
            act_TKF,
            shared_act_TF,
            weight.data,
            shared.data,
            *routing,
            **options,
        )
        return out_TD
    splits = triton.cdiv(K, PICKS) + 1 if T == 1 else SPLITS
    options |= {"SHARED_GROUPS": shared.groups, "SPLITS": splits}
    stacks = (weight.data, scale_of(weight), shared.data, scale_of(shared))
    part = residual_TD.new_empty(splits, T, D, dtype=torch.float32)
    args = (act_TKF, shared_act_TF, *stacks, *routing, part, counters)
    if T == 1:
        del options["STAGES"], options["BLOCK"]
        launch(_down_one_int, (tiles, splits), *args, Q=PICKS, **options)
    else:
        launch(_down_few, (tiles, splits), *args, T=T, TP=padded_tokens(T), **options)
    return out_TD
