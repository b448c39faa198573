"""The kernels of a decoding step, under the names of their twins in torch_ops.py."""

# ruff: noqa: F401

from ..dispatch import sort_picks
from .attend_cache import attend
from .attend_prompt import attend_prompt
from .elementwise import add_norm, advance, combine, rotate, swiglu
from .experts_few import experts_down, experts_gate_up
from .experts_many import dense, grouped_down, grouped_gate_up, matrix
from .linear import linear
from .qkv import qkv
from .router import gate_up, pick_experts, route
