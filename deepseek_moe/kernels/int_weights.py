"""Weights in int8 or int4: the format, and how it is made and read.

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
from torch.nn import functional as F

BITS = {"int8": 8, "int4": 4}
GROUP = 64
"""Values that share a scale."""
HEAD_BITS = 8
"""The head stays in 8 bits, because its errors go straight into the logits: 8 bits cost the bundled
model 0.0001 nats a token at most, 4 bits 0.009. Each step reads all of it (0.42 GB of the 16B model
in bf16)."""

# The value of largest magnitude in a group lies this many steps from 0, at the end of the range
# that has one more level. In 4 bits, half a step more and less are tried too, and the least squared
# error is kept: the bundled model then loses 0.018 nats a token, not 0.023.
STEPS = {8: (128.0,), 4: (8.0, 7.5, 8.5)}
NUMBERS_AT_ONCE = 2**22
"""`quantize` works on this many numbers at once, because it makes several copies in fp32."""


class Weight(NamedTuple):
    """A weight as kernels take it: `data` [..., O, I] in the model's dtype (`bits` 16 stands for
    all of these), or words [..., O, W] with their `scale` [..., O, G]."""

    data: torch.Tensor
    scale: torch.Tensor | None = None
    bits: int = 16

    @property
    def groups(self) -> int:
        """Scales a row."""
        return 0 if self.scale is None else self.scale.shape[-1]


def quantize(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The words [..., O, W] and scales [..., O, G] of a weight [..., O, I].

    Beside the result it takes some 200 MB at most, however large the weight is.

    Raises:
        ValueError: I is no multiple of P.
    """
    rows_RI = weight.detach().flatten(0, -2)
    R, I = rows_RI.shape  # noqa: E741
    W, G = words_and_groups(I, bits)
    words_RW = torch.empty(R, W, dtype=torch.int32, device=weight.device)
    scale_RG = torch.empty(R, G, dtype=weight.dtype, device=weight.device)
    step = max(1, NUMBERS_AT_ONCE // I)
    for at in range(0, R, step):
        some = slice(at, at + step)
        words_RW[some], scale_RG[some] = _quantize_rows(rows_RI[some], bits)
    return words_RW.view(*weight.shape[:-1], W), scale_RG.view(*weight.shape[:-1], G)


def dequantize(
    words: torch.Tensor, scale: torch.Tensor, bits: int, dtype: torch.dtype
) -> torch.Tensor:
    """The weight [..., O, I], in `dtype`, of what `quantize` returned.

    The product of value and scale is rounded to the scale's dtype first.
    """
    P, W = 32 // bits, words.shape[-1]
    stored_PW = (words.unsqueeze(-2) >> _shifts(bits, words.device)) & (2**bits - 1)
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


def _shifts(bits: int, device: torch.device) -> torch.Tensor:
    """Where each value of a word begins, [P, 1]."""
    return torch.arange(0, 32, bits, dtype=torch.int32, device=device)[:, None]


def _quantize_rows(weight_RI: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    P, half = 32 // bits, 2 ** (bits - 1)
    W, G = words_and_groups(weight_RI.shape[-1], bits)
    width = GROUP // P
    x = F.pad(weight_RI.float().unflatten(-1, (P, W)), (0, G * width - W))
    x = x.unflatten(-1, (G, width))  # [R, P, G, width]: dimensions 1 and 3 share a scale

    def levels(scale: torch.Tensor) -> torch.Tensor:
        return (x / scale.where(scale != 0, 1.0)).round().clamp(-half, half - 1)

    def error(scale: torch.Tensor) -> torch.Tensor:
        return (levels(scale) * scale - x).square().sum(dim=(1, 3), keepdim=True)

    high, low = x.amax(dim=(1, 3), keepdim=True), x.amin(dim=(1, 3), keepdim=True)
    largest = torch.where(high > -low, high, low)
    # The scale is rounded to the stored dtype first, since values are multiplied with that.
    tried = torch.stack([(largest / -n).to(weight_RI.dtype).float() for n in STEPS[bits]])
    best = torch.stack([error(scale) for scale in tried]).argmin(dim=0, keepdim=True)
    scale = tried.gather(0, best).squeeze(0)  # [R, 1, G, 1]
    stored_RPW = (levels(scale) + half).to(torch.int32).flatten(-2)[..., :W]
    # The values of a word share no bit, so their sum joins them.
    words_RW = (stored_RPW << _shifts(bits, x.device)).sum(dim=1, dtype=torch.int32)
    return words_RW, scale.flatten(1).to(weight_RI.dtype)
