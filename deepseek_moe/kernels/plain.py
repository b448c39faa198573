"""The plain twins: what each kernel computes, in torch, a line for a line of the theory.

They run anywhere, which is how the engine is tested without a GPU, and they are what the kernels
must equal. Products and norms are in fp32; what a kernel hands on is rounded to the model's dtype.

Letters: T tokens, D hidden size, H heads, E experts, K experts a token, N = T*K picks, F expert
width, C the cache's capacity. `position_T` is -1 for a row that holds no token: its picks are
expert E, which is none, with weight 0.
"""

import torch
from torch.nn import functional as F

from ..packing import unpack
from .weight import Weight

BLOCK = 256
"""Weights that share a scale of each of AdamW's averages."""
CosSin = tuple[torch.Tensor, torch.Tensor]
"""cos and sin of each position's angles, fp32 [context, D / 2]."""
Cache = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of one layer, each [slots, heads, capacity, D]."""


def matrix(weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    """[..., O, I], unpacked."""
    if weight.scale is None:
        return weight.data.to(dtype)
    return unpack(weight.data, weight.scale, weight.bits, dtype)


def rms_norm(x_TD: torch.Tensor, norm_D: torch.Tensor, eps: float) -> torch.Tensor:
    x_TD = x_TD.float()
    return x_TD * torch.rsqrt(x_TD.square().mean(-1, keepdim=True) + eps) * norm_D.float()


# A step of few tokens: one kernel for each stage of a layer.


def linear(
    x_TI: torch.Tensor,
    weight: Weight,
    norm_I: torch.Tensor | None = None,
    eps: float = 0.0,
    residual_TO: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """residual + W norm(x) [T, O], in `dtype` or that of x; without norm or residual if None."""
    x = x_TI.float() if norm_I is None else rms_norm(x_TI, norm_I, eps)
    out_TO = x @ matrix(weight, torch.float32).T
    if residual_TO is not None:
        out_TO = out_TO + residual_TO.float()
    return out_TO.to(dtype or x_TI.dtype)


def qkv(
    hidden_TD: torch.Tensor,
    norm_D: torch.Tensor,
    eps: float,
    weight: Weight,
    cos_sin: CosSin,
    position_T: torch.Tensor,
    slot_T: torch.Tensor,
    cache: Cache,
    heads: int,
) -> torch.Tensor:
    """Rotated queries [T, H * D] of norm(hidden); rotated keys, and values, go into the cache."""
    qkv_TO = linear(hidden_TD, weight, norm_D, eps, dtype=torch.float32)
    q_TO = rotate(qkv_TO, cos_sin, position_T, slot_T, cache, heads)
    return q_TO.to(hidden_TD.dtype)


def attend(
    q_TD: torch.Tensor,
    cache: Cache,
    position_T: torch.Tensor,
    slot_T: torch.Tensor,
    scale: float,
    counters: torch.Tensor,
) -> torch.Tensor:
    """Attention of the query of each token over its slot's positions 0 to position; 0 if none."""
    T = q_TD.shape[0]
    k_THCD, v_THCD = (part[slot_T].float() for part in cache)
    q_THD = q_TD.view(T, -1, k_THCD.shape[-1]).float()
    group = q_THD.shape[1] // k_THCD.shape[1]
    k_THCD, v_THCD = (x.repeat_interleave(group, dim=1) for x in (k_THCD, v_THCD))
    score_THC = torch.einsum("thd,thcd->thc", q_THD, k_THCD) * scale
    later_TC = torch.arange(k_THCD.shape[2], device=q_TD.device) > position_T[:, None]
    weight_THC = score_THC.masked_fill(later_TC[:, None], float("-inf")).softmax(-1)
    weight_THC = weight_THC.masked_fill((position_T < 0)[:, None, None], 0.0)
    v_THCD = v_THCD.masked_fill(later_TC[:, None, :, None], 0.0)
    return torch.einsum("thc,thcd->thd", weight_THC, v_THCD).reshape(T, -1).to(q_TD.dtype)


def route(
    hidden_TD: torch.Tensor,
    norm_D: torch.Tensor,
    eps: float,
    gate_ED: torch.Tensor,
    shared: Weight,
    position_T: torch.Tensor,
    top_k: int,
    norm_topk: bool,
    counters: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """norm(hidden) [T, D], the shared experts' activations [T, F], and of the router the picks
    [T, K] (int32) with their weights [T, K] (fp32)."""
    logits_TE = linear(hidden_TD, Weight(gate_ED), norm_D, eps, dtype=torch.float32)
    index_TK, weights_TK = choose(logits_TE, position_T, top_k, norm_topk)
    x_TD = rms_norm(hidden_TD, norm_D, eps).to(hidden_TD.dtype)
    return x_TD, gate_up(hidden_TD, norm_D, eps, shared), index_TK, weights_TK


def gate_up(
    hidden_TD: torch.Tensor, norm_D: torch.Tensor, eps: float, weight: Weight
) -> torch.Tensor:
    """silu(G norm(hidden)) * U norm(hidden), [T, F], of a weight [2F, D], G above U."""
    return swiglu(linear(hidden_TD, weight, norm_D, eps, dtype=torch.float32)).to(hidden_TD.dtype)


def experts_gate_up(x_TD: torch.Tensor, weight: Weight, index_TK: torch.Tensor) -> torch.Tensor:
    """silu(G x) * U x of each pick, [T, K, F]; what stands where the pick is no expert means
    nothing."""
    stack_EOD = matrix(weight, torch.float32)
    picked_TKOD = stack_EOD[index_TK.clamp(max=stack_EOD.shape[0] - 1).long()]
    return swiglu(torch.einsum("td,tkod->tko", x_TD.float(), picked_TKOD)).to(x_TD.dtype)


def experts_down(
    act_TKF: torch.Tensor,
    shared_act_TF: torch.Tensor,
    weight: Weight,
    shared: Weight,
    index_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    residual_TD: torch.Tensor,
    counters: torch.Tensor,
) -> torch.Tensor:
    """residual + shared experts' down + weighted sum over the picks of theirs, [T, D]."""
    stack_EDF = matrix(weight, torch.float32)
    none_TK = (weights_TK == 0) & (index_TK == stack_EDF.shape[0])
    act_TKF = act_TKF.float().masked_fill(none_TK[..., None], 0.0)
    picked_TKDF = stack_EDF[index_TK.clamp(max=stack_EDF.shape[0] - 1).long()]
    routed_TD = torch.einsum("tk,tkf,tkdf->td", weights_TK, act_TKF, picked_TKDF)
    shared_TD = linear(shared_act_TF, shared, dtype=torch.float32)
    return (residual_TD.float() + shared_TD + routed_TD).to(residual_TD.dtype)


# A step of many tokens: products by the library, and between them:


def add_norm(
    x_TD: torch.Tensor, residual_TD: torch.Tensor | None, norm_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + residual, and its norm."""
    sum_TD = x_TD if residual_TD is None else (x_TD.float() + residual_TD.float()).to(x_TD.dtype)
    return sum_TD, rms_norm(sum_TD, norm_D, eps).to(x_TD.dtype)


def rotate(
    qkv_TO: torch.Tensor,
    cos_sin: CosSin,
    position_T: torch.Tensor,
    slot_T: torch.Tensor,
    cache: Cache,
    heads: int,
) -> torch.Tensor:
    """Queries [T, H * D] rotated by their positions (Su et al. 2021, arXiv 2104.09864, in the
    rotate-half arrangement); keys, rotated too, and values go into the cache."""
    T, (_, kv_heads, _, width) = qkv_TO.shape[0], cache[0].shape
    x_THD = qkv_TO.view(T, heads + 2 * kv_heads, width)
    cos_T1D, sin_T1D = (table[position_T.clamp(min=0)][:, None] for table in cos_sin)
    turned_THD, v_THD = x_THD.split([heads + kv_heads, kv_heads], dim=1)
    a_THD, b_THD = turned_THD.float().chunk(2, dim=-1)
    a_THD, b_THD = a_THD * cos_T1D - b_THD * sin_T1D, b_THD * cos_T1D + a_THD * sin_T1D
    q_THD, k_THD = torch.cat([a_THD, b_THD], dim=-1).to(x_THD.dtype).split([heads, kv_heads], dim=1)
    real_T = position_T >= 0
    for part, new_THD in zip(cache, (k_THD, v_THD), strict=True):
        part[slot_T[real_T], :, position_T[real_T]] = new_THD[real_T].to(part.dtype)
    return q_THD.reshape(T, -1)


def choose(
    logits_TE: torch.Tensor, position_T: torch.Tensor, top_k: int, norm_topk: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The picks [T, K] (int32) and their weights [T, K] (fp32): `DeepseekGate`."""
    weights_TK, index_TK = logits_TE.float().softmax(-1).topk(top_k, dim=-1)
    if norm_topk:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    none_T1 = (position_T < 0)[:, None]
    weights_TK = weights_TK.masked_fill(none_T1, 0.0)
    return index_TK.masked_fill(none_T1, logits_TE.shape[-1]).int(), weights_TK


def sort_picks(
    index_TK: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Picks side by side with those of the same expert, in the order of the tokens: the token of
    each place [N], the place of each pick [T, K], and where each expert's places end [E]. Picks of
    no expert have place 0 and leave places of token 0 at the end. All int32."""
    T, K = index_TK.shape
    expert_N, order_N = index_TK.flatten().sort(stable=True)
    numbers_E = torch.arange(num_experts, device=expert_N.device, dtype=expert_N.dtype)
    ends_E = torch.searchsorted(expert_N, numbers_E, right=True)
    place_N = torch.empty_like(order_N)
    place_N[order_N] = torch.arange(T * K, device=order_N.device)
    place_TK = place_N.view(T, K).masked_fill(index_TK == num_experts, 0)
    token_N = (order_N // K).masked_fill(expert_N == num_experts, 0)
    return token_N.int(), place_TK.int(), ends_E.int()


def grouped_gate_up(
    x_TD: torch.Tensor,
    weight: Weight,
    token_N: torch.Tensor,
    ends_E: torch.Tensor,
    step: bool = False,
) -> torch.Tensor:
    """silu(G[e] x) * U[e] x for the places of each expert, [N, F]; 0 after the last. `step`: for a
    decode step, which a graph may capture."""
    return swiglu(_grouped(x_TD[token_N], weight, ends_E)).to(x_TD.dtype)


def grouped_down(
    x_NF: torch.Tensor, weight: Weight, ends_E: torch.Tensor, step: bool = False
) -> torch.Tensor:
    """W[e] x for the places of each expert, [N, D]; 0 after the last. `step` as above."""
    return _grouped(x_NF, weight, ends_E).to(x_NF.dtype)


def _grouped(x_NI: torch.Tensor, weight: Weight, ends_E: torch.Tensor) -> torch.Tensor:
    out_NO = x_NI.new_zeros(x_NI.shape[0], weight.data.shape[1], dtype=torch.float32)
    start = 0
    for weight_OI, end in zip(matrix(weight, torch.float32), ends_E.tolist(), strict=True):
        out_NO[start:end] = x_NI[start:end].float() @ weight_OI.T
        start = end
    return out_NO


def dense(x_TI: torch.Tensor, weight: Weight, dtype: torch.dtype | None = None) -> torch.Tensor:
    """W x, [T, O], in `dtype` or that of x."""
    return linear(x_TI, weight, dtype=dtype)


def swiglu(gate_up_NF: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, [N, F], of [N, 2F]."""
    gate_NF, up_NF = gate_up_NF.float().chunk(2, dim=-1)
    return (F.silu(gate_NF) * up_NF).to(gate_up_NF.dtype)


def combine(
    out_ND: torch.Tensor,
    place_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    shared_TD: torch.Tensor,
    residual_TD: torch.Tensor,
    norm_D: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """residual + shared + weighted sum over the picks, and the norm of that."""
    picked_TKD = out_ND[place_TK.long()].float()
    sum_TD = (picked_TKD * weights_TK[..., None]).sum(1) + shared_TD.float() + residual_TD.float()
    return add_norm(sum_TD.to(residual_TD.dtype), None, norm_D, eps)


def advance(
    new_B: torch.Tensor,
    ids_B: torch.Tensor,
    position_B: torch.Tensor,
    seen_BV: torch.Tensor,
    last: int,
) -> None:
    """After a step, in place: the new ids, which are now seen, and their positions, which stop at
    `last`; a row of position -1 stays at that."""
    ids_B.copy_(new_B)
    seen_BV.scatter_(1, new_B[:, None], True)
    position_B.add_((position_B >= 0).int()).clamp_(max=last)


def attend_prompt(
    q_TD: torch.Tensor,
    cache: Cache,
    ends: torch.Tensor,
    position_B: torch.Tensor,
    slot_B: torch.Tensor,
    longest: int,
    scale: float,
) -> torch.Tensor:
    """Causal attention of the queries q[ends[b]:ends[b + 1]], up to `longest` of them, of each of
    several sequences over its slot: the last one, at position[b], sees positions 0 to that."""
    outs, bounds = [], ends.tolist()
    for start, end, last, slot in zip(
        bounds[:-1], bounds[1:], position_B.tolist(), slot_B.tolist(), strict=True
    ):
        q_HLD = q_TD[start:end].unflatten(1, (-1, cache[0].shape[-1])).transpose(0, 1).float()
        k_HCD, v_HCD = (part[slot, :, : last + 1].float() for part in cache)
        sees_LC = torch.ones(end - start, last + 1, dtype=torch.bool, device=q_TD.device)
        out_HLD = F.scaled_dot_product_attention(
            q_HLD[None], k_HCD[None], v_HCD[None], sees_LC.tril(last + 1 - (end - start)),
            scale=scale, enable_gqa=len(q_HLD) != len(k_HCD),
        )[0]  # fmt: skip
        outs.append(out_HLD.transpose(0, 1).flatten(1))
    return torch.cat(outs).to(q_TD.dtype)


# Between the products of the experts in training.


def open_gates(
    gate_up_NF: torch.Tensor,
    low_NF: torch.Tensor | None,
    weights_N: torch.Tensor,
    dropout: float,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What down takes of [N, 2F]: weight * silu(gate) * up, [N, F], and the same with the share
    `dropout` of it dropped, which `seed` chooses. `low_NF` is added to `gate_up_NF` in place."""
    if low_NF is not None:
        gate_up_NF.add_(low_NF)
    act_NF = swiglu(gate_up_NF.float()) * weights_N[:, None]
    kept_NF = _kept(act_NF, dropout, seed)
    return act_NF.to(gate_up_NF.dtype), (act_NF * kept_NF).to(gate_up_NF.dtype)


def close_gates(
    grad_NF: torch.Tensor,
    low_grad_NF: torch.Tensor | None,
    gate_up_NF: torch.Tensor,
    weights_N: torch.Tensor,
    need_act: bool,
    dropout: float,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of gate and up [N, 2F] and of the weights [N], from those of both results of
    `open_gates` (the second's is `low_grad_NF`). If `need_act`, its second result takes the place
    of `grad_NF`."""
    given_NF = grad_NF
    gate_NF, up_NF = gate_up_NF.float().chunk(2, dim=-1)
    open_NF, silu_NF = torch.sigmoid(gate_NF), F.silu(gate_NF)
    kept_NF = _kept(gate_NF, dropout, seed)
    grad_NF, dtype = grad_NF.float(), grad_NF.dtype
    if low_grad_NF is not None:
        grad_NF = grad_NF + low_grad_NF.float() * kept_NF
    act_NF = silu_NF * up_NF
    grad_weights_N = (grad_NF * act_NF).sum(-1)
    act_NF = act_NF * weights_N[:, None] * kept_NF
    grad_NF = grad_NF * weights_N[:, None]
    grad_gate_NF = grad_NF * up_NF * (open_NF + silu_NF * (1 - open_NF))
    grad_gate_up_NF = torch.cat([grad_gate_NF, grad_NF * silu_NF], dim=-1)
    if need_act:
        given_NF.copy_(act_NF)
    return grad_gate_up_NF.to(dtype), grad_weights_N.to(weights_N.dtype)


def _kept(x_NF: torch.Tensor, dropout: float, seed: int) -> torch.Tensor:
    random = torch.Generator(x_NF.device).manual_seed(seed)
    kept_NF = torch.rand(x_NF.shape, generator=random, device=x_NF.device) >= dropout
    return kept_NF / (1 - dropout)


def sum_picks(
    x_ND: torch.Tensor, low_ND: torch.Tensor | None, place_TK: torch.Tensor
) -> torch.Tensor:
    """The sum of x (and of low) over the places of each token's picks, [T, D]; -1 is no place."""
    picked_TKD = x_ND[place_TK.long()].float()
    if low_ND is not None:
        picked_TKD = picked_TKD + low_ND[place_TK.long()].float()
    picked_TKD = picked_TKD.masked_fill((place_TK < 0)[..., None], 0.0)
    return picked_TKD.sum(1).to(x_ND.dtype)


# The step of the optimizer.


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
    """A step of AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101), the `step`-th from 1, in
    place: `weight` in bf16, its averages `m` and `v` as one byte a weight with a scale for each
    BLOCK. What is stored is rounded stochastically by `seed`, 31 random bits. Returns the sum of
    the squared gradients, fp32."""
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
    return F.pad(x, (0, -len(x) % BLOCK)).view(-1, BLOCK).amax(1)


def _each(scale: torch.Tensor, numel: int) -> torch.Tensor:
    return scale.repeat_interleave(BLOCK)[:numel]


def _over(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x * _each(1 / scale.masked_fill(scale == 0, 1.0), len(x))


# The frozen base of QLoRA.


def unpack_4bit(
    packed: torch.Tensor,
    code: torch.Tensor,
    absmax: torch.Tensor,
    code2: torch.Tensor | None,
    absmax2: torch.Tensor | None,
    offset: torch.Tensor | None,
    shape: torch.Size,
    dtype: torch.dtype,
    blocksize: int = 64,
    blocksize2: int = 256,
) -> torch.Tensor:
    """A weight as bitsandbytes packs it in 4 bits (Dettmers et al. 2023, arXiv 2305.14314), in
    `dtype`: of each `packed` byte the high half, then the low, is an index into `code` [16], and
    `blocksize` weights share a scale. Those are `absmax`, fp32, or with double quantisation one
    byte each, code2[absmax] * absmax2 + offset, where `blocksize2` of them share an `absmax2`.
    Computed in fp32 and rounded once."""
    index = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).flatten()
    scale = absmax
    if code2 is not None:
        scale = code2[absmax.int()] * absmax2.repeat_interleave(blocksize2)[: len(absmax)] + offset
    scale = scale.repeat_interleave(blocksize)[: shape.numel()]
    return (code[index[: shape.numel()].int()] * scale).to(dtype).view(shape)
