"""Weights in int8 or int4: the format, and how it is read. decode/int_quantizer.py makes them.

A word of 32 bits holds P = 4 (int8) or 8 (int4) values of one row, so a row of I columns has
W = I / P words. Value j of word w stands in the bits from j * bits on, and is column j * W + w: a
kernel that reads a tile of words shifts it P times and has P tiles of columns, with nothing to
shuffle. Values are stored plus 2 ** (bits - 1), so they are never negative. GW = 64 / P words side
by side, which are 64 values, share a scale; the last group of a row may be smaller.

    weight [..., O, I]  ~  (stored - 2 ** (bits - 1)) * scale
    words int32 [..., O, W], scale [..., O, G] in the weight's dtype, G = ceil(W / GW)
"""

from typing import NamedTuple

import torch
from torch import Tensor

GROUP = 64
"""Values that share a scale."""


class Weight(NamedTuple):
    """A weight as kernels take it: `data` [..., O, I] in the model's dtype (`bits` 16 stands for
    all of these), or words [..., O, W] with their `scale` [..., O, G]."""

    data: Tensor
    scale: Tensor | None = None
    bits: int = 16

    @property
    def groups(self) -> int:
        """Scales a row."""
        return 0 if self.scale is None else self.scale.shape[-1]


def dequantize(words: Tensor, scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """The weight [..., O, I], in `dtype`, of words [..., O, W] and scales [..., O, G].

    The product of value and scale is rounded to the scale's dtype first.
    """
    P, W = 32 // bits, words.shape[-1]
    stored_PW = (words.unsqueeze(-2) >> shifts(bits, words.device)) & (2**bits - 1)
    scale_1W = scale.repeat_interleave(GROUP // P, dim=-1)[..., None, :W]
    return ((stored_PW - 2 ** (bits - 1)) * scale_1W).flatten(-2).to(dtype)


def words_and_groups(columns: int, bits: int) -> tuple[int, int]:
    """W and G of a row of `columns`."""
    P = 32 // bits
    if columns % P:
        raise ValueError(
            f"a weight has {columns} columns, but int{bits} needs a multiple of {P}; load this "
            "model without quantization"
        )
    return columns // P, -(-columns // GROUP)


def shifts(bits: int, device: torch.device) -> Tensor:
    """Where each value of a word begins, [P, 1]."""
    return torch.arange(0, 32, bits, dtype=torch.int32, device=device)[:, None]
