"""The kernels of a decoding step.

Stages of a layer, in the order in which a token meets them, in a step of few tokens:

    qkv           norm, projections, rotary embedding, write to the cache
    attend_cache  attention over the cache
    linear        output projection and residual (also the dense layers' down product, and the head)
    router        norm, scores, the choice of experts; the shared experts' gate and up products
    experts_few   gate and up of the chosen; down, weighted sum, shared experts, residual

A step of many tokens leaves the products to the library (experts_many) and fuses what stands
between them (elementwise, dispatch). A prompt is attended to by attend_prompt.

`triton_ops` and `torch_ops` have the same functions. The decoder is given one of the two.
"""

from typing import NamedTuple

import torch

CosSin = tuple[torch.Tensor, torch.Tensor]
"""cos and sin of each position's angles, fp32 [context, D / 2]."""


class Place(NamedTuple):
    """Where tokens stand in the cache of one layer."""

    keys: torch.Tensor  # [slots, heads, capacity, D]
    values: torch.Tensor
    position_T: torch.Tensor  # -1 for a row that holds no token
    slot_T: torch.Tensor
