"""The plain twins: what each kernel computes, in torch, line by line as in the theory.

They run anywhere, so the engine can be tested without a GPU. Products and norms are in fp32; what a
kernel hands on is rounded to the model's dtype.

Letters: T tokens, D hidden size, H heads, E experts, K experts a token, N = T*K picks, F expert
width, C the cache's capacity. `position_T` is -1 for a row that holds no token. The picks of such a
row are empty: expert E, which does not exist, with weight 0.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..int_weights import Weight, dequantize
from ..torch_ops import sort_picks, swiglu  # noqa: F401 - sort_picks is one of the twins
from . import CosSin, Place


def matrix(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The weight [..., O, I] in `dtype`."""
    if weight.scale is None:
        return weight.data.to(dtype)
    return dequantize(weight.data, weight.scale, weight.bits, dtype)


def rms_norm(x_TD: Tensor, norm_D: Tensor, eps: float) -> Tensor:
    x_TD = x_TD.float()
    return x_TD * torch.rsqrt(x_TD.square().mean(-1, keepdim=True) + eps) * norm_D.float()


# A step of few tokens has one kernel for each stage of a layer.


def linear(
    x_TI: Tensor,
    weight: Weight,
    norm_I: Tensor | None = None,
    eps: float = 0.0,
    residual_TO: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """residual + W norm(x), [T, O], in `dtype` or that of x. What is None is left out."""
    x = x_TI.float() if norm_I is None else rms_norm(x_TI, norm_I, eps)
    out_TO = x @ matrix(weight, torch.float32).T
    if residual_TO is not None:
        out_TO = out_TO + residual_TO.float()
    return out_TO.to(dtype or x_TI.dtype)


def qkv(
    hidden_TD: Tensor, norm_D: Tensor, eps: float, weight: Weight, cos_sin: CosSin, place: Place
) -> Tensor:
    """Rotated queries [T, H * D] of norm(hidden). Rotated keys, and values, go into the cache."""
    qkv_TO = linear(hidden_TD, weight, norm_D, eps, dtype=torch.float32)
    return rotate(qkv_TO, cos_sin, place).to(hidden_TD.dtype)


def attend(q_TD: Tensor, place: Place, counters: Tensor) -> Tensor:
    """Attention of each token's query over the positions 0 to its own of its slot; else zeros."""
    T, position_T = q_TD.shape[0], place.position_T
    k_THCD, v_THCD = (part[place.slot_T].float() for part in (place.keys, place.values))
    q_THD = q_TD.view(T, -1, k_THCD.shape[-1]).float()
    group = q_THD.shape[1] // k_THCD.shape[1]
    k_THCD, v_THCD = (x.repeat_interleave(group, dim=1) for x in (k_THCD, v_THCD))
    score_THC = torch.einsum("thd,thcd->thc", q_THD, k_THCD) * k_THCD.shape[-1] ** -0.5
    later_TC = torch.arange(k_THCD.shape[2], device=q_TD.device) > position_T[:, None]
    weight_THC = score_THC.masked_fill(later_TC[:, None], float("-inf")).softmax(-1)
    weight_THC = weight_THC.masked_fill((position_T < 0)[:, None, None], 0.0)
    v_THCD = v_THCD.masked_fill(later_TC[:, None, :, None], 0.0)
    return torch.einsum("thc,thcd->thd", weight_THC, v_THCD).reshape(T, -1).to(q_TD.dtype)


def route(
    hidden_TD: Tensor,
    norm_D: Tensor,
    eps: float,
    gate_ED: Tensor,
    shared: Weight,
    position_T: Tensor,
    top_k: int,
    norm_topk: bool,
    counters: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns norm(hidden) [T, D], the activations of the shared experts [T, F], and the picks of
    the router [T, K] (int32) with their weights [T, K] (fp32)."""
    logits_TE = linear(hidden_TD, Weight(gate_ED), norm_D, eps, dtype=torch.float32)
    index_TK, weights_TK = pick_experts(logits_TE, position_T, top_k, norm_topk)
    x_TD = rms_norm(hidden_TD, norm_D, eps).to(hidden_TD.dtype)
    return x_TD, gate_up(hidden_TD, norm_D, eps, shared), index_TK, weights_TK


def gate_up(hidden_TD: Tensor, norm_D: Tensor, eps: float, weight: Weight) -> Tensor:
    """silu(G norm(hidden)) * U norm(hidden), [T, F], of a weight [2F, D], G above U."""
    return swiglu(linear(hidden_TD, weight, norm_D, eps, dtype=torch.float32)).to(hidden_TD.dtype)


def experts_gate_up(x_TD: Tensor, weight: Weight, index_TK: Tensor) -> Tensor:
    """silu(G x) * U x of each pick, [T, K, F]. Rows of empty picks are undefined."""
    stack_EOD = matrix(weight, torch.float32)
    picked_TKOD = stack_EOD[index_TK.clamp(max=stack_EOD.shape[0] - 1).long()]
    return swiglu(torch.einsum("td,tkod->tko", x_TD.float(), picked_TKOD)).to(x_TD.dtype)


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
    """residual + down of the shared experts + weighted sum of down of the picks, [T, D]."""
    stack_EDF = matrix(weight, torch.float32)
    none_TK = (weights_TK == 0) & (index_TK == stack_EDF.shape[0])
    act_TKF = act_TKF.float().masked_fill(none_TK[..., None], 0.0)
    picked_TKDF = stack_EDF[index_TK.clamp(max=stack_EDF.shape[0] - 1).long()]
    routed_TD = torch.einsum("tk,tkf,tkdf->td", weights_TK, act_TKF, picked_TKDF)
    shared_TD = linear(shared_act_TF, shared, dtype=torch.float32)
    return (residual_TD.float() + shared_TD + routed_TD).to(residual_TD.dtype)


# A step of many tokens has products of the library, and these between them.


def add_norm(
    x_TD: Tensor, residual_TD: Tensor | None, norm_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x + residual, and the norm of that."""
    sum_TD = x_TD if residual_TD is None else (x_TD.float() + residual_TD.float()).to(x_TD.dtype)
    return sum_TD, rms_norm(sum_TD, norm_D, eps).to(x_TD.dtype)


def rotate(qkv_TO: Tensor, cos_sin: CosSin, place: Place) -> Tensor:
    """Rotated queries [T, H * D]. Rotated keys, and values, go into the cache.

    The rotation is that of Su et al. 2021 (arXiv 2104.09864), where number i of the first half of a
    head turns with number i of the second half.
    """
    T, (_, kv_heads, _, width) = qkv_TO.shape[0], place.keys.shape
    position_T, slot_T = place.position_T, place.slot_T
    x_THD = qkv_TO.view(T, -1, width)
    heads = x_THD.shape[1] - 2 * kv_heads
    cos_T1D, sin_T1D = (table[position_T.clamp(min=0)][:, None] for table in cos_sin)
    turned_THD, v_THD = x_THD.split([heads + kv_heads, kv_heads], dim=1)
    a_THD, b_THD = turned_THD.float().chunk(2, dim=-1)
    a_THD, b_THD = a_THD * cos_T1D - b_THD * sin_T1D, b_THD * cos_T1D + a_THD * sin_T1D
    q_THD, k_THD = torch.cat([a_THD, b_THD], dim=-1).to(x_THD.dtype).split([heads, kv_heads], dim=1)
    real_T = position_T >= 0
    for part, new_THD in zip((place.keys, place.values), (k_THD, v_THD), strict=True):
        part[slot_T[real_T], :, position_T[real_T]] = new_THD[real_T].to(part.dtype)
    return q_THD.reshape(T, -1)


def pick_experts(
    logits_TE: Tensor, position_T: Tensor, top_k: int, norm_topk: bool
) -> tuple[Tensor, Tensor]:
    """The picks [T, K] (int32) and their weights [T, K] (fp32), as `DeepseekGate` makes them."""
    weights_TK, index_TK = logits_TE.float().softmax(-1).topk(top_k, dim=-1)
    if norm_topk:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    none_T1 = (position_T < 0)[:, None]
    weights_TK = weights_TK.masked_fill(none_T1, 0.0)
    return index_TK.masked_fill(none_T1, logits_TE.shape[-1]).int(), weights_TK


def grouped_gate_up(
    x_TD: Tensor, weight: Weight, token_N: Tensor, ends_E: Tensor, step: bool = False
) -> Tensor:
    """silu(G[e] x) * U[e] x for the places of each expert, [N, F], and 0 after the last of them.

    `step` says that it is for a decode step, which a graph may capture.
    """
    return swiglu(_grouped(x_TD[token_N], weight, ends_E)).to(x_TD.dtype)


def grouped_down(x_NF: Tensor, weight: Weight, ends_E: Tensor, step: bool = False) -> Tensor:
    """W[e] x for the places of each expert, [N, D], as `grouped_gate_up`."""
    return _grouped(x_NF, weight, ends_E).to(x_NF.dtype)


def _grouped(x_NI: Tensor, weight: Weight, ends_E: Tensor) -> Tensor:
    out_NO = x_NI.new_zeros(x_NI.shape[0], weight.data.shape[1], dtype=torch.float32)
    start = 0
    for weight_OI, end in zip(matrix(weight, torch.float32), ends_E.tolist(), strict=True):
        out_NO[start:end] = x_NI[start:end].float() @ weight_OI.T
        start = end
    return out_NO


def dense(x_TI: Tensor, weight: Weight, dtype: torch.dtype | None = None) -> Tensor:
    """W x, [T, O], in `dtype` or that of x."""
    return linear(x_TI, weight, dtype=dtype)


def combine(
    out_ND: Tensor,
    place_TK: Tensor,
    weights_TK: Tensor,
    shared_TD: Tensor,
    residual_TD: Tensor,
    norm_D: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """residual + shared + weighted sum of the picks, and the norm of that."""
    picked_TKD = out_ND[place_TK.long()].float()
    sum_TD = (picked_TKD * weights_TK[..., None]).sum(1) + shared_TD.float() + residual_TD.float()
    return add_norm(sum_TD.to(residual_TD.dtype), None, norm_D, eps)


def advance(new_B: Tensor, ids_B: Tensor, position_B: Tensor, seen_BV: Tensor, last: int) -> None:
    """After a step, in place: the new ids count as seen, and each position grows by one, up to
    `last`. Position -1 stays."""
    ids_B.copy_(new_B)
    seen_BV.scatter_(1, new_B[:, None], True)
    position_B.add_((position_B >= 0).int()).clamp_(max=last)


def attend_prompt(q_TD: Tensor, place: Place, ends: Tensor, longest: int) -> Tensor:
    """Causal attention of the queries of several sequences over their slots.

    Sequence b has the queries q[ends[b]:ends[b + 1]], at most `longest` of them. The last of these
    stands at place b, and sees the positions 0 to that.
    """
    outs, bounds, width = [], ends.tolist(), place.keys.shape[-1]
    places = zip(place.position_T.tolist(), place.slot_T.tolist(), strict=True)
    for start, end, (last, slot) in zip(bounds[:-1], bounds[1:], places, strict=True):
        q_HLD = q_TD[start:end].unflatten(1, (-1, width)).transpose(0, 1).float()
        k_HCD, v_HCD = (part[slot, :, : last + 1].float() for part in (place.keys, place.values))
        sees_LC = torch.ones(end - start, last + 1, dtype=torch.bool, device=q_TD.device)
        out_HLD = F.scaled_dot_product_attention(
            q_HLD[None], k_HCD[None], v_HCD[None], sees_LC.tril(last + 1 - (end - start)),
            enable_gqa=len(q_HLD) != len(k_HCD),
        )[0]  # fmt: skip
        outs.append(out_HLD.transpose(0, 1).flatten(1))
    return torch.cat(outs).to(q_TD.dtype)
