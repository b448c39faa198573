"""The kernels of fine-tuning, under the names of their twins in torch_ops.py."""

# ruff: noqa: F401

from ..dispatch import sort_picks
from .dropout import drop_out
from .nf4 import unpack_4bit
from .weighted_swiglu import sum_picks, weighted_swiglu, weighted_swiglu_backward
