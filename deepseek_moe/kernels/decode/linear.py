"""A product for a few tokens, with the norm before it or the residual after it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..int_weights import Weight
from ..launch import padded_tokens, product_options, scale_of
from ..plan import launch
from .dot import product
from .elementwise import add_norm


@triton.jit
def _linear(
    x_ptr,  # [T, P * W]
    norm_ptr,  # [P * W], read if NORM
    weight_ptr,  # [rows, W]
    scale_ptr,
    residual_ptr,  # [T, rows], read if RESIDUAL
    out_ptr,  # [T, rows]
    eps,
    rows,
    T: tl.constexpr,
    TP: tl.constexpr,
    W: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    NORM: tl.constexpr,
    RESIDUAL: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    row_R = tl.program_id(0) * R + tl.arange(0, R)
    there_R = tl.minimum(row_R, rows - 1).to(tl.int64)
    out_RT = product(
        x_ptr, norm_ptr, eps, weight_ptr + there_R * W, scale_ptr + there_R * GROUPS,
        T, TP, W, BITS, NORM, R, BLOCK, STAGES, PDL,
    )  # fmt: skip
    t_T = tl.arange(0, TP)
    place_RT = t_T[None, :] * rows + row_R[:, None]
    ok_RT = (row_R < rows)[:, None] & (t_T < T)[None, :]
    if RESIDUAL:
        out_RT += tl.load(residual_ptr + place_RT, mask=ok_RT, other=0.0).to(tl.float32)
    tl.store(out_ptr + place_RT, out_RT, mask=ok_RT)


def linear(
    x_TI: Tensor,
    weight: Weight,
    norm_I: Tensor | None = None,
    eps: float = 0.0,
    residual_TO: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """As `torch_ops.linear`."""
    T, rows = x_TI.shape[0], weight.data.shape[0]
    out_TO = x_TI.new_empty(T, rows, dtype=dtype or x_TI.dtype)
    options = product_options("o" if rows < 32768 else "head", T, weight)
    if norm_I is not None and T > 1:
        x_TI, norm_I = add_norm(x_TI, None, norm_I, eps)[1], None
    launch(_linear, (triton.cdiv(rows, options["R"]),),
        x_TI, x_TI if norm_I is None else norm_I, weight.data, scale_of(weight),
        x_TI if residual_TO is None else residual_TO, out_TO, eps, rows,
        T=T, TP=padded_tokens(T), NORM=norm_I is not None, RESIDUAL=residual_TO is not None,
        **options,
    )  # fmt: skip
    return out_TO
