"""Norm, router, softmax and choice of the experts in one launch. The gate and up products of the
shared experts (or of a dense layer) run beside them, since they do not wait for the choice.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..int_weights import Weight
from ..launch import arrive_last, padded_tokens, product_options, scale_of, tile_of
from ..plan import launch
from .dot import product, store_swiglu, swiglu_rows
from .elementwise import add_norm

TILE = 16  # tokens that a program of `pick_experts` chooses for


@triton.jit(do_not_specialize=["tokens"])  # it would be compiled twice
def _pick_experts(
    logits_ptr,  # [T, E], fp32
    position_ptr,  # [T], -1: no token
    index_ptr,  # [T, K], int32
    weights_ptr,  # [T, K], fp32
    tokens,  # T
    TILE: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    NORM_TOPK: tl.constexpr,
):
    t_T = tl.program_id(0) * TILE + tl.arange(0, TILE)
    top_k_of_tile(
        logits_ptr, position_ptr, index_ptr, weights_ptr, t_T, t_T < tokens, TILE, E, K, NORM_TOPK
    )


def pick_experts(
    logits_TE: Tensor, position_T: Tensor, top_k: int, norm_topk: bool
) -> tuple[Tensor, Tensor]:
    """As `torch_ops.pick_experts`."""
    T, E = logits_TE.shape
    index_TK = logits_TE.new_empty(T, top_k, dtype=torch.int32)
    weights_TK = logits_TE.new_empty(T, top_k, dtype=torch.float32)
    launch(_pick_experts, (triton.cdiv(T, TILE),),
        logits_TE, position_T, index_TK, weights_TK, T,
        TILE=TILE, E=E, K=top_k, NORM_TOPK=norm_topk, num_warps=4,
    )  # fmt: skip
    return index_TK, weights_TK


@triton.jit
def top_k_of_tile(logits_ptr, position_ptr, index_ptr, weights_ptr, t_T, ok_T, TP, E, K, NORM_TOPK):
    """Chooses for the tokens `t_T` of [., E] logits: index and weights [., K]. TP, E, K and
    NORM_TOPK are constants at compile time."""
    KP: tl.constexpr = triton.next_power_of_2(K)
    e_E, k_K = tl.arange(0, triton.next_power_of_2(E)), tl.arange(0, KP)
    ok_TE = ok_T[:, None] & (e_E < E)[None, :]
    logits_TE = logits_ptr + t_T[:, None] * E + e_E[None, :]
    logits_TE = tl.load(logits_TE, mask=ok_TE, other=float("-inf"), cache_modifier=".cg")
    logits_TE = tl.where(ok_T[:, None], logits_TE, 0.0)
    score_TE = tl.exp(logits_TE - tl.max(logits_TE, 1)[:, None])
    sum_T = tl.sum(score_TE, 1)
    score_TE = score_TE / sum_T[:, None]
    score_TE = tl.where((e_E < E)[None, :], score_TE, -1.0)
    index_TK = tl.zeros([TP, KP], tl.int32)
    weights_TK = tl.zeros([TP, KP], tl.float32)
    for k in tl.static_range(K):
        best_T, which_T = tl.max(score_TE, 1, return_indices=True)
        index_TK = tl.where((k_K == k)[None, :], which_T[:, None], index_TK)
        weights_TK = tl.where((k_K == k)[None, :], best_T[:, None], weights_TK)
        score_TE = tl.where(e_E[None, :] == which_T[:, None], -1.0, score_TE)
    if NORM_TOPK:
        weights_TK = weights_TK / (tl.sum(weights_TK, 1)[:, None] + 1e-20)
    # Among scores that are NaN any expert, or none, may seem the best. The weights must show it.
    sound_T = sum_T == sum_T
    index_TK = tl.where(sound_T[:, None], index_TK, 0)
    weights_TK = tl.where(sound_T[:, None], weights_TK, float("nan"))
    real_T = tl.load(position_ptr + t_T, mask=ok_T, other=-1) >= 0
    index_TK = tl.where(real_T[:, None], index_TK, E)
    weights_TK = tl.where(real_T[:, None], weights_TK, 0.0)
    ok_TK = ok_T[:, None] & (k_K < K)[None, :]
    tl.store(index_ptr + t_T[:, None] * K + k_K[None, :], index_TK, mask=ok_TK)
    tl.store(weights_ptr + t_T[:, None] * K + k_K[None, :], weights_TK, mask=ok_TK)


@triton.jit
def _route(
    hidden_ptr,  # [T, I], normed if T > 1
    norm_ptr,  # [I], read for one token
    gate_ptr,  # [E, I]
    weight_ptr,  # [2 * F, W]: gate above up
    scale_ptr,
    position_ptr,
    logits_ptr,
    index_ptr,
    weights_ptr,
    act_ptr,  # [T, F]
    normed_ptr,  # [I], written for one token
    counter_ptr,
    eps,
    T: tl.constexpr,
    TP: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    NORM_TOPK: tl.constexpr,
    ROUTERS: tl.constexpr,  # programs that route
    RE: tl.constexpr,  # experts each of them scores
    I: tl.constexpr,  # noqa: E741
    F: tl.constexpr,
    W: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_I: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    t_T = tl.arange(0, TP)
    pid = tl.program_id(0)
    if pid < ROUTERS:
        e_R = pid * RE + tl.arange(0, RE)
        gate_R = gate_ptr + tl.minimum(e_R, E - 1) * I
        logits_RT = product(
            hidden_ptr, norm_ptr, eps, gate_R, gate_R,
            T, TP, I, 16, True, RE, BLOCK_I, STAGES, PDL,
        )  # fmt: skip
        scored_RT = (e_R < E)[:, None] & (t_T < T)[None, :]
        tl.store(logits_ptr + t_T[None, :] * E + e_R[:, None], logits_RT, mask=scored_RT)
        if T == 1 and pid == 0:
            i_I = tl.arange(0, triton.next_power_of_2(I))
            x_I = tl.load(hidden_ptr + i_I, mask=i_I < I, other=0.0).to(tl.float32)
            x_I *= tl.rsqrt(tl.sum(x_I * x_I, 0) / I + eps)
            x_I *= tl.load(norm_ptr + i_I, mask=i_I < I, other=0.0).to(tl.float32)
            tl.store(normed_ptr + i_I, x_I, mask=i_I < I)
        if arrive_last(counter_ptr, ROUTERS):
            # With fewer than 8 rows a row would be divided among warps, which would have to meet.
            ROWS: tl.constexpr = max(TP, 8)
            row_T = tl.arange(0, ROWS)
            top_k_of_tile(
                logits_ptr, position_ptr, index_ptr, weights_ptr, row_T, row_T < T,
                ROWS, E, K, NORM_TOPK,
            )  # fmt: skip
    else:
        first = (pid - ROUTERS) * (R // 2)
        row_R = swiglu_rows(first, F, R)
        out_RT = product(
            hidden_ptr, norm_ptr, eps, weight_ptr + row_R.to(tl.int64) * W,
            scale_ptr + row_R * GROUPS, T, TP, W, BITS, True, R, BLOCK, STAGES, PDL,
        )  # fmt: skip
        store_swiglu(act_ptr, t_T, t_T < T, out_RT, first, F, R, TP)


def route(
    hidden_TD: Tensor,
    norm_D: Tensor,
    eps: float,
    gate_ED: Tensor | None,
    shared: Weight,
    position_T: Tensor,
    top_k: int,
    norm_topk: bool,
    counters: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `torch_ops.route`, but without a gate only the activations of `shared` are defined.
    `counters` holds an int32 zero, before and after."""
    T, I = hidden_TD.shape  # noqa: E741
    E = gate_ED.shape[0] if gate_ED is not None else 1
    width, options = shared.data.shape[0] // 2, product_options("route", T, shared)
    scored = 4 if T == 1 else 16
    routers = triton.cdiv(E, scored) if gate_ED is not None else 0
    x_TD = hidden_TD if T == 1 else add_norm(hidden_TD, None, norm_D, eps)[1]
    normed_TD = torch.empty_like(x_TD) if T == 1 else x_TD
    act_TF = hidden_TD.new_empty(T, width)
    logits_TE = hidden_TD.new_empty(T, E, dtype=torch.float32)
    index_TK = hidden_TD.new_empty(T, top_k, dtype=torch.int32)
    weights_TK = hidden_TD.new_empty(T, top_k, dtype=torch.float32)
    launch(_route, (routers + triton.cdiv(width, options["R"] // 2),),
        x_TD, norm_D, norm_D if gate_ED is None else gate_ED, shared.data, scale_of(shared),
        position_T, logits_TE, index_TK, weights_TK, act_TF, normed_TD, counters, eps,
        T=T, TP=padded_tokens(T), E=E, K=top_k, NORM_TOPK=norm_topk, ROUTERS=routers, RE=scored,
        I=I, F=width, BLOCK_I=tile_of("route", T, 16, I).block, **options,
    )  # fmt: skip
    return normed_TD, act_TF, index_TK, weights_TK


def gate_up(hidden_TD: Tensor, norm_D: Tensor, eps: float, weight: Weight) -> Tensor:
    """As `torch_ops.gate_up`."""
    unused = hidden_TD
    return route(hidden_TD, norm_D, eps, None, weight, unused, 1, False, unused)[1]
