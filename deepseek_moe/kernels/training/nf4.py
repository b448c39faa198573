"""Dequantises bitsandbytes' 4-bit weights in one pass: reads half a byte a weight, writes two.

A word of 4 bytes is 8 weights, 16 bytes in bf16, which one thread writes. Each thread computes the
scale of its block, and looks its weights up in shared memory.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:  # experts are measured without this package too
    from bitsandbytes.functional import QuantState

WORDS = 512  # of 8 weights, a program


@triton.jit(do_not_specialize=["numel"])
def _unpack_4bit(
    packed_ptr,  # [numel / 2], uint8
    code_ptr,  # [16], fp32
    absmax_ptr,  # [numel / BLOCKSIZE], uint8 with NESTED, else fp32
    code2_ptr,  # [256], fp32; with NESTED this and the next two are read
    absmax2_ptr,  # [numel / BLOCKSIZE / BLOCKSIZE2], fp32
    offset_ptr,  # one number, fp32
    out_ptr,  # [numel]
    numel,
    WHOLE: tl.constexpr,  # numel is a multiple of 8 * WORDS
    NESTED: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    BLOCKSIZE2: tl.constexpr,
    WORDS: tl.constexpr,
):
    # All scales of a program share one scale of scales.
    tl.static_assert(BLOCKSIZE * BLOCKSIZE2 % (8 * WORDS) == 0)
    first = tl.program_id(0).to(tl.int64) * (8 * WORDS)
    word_W = tl.arange(0, WORDS)
    byte_W4 = word_W[:, None] * 4 + tl.arange(0, 4)[None, :]
    at_W8 = word_W[:, None] * 8 + tl.arange(0, 8)[None, :]
    # What is not read may be any number: four bits are an index within the table all the same.
    ok_W = None if WHOLE else first + word_W * 8 < numel
    ok_W4 = None if WHOLE else first + byte_W4 * 2 < numel
    ok_W8 = None if WHOLE else first + at_W8 < numel

    # The compiler turns these bytes and their sum into one load of a word.
    packed_W4 = tl.load(packed_ptr + first // 2 + byte_W4, mask=ok_W4).to(tl.uint32)
    packed_W = tl.sum(packed_W4 << (tl.arange(0, 4) * 8)[None, :], 1)
    scale_W = tl.load(absmax_ptr + first // BLOCKSIZE + word_W // (BLOCKSIZE // 8), mask=ok_W)
    if NESTED:
        scale2 = tl.load(absmax2_ptr + first // (BLOCKSIZE * BLOCKSIZE2))
        scale_W = tl.load(code2_ptr + scale_W.to(tl.int32)) * scale2 + tl.load(offset_ptr)

    shift_8 = (tl.arange(0, 8) ^ 1) * 4  # the high half of a byte is before the low
    index_W8 = ((packed_W[:, None] >> shift_8[None, :]) & 15).to(tl.int32)
    code = tl.load(code_ptr + tl.arange(0, 16))
    value_W8 = tl.gather(code, index_W8.reshape(8 * WORDS), 0).reshape(WORDS, 8)
    out_W8 = (value_W8 * scale_W[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + first + at_W8, out_W8, mask=ok_W8)


def unpack_4bit(packed: Tensor, state: "QuantState") -> Tensor:
    """As `torch_ops.unpack_4bit`."""
    out = torch.empty(state.shape, dtype=state.dtype, device=packed.device)
    numel = out.numel()
    nested, blocksize2 = (state.code,) * 3, 256  # which are not read
    if state.nested:
        nested = (state.state2.code, state.state2.absmax, state.offset)
        blocksize2 = state.state2.blocksize
    # No fused multiply-add: bitsandbytes rounds the product, then the sum.
    _unpack_4bit[(triton.cdiv(numel, 8 * WORDS),)](
        packed, state.code, state.absmax, *nested, out, numel, WHOLE=numel % (8 * WORDS) == 0,
        NESTED=state.nested, BLOCKSIZE=state.blocksize, BLOCKSIZE2=blocksize2, WORDS=WORDS,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out
