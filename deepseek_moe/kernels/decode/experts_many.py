"""One product for all experts, for the thousands of tokens of prompts or a batch of sequences."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from ..int_weights import Weight
from ..launch import product_options, scale_of, wait
from ..plan import launch
from .dot import dot_few, store_swiglu, swiglu_rows
from .dot_int import int_value
from .elementwise import swiglu

DEQUANTIZED = 2**25  # numbers of quantised experts that are in 16 bits at once: 67 MB
READING = 48  # with up to so many picks an expert, reading the weights is what takes the time


@triton.jit
def _matrix(
    words_ptr,  # [rows, W]
    scale_ptr,  # [rows, GROUPS]
    out_ptr,  # [rows, P * W]
    W: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    P: tl.constexpr = 32 // BITS
    row = tl.program_id(0).to(tl.int64)
    column_B = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok_B = column_B < W
    words_B = tl.load(words_ptr + row * W + column_B, mask=ok_B, other=0)
    scale_B = tl.load(scale_ptr + row * GROUPS + column_B // (64 // P), mask=ok_B, other=0.0)
    for j in tl.static_range(P):
        value_B = int_value(words_B, j, BITS) * scale_B.to(tl.float32)
        tl.store(out_ptr + row * (P * W) + j * W + column_B, value_B, mask=ok_B)


def matrix(weight: Weight, dtype: torch.dtype) -> Tensor:
    """As `torch_ops.matrix`."""
    if weight.scale is None:
        return weight.data.to(dtype)
    *stack, words = weight.data.shape
    out = torch.empty(*stack, words * 32 // weight.bits, dtype=dtype, device=weight.data.device)
    block = min(1024, triton.next_power_of_2(words))
    launch(_matrix, (weight.data.numel() // words, triton.cdiv(words, block)),
        weight.data, weight.scale, out,
        W=words, GROUPS=weight.groups, BITS=weight.bits, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _grouped(
    x_ptr,  # [T, P * W] where GATHER, else [N, P * W]
    token_ptr,  # [N], read if GATHER
    weight_ptr,  # [E, O, W]
    scale_ptr,
    ends_ptr,  # [E]
    out_ptr,  # [N, O], or [N, O / 2] with SwiGLU
    O: tl.constexpr,  # noqa: E741
    W: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    GATHER: tl.constexpr,
    GLU: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    P: tl.constexpr = 1 if BITS == 16 else 32 // BITS
    wait(PDL)
    e = tl.program_id(1)
    start = tl.load(ends_ptr + e - 1, mask=e > 0, other=0)
    end = tl.load(ends_ptr + e)
    if GLU:
        first = tl.program_id(0) * (R // 2)
        row_R = swiglu_rows(first, O // 2, R)
    else:
        first = tl.program_id(0) * R
        row_R = tl.minimum(first + tl.arange(0, R), O - 1)
    row_R = (e * O + row_R).to(tl.int64)
    for at in range(start, end, N):
        n_N = at + tl.arange(0, N)
        ok_N = n_N < end
        x_N = n_N.to(tl.int64)
        if GATHER:
            x_N = tl.load(token_ptr + n_N, mask=ok_N, other=0).to(tl.int64)
        out_RN = dot_few(
            tl.zeros([R, N], tl.float32), x_ptr + x_N * (P * W), ok_N,
            weight_ptr + row_R * W, scale_ptr + row_R * GROUPS, W, BITS, R, BLOCK, STAGES,
        )  # fmt: skip
        if GLU:
            store_swiglu(out_ptr, n_N.to(tl.int64), ok_N, out_RN, first, O // 2, R, N)
        else:
            o_R = first + tl.arange(0, R)
            out_RN_ptr = out_ptr + n_N.to(tl.int64)[None, :] * O + o_R[:, None]
            tl.store(out_RN_ptr, out_RN, mask=(o_R < O)[:, None] & ok_N[None, :])


def _launch(x: Tensor, weight: Weight, ends_E: Tensor, token_N: Tensor | None, glu: bool) -> Tensor:
    E, rows, _ = weight.data.shape
    picks = x.shape[0] if token_N is None else token_N.shape[0]
    # About as many picks at once as most experts have, so that their weights are read once.
    together = min(64, max(16, triton.next_power_of_2(picks // E)))
    options = product_options("grouped", together, weight)
    out = x.new_empty(picks, rows // 2 if glu else rows)
    launch(_grouped, (triton.cdiv(rows, options["R"]), E),
        x, x if token_N is None else token_N, weight.data, scale_of(weight), ends_E, out,
        O=rows, GATHER=token_N is not None, GLU=glu, N=together, **options,
    )  # fmt: skip
    return out


def grouped_gate_up(
    x_TD: Tensor, weight: Weight, token_N: Tensor, ends_E: Tensor, step: bool = False
) -> Tensor:
    """As `torch_ops.grouped_gate_up`, but nothing is written after the last expert's places."""
    if step or _reads_most(token_N.shape[0], weight):
        return _launch(x_TD, weight, ends_E, token_N, glu=True)
    return swiglu(_library(x_TD[token_N], weight, ends_E))


def grouped_down(x_NF: Tensor, weight: Weight, ends_E: Tensor, step: bool = False) -> Tensor:
    """As `torch_ops.grouped_down`, but nothing is written after the last expert's places."""
    if step or _reads_most(x_NF.shape[0], weight):
        return _launch(x_NF, weight, ends_E, None, glu=False)
    return _library(x_NF, weight, ends_E)


def _reads_most(picks: int, weight: Weight) -> bool:
    """Whether the kernel here is faster than the library's product.

    A decode step always takes it, because the library's product cannot be captured on every GPU,
    and no kernel can be loaded during a capture.
    """
    return picks <= READING * weight.data.shape[0]


def _library(x_NI: Tensor, weight: Weight, ends_E: Tensor) -> Tensor:
    if weight.scale is None:
        return F.grouped_mm(x_NI, weight.data.transpose(1, 2), offs=ends_E)
    E, O, _ = weight.data.shape  # noqa: E741
    rows = max(64, DEQUANTIZED // (E * x_NI.shape[1]) // 64 * 64)
    out_NO = x_NI.new_empty(x_NI.shape[0], O)
    for at in range(0, O, rows):
        some = slice(at, at + rows)
        piece = Weight(weight.data[:, some].contiguous(), weight.scale[:, some].contiguous(),
                       weight.bits)  # fmt: skip
        matrix_EIR = matrix(piece, x_NI.dtype).transpose(1, 2)
        out_NO[:, some] = F.grouped_mm(x_NI, matrix_EIR, offs=ends_E)
    return out_NO


def dense(x_TI: Tensor, weight: Weight, dtype: torch.dtype | None = None) -> Tensor:
    """As `torch_ops.dense`."""
    if dtype in (None, x_TI.dtype):
        return F.linear(x_TI, matrix(weight, x_TI.dtype))
    return torch.mm(x_TI, matrix(weight, x_TI.dtype).T, out_dtype=dtype)
