"""The kernels of a decoding step. The decoder is given `triton_ops`, or `torch_ops`, their twins.

In a step of few tokens a token meets qkv, attend_cache, linear, router and experts_few, and in the
end linear again, as the head. A step of many tokens leaves the products to the library
(experts_many) and fuses what stands between them (elementwise, dispatch). A prompt is attended to
by attend_prompt.
"""

from typing import NamedTuple

from torch import Tensor

CosSin = tuple[Tensor, Tensor]
"""cos and sin of each position's angles, fp32 [context, D / 2]."""


class Place(NamedTuple):
    """Where tokens stand in the cache of one layer."""

    keys: Tensor  # [slots, heads, capacity, D]
    values: Tensor
    position_T: Tensor  # -1 for a row that holds no token
    slot_T: Tensor
