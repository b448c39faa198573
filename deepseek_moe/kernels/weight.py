"""A weight as the kernels read it."""

from typing import NamedTuple

import torch


class Weight(NamedTuple):
    """`data` [..., O, I] in the model's dtype (`bits` 16: whatever it is), or int32 words
    [..., O, I * bits / 32] with a `scale` [..., O, groups] (packing.py)."""

    data: torch.Tensor
    scale: torch.Tensor | None = None
    bits: int = 16

    @property
    def groups(self) -> int:
        """Scales a row."""
        return 0 if self.scale is None else self.scale.shape[-1]
