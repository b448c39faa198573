"""The kernels of a training step, under the names of their twins in torch_ops.py."""

from ..dispatch import sort_picks
from .nf4 import unpack_4bit
from .weighted_swiglu import sum_picks, weighted_swiglu, weighted_swiglu_backward

__all__ = ["sort_picks", "sum_picks", "unpack_4bit", "weighted_swiglu", "weighted_swiglu_backward"]
