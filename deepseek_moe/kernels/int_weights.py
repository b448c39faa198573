"""Weights in int8 or int4: the format, how it is made and read, and how kernels are given one."""

from typing import NamedTuple

import torch
from torch.nn import functional as F

BITS = {"int8": 8, "int4": 4}
GROUP = 64
"""Values that share a scale."""
HEAD_BITS = 8
"""Of the head, which every step reads whole (0.42 GB of the 16B model in bf16). Its errors go
straight into the logits: 8 bits of it cost the bundled model
0.0001 nats a token at most, 4 bits 0.009."""

# A group's value of largest magnitude lies this many steps from 0, at the end of the range that has
# one more level. In 4 bits half a step more or less is tried too and the least squared error kept:
# it takes a fifth off what 4 bits cost the bundled model (+0.018 nats a token, not +0.023).
STEPS = {8: (128.0,), 4: (8.0, 7.5, 8.5)}
NUMBERS_AT_ONCE = 2**22  # of which `pack` makes some copies in fp32


def pack(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [..., O, I] as words, int32 [..., O, W], and scales [..., O, G] in its dtype.

    Beside the result it takes some 200 MB at most, however large the weight is.

    Raises:
        ValueError: I is no multiple of P.
    """
    rows_RI = weight.detach().flatten(0, -2)
    R, I = rows_RI.shape  # noqa: E741
    W, G = _words_and_groups(I, bits)
    packed_RW = torch.empty(R, W, dtype=torch.int32, device=weight.device)
    scale_RG = torch.empty(R, G, dtype=weight.dtype, device=weight.device)
    step = max(1, NUMBERS_AT_ONCE // I)
    for at in range(0, R, step):
        some = slice(at, at + step)
        packed_RW[some], scale_RG[some] = _pack_rows(rows_RI[some], bits)
    return packed_RW.view(*weight.shape[:-1], W), scale_RG.view(*weight.shape[:-1], G)


def unpack(
    packed: torch.Tensor, scale: torch.Tensor, bits: int, dtype: torch.dtype
) -> torch.Tensor:
    """The weight [..., O, I] that `pack` made [..., O, W] and [..., O, G] of, in `dtype`.

    The product of value and scale is rounded to the scale's dtype.
    """
    P, W = 32 // bits, packed.shape[-1]
    shift_P1 = torch.arange(0, 32, bits, dtype=torch.int32, device=packed.device)[:, None]
    stored_PW = (packed.unsqueeze(-2) >> shift_P1) & (2**bits - 1)
    scale_1W = scale.repeat_interleave(GROUP // P, dim=-1)[..., None, :W]
    return ((stored_PW - 2 ** (bits - 1)) * scale_1W).flatten(-2).to(dtype)


def _pack_rows(weight_RI: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    P, half = 32 // bits, 2 ** (bits - 1)
    W, G = _words_and_groups(weight_RI.shape[-1], bits)
    width = GROUP // P
    x = F.pad(weight_RI.float().unflatten(-1, (P, W)), (0, G * width - W))
    x = x.unflatten(-1, (G, width))  # [R, P, G, width]: dimensions 1 and 3 share a scale

    def levels(scale: torch.Tensor) -> torch.Tensor:
        return (x / scale.where(scale != 0, 1.0)).round().clamp(-half, half - 1)

    def error(scale: torch.Tensor) -> torch.Tensor:
        return (levels(scale) * scale - x).square().sum(dim=(1, 3), keepdim=True)

    high, low = x.amax(dim=(1, 3), keepdim=True), x.amin(dim=(1, 3), keepdim=True)
    largest = torch.where(high > -low, high, low)
    # In the stored dtype first: values are rounded by the scale that they are multiplied with.
    tried = torch.stack([(largest / -n).to(weight_RI.dtype).float() for n in STEPS[bits]])
    best = torch.stack([error(scale) for scale in tried]).argmin(dim=0, keepdim=True)
    scale = tried.gather(0, best).squeeze(0)  # [R, 1, G, 1]
    stored_RPW = (levels(scale) + half).to(torch.int32).flatten(-2)[..., :W]
    shift_P1 = torch.arange(0, 32, bits, dtype=torch.int32, device=x.device)[:, None]
    packed_RW = (stored_RPW << shift_P1).sum(dim=1, dtype=torch.int32)  # no bit is set twice
    return packed_RW, scale.flatten(1).to(weight_RI.dtype)


def _words_and_groups(columns: int, bits: int) -> tuple[int, int]:
    """W and G of a row."""
    P = 32 // bits
    if columns % P:
        raise ValueError(
            f"a weight has {columns} columns, which int{bits} packs by {P} into words; load this "
            "model without quantization"
        )
    W = columns // P
    return W, -(-W * P // GROUP)


class Weight(NamedTuple):
    """`data` [..., O, I] in the model's dtype (`bits` 16: whatever it is), or int32 words
    [..., O, I * bits / 32] with a `scale` [..., O, groups] (int_weights.py)."""

    data: torch.Tensor
    scale: torch.Tensor | None = None
    bits: int = 16

    @property
    def groups(self) -> int:
        """Scales a row."""
        return 0 if self.scale is None else self.scale.shape[-1]
