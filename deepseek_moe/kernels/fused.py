"""The kernels under the names of their plain twins."""

from .adamw import adamw
from .attention import attend
from .between import add_norm, advance, combine, rotate, swiglu
from .experts import experts_down, experts_gate_up
from .gate import gate_up, route
from .grouped import dense, grouped_down, grouped_gate_up, matrix
from .linear import linear
from .prompt import attend_prompt
from .qkv import qkv
from .sort import choose, sort_picks
from .training import close_gates, open_gates, sum_picks
from .unpack import unpack_4bit

__all__ = [
    "adamw", "add_norm", "advance", "attend", "attend_prompt", "choose", "close_gates", "combine",
    "dense", "experts_down", "experts_gate_up", "gate_up", "grouped_down", "grouped_gate_up",
    "linear", "matrix", "open_gates", "qkv", "rotate", "route", "sort_picks", "sum_picks", "swiglu",
    "unpack_4bit",
]  # fmt: skip
