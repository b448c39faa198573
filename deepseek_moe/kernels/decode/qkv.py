"""Norm, query, key and value projection, rotary embedding and the write to the cache, at once."""

import triton
import triton.language as tl
from torch import Tensor

from ..int_weights import Weight
from ..launch import padded_tokens, product_options, scale_of
from ..plan import launch
from . import CosSin, Place
from .dot import halves, product
from .elementwise import add_norm


@triton.jit
def _qkv(
    hidden_ptr,  # [T, P * W], normed if T > 1
    norm_ptr,  # [P * W], read for one token
    weight_ptr,  # [(H + 2 * KV) * D, W]: query heads, key heads, value heads
    scale_ptr,
    cos_ptr,  # [context, D / 2]
    sin_ptr,
    position_ptr,  # [T], -1: no token
    slot_ptr,  # [T]
    q_ptr,  # [T, H * D]
    k_ptr,  # [slots, KV, capacity, D]
    v_ptr,
    eps,
    capacity,
    T: tl.constexpr,
    TP: tl.constexpr,
    H: tl.constexpr,
    KV: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    # A program makes R rows of one head: R / 2 of its first half, and those that turn with them.
    head = tl.program_id(0) // (D // R)
    first = tl.program_id(0) % (D // R) * (R // 2)
    r_R = tl.arange(0, R)
    row_R = head * D + r_R // (R // 2) * (D // 2) + first + r_R % (R // 2)
    out_RT = product(
        hidden_ptr, norm_ptr, eps, weight_ptr + row_R * W, scale_ptr + row_R * GROUPS,
        T, TP, W, BITS, True, R, BLOCK, STAGES, PDL,
    )  # fmt: skip
    a_RT, b_RT = halves(out_RT, R, TP)

    t_T = tl.arange(0, TP)
    position_T = tl.load(position_ptr + t_T, mask=t_T < T, other=-1)
    ok_T = (t_T < T) & (position_T >= 0)
    column_R = first + tl.arange(0, R // 2)
    if head < H + KV:
        angle_RT = position_T[None, :] * (D // 2) + column_R[:, None]
        cos_RT = tl.load(cos_ptr + angle_RT, mask=ok_T[None, :], other=0.0)
        sin_RT = tl.load(sin_ptr + angle_RT, mask=ok_T[None, :], other=0.0)
        a_RT, b_RT = a_RT * cos_RT - b_RT * sin_RT, b_RT * cos_RT + a_RT * sin_RT
    if head < H:
        at_RT = q_ptr + t_T[None, :] * (H * D) + head * D + column_R[:, None]
        tl.store(at_RT, a_RT, mask=(t_T < T)[None, :])
        tl.store(at_RT + D // 2, b_RT, mask=(t_T < T)[None, :])
    else:
        slot_T = tl.load(slot_ptr + t_T, mask=t_T < T, other=0).to(tl.int64)
        place_T = ((slot_T * KV + (head - H) % KV) * capacity + position_T) * D
        if head < H + KV:
            at_RT = k_ptr + place_T[None, :] + column_R[:, None]
        else:
            at_RT = v_ptr + place_T[None, :] + column_R[:, None]
        tl.store(at_RT, a_RT, mask=ok_T[None, :])
        tl.store(at_RT + D // 2, b_RT, mask=ok_T[None, :])


def qkv(
    hidden_TD: Tensor, norm_D: Tensor, eps: float, weight: Weight, cos_sin: CosSin, place: Place
) -> Tensor:
    """As `torch_ops.qkv`."""
    T = hidden_TD.shape[0]
    _, kv_heads, capacity, width = place.keys.shape
    heads = weight.data.shape[0] // width - 2 * kv_heads
    options = product_options("qkv", T, weight)
    options["R"] = min(options["R"], width)
    x_TD = hidden_TD if T == 1 else add_norm(hidden_TD, None, norm_D, eps)[1]
    q_TD = hidden_TD.new_empty(T, heads * width)
    launch(_qkv, ((heads + 2 * kv_heads) * width // options["R"],),
        x_TD, norm_D, weight.data, scale_of(weight), *cos_sin, place.position_T, place.slot_T, q_TD,
        place.keys, place.values, eps, capacity,
        T=T, TP=padded_tokens(T), H=heads, KV=kv_heads, D=width, **options,
    )  # fmt: skip
    return q_TD
