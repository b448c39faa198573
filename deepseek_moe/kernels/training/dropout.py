"""Dropout without a mask: what is dropped follows from a seed, so each pass can drop it again."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .torch_ops import Seed

BLOCK = 1024  # numbers of a program


@triton.jit
def kept(seed_ptr, salt, at, DROPOUT: tl.constexpr):
    """0 where a number is dropped, else 1 / (1 - DROPOUT); the same in each pass."""
    seed = tl.load(seed_ptr) + salt
    return tl.where(tl.rand(seed, at.to(tl.uint32)) >= DROPOUT, 1.0 / (1.0 - DROPOUT), 0.0)


@triton.jit(do_not_specialize=["salt", "numel"])
def _drop_out(x_ptr, out_ptr, seed_ptr, salt, numel, DROPOUT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < numel, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, x * kept(seed_ptr, salt, at, DROPOUT), mask=at < numel)


def drop_out(x: Tensor, dropout: float, seed: Seed) -> Tensor:
    """As `torch_ops.drop_out`."""
    if not dropout:
        return x
    x = x.contiguous()
    out = torch.empty_like(x)
    _drop_out[(triton.cdiv(x.numel(), BLOCK),)](
        x, out, seed.step, seed.salt, x.numel(), DROPOUT=dropout, BLOCK=BLOCK, num_warps=4
    )
    return out
