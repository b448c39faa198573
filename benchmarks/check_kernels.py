"""Kernels against their plain twins on a GPU: a part of check_gpu.py.

Letters: T tokens, K experts a token, E experts, D hidden, O out, I in, R rank.
"""

import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from deepseek_moe.decode.decoder import FEW
from deepseek_moe.kernels.decode import torch_ops as plain
from deepseek_moe.kernels.int_weights import Weight

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))  # of kernel_cases

TOLERANCE = 1e-2  # relative distance of outputs that are rounded to 16 bits
OFFICIAL = {"hidden": 2048, "heads": 16, "kv_heads": 16, "head_dim": 128}
OFFICIAL |= {"experts": 64, "top_k": 6, "width": 1408}
NARROW = OFFICIAL | {"hidden": 512, "width": 352}
OF_FEW = ("experts_down", "experts_gate_up", "gate_up", "linear", "qkv", "route")
"""Kernels of steps of up to FEW tokens, which are compiled for each number of tokens."""
Check = tuple[str, Callable[[], str]]
"""A name, and a function that returns a remark or raises."""


class Group(NamedTuple):
    """Checks that one process makes, one after the other."""

    checks: list[Check]
    gigabytes: int = 3  # of the GPU's memory, at most


def kernel_checks(device: torch.device) -> Iterator[Group]:
    """A kernel each; last those that take long to compile. On a CPU small ones, interpreted."""
    from kernel_cases import CASES

    for name in sorted(CASES, key=lambda name: (is_of_few(name), name)):
        check = (f"kernel {name}", partial(check_kernel, name, device))
        yield Group([check], gigabytes=8 if name.startswith(("experts_", "grouped_")) else 3)


def check_kernel(name: str, device: torch.device) -> str:
    """With all kinds of weights and numbers of tokens."""
    from kernel_cases import CASES, Case, agree

    on_gpu = device.type == "cuda"
    has_weight = any(isinstance(arg, Weight) for arg in CASES[name](Case(tokens=1)))
    dtypes = (torch.bfloat16, torch.float16) if on_gpu else (torch.float32,)
    kinds = [(16, dtype) for dtype in dtypes] + [(bits, dtypes[0]) for bits in (8, 4) if has_weight]
    tokens = ((1, 2, FEW) if is_of_few(name) else (1, 2, 8, 40)) if on_gpu else (1, 3)
    if on_gpu and name.startswith("grouped"):
        tokens += (700,)  # so many go through the library
    compare = routes_agree if name == "route" else partial(agree, name, tolerance=TOLERANCE)
    worst, where = -1.0, ""
    for bits, dtype in kinds:
        # The router's logits are fp32: rounded to 16 bits, many would be equal.
        dtype = torch.float32 if name == "choose" else dtype
        for T in tokens:
            seed = T + bits // 8  # even and odd: with and without renormalised weights
            case = Case(T, bits, dtype, str(device), seed, **(sizes(name, T) if on_gpu else {}))
            at = f"{bits} bits, {str(dtype).removeprefix('torch.')}, {T} tokens"
            try:
                with Poison():
                    distance = compare(case)
            except Exception as error:
                raise RuntimeError(f"{at}: {type(error).__name__} {error}") from error
            worst, where = max((worst, where), (distance, at))
    return f"within {worst:.2g} ({where})"


def is_of_few(name: str) -> bool:
    return name.split(":")[0] in OF_FEW


def sizes(name: str, tokens: int) -> dict[str, int]:
    """Fields of the case: those of the official model, except where the plain twin would copy too
    many whole matrices, or what a kernel writes would be a small part of a large cache."""
    if name in ("qkv", "rotate"):
        return OFFICIAL | {"capacity": 64}
    return NARROW if name.startswith(("experts_", "grouped_")) and tokens > 2 else OFFICIAL


def routes_agree(case: Any) -> float:
    """The largest distance in what `route` returns, without the picks of tokens whose last expert
    is ahead of the next by no more than rounding: there the twins may differ."""
    from kernel_cases import CASES

    from deepseek_moe.kernels.decode import triton_ops as fused

    args = CASES["route"](case)
    hidden_TD, norm_D, eps, gate_ED, _, position_T = args[:6]
    (*ours, index_TK, weights_TK), (*theirs, twin_TK, twin_weights_TK) = (
        fused.route(*args),
        plain.route(*args),
    )
    logits_TE = plain.linear(hidden_TD, Weight(gate_ED), norm_D, eps, dtype=torch.float32)
    top_TK = logits_TE.topk(case.top_k + 1, dim=-1).values
    clear_T = (top_TK[:, -2] - top_TK[:, -1] > 0.01 * logits_TE.std()) | (position_T < 0)
    if case.tokens >= 8 and clear_T.float().mean() < 0.5:
        raise RuntimeError(f"only {int(clear_T.sum())} of {case.tokens} tokens have favourites")
    index_TK, order_TK = index_TK[clear_T].sort(dim=-1)
    twin_TK, twin_order_TK = twin_TK[clear_T].sort(dim=-1)
    ours += [index_TK, weights_TK[clear_T].gather(-1, order_TK)]
    theirs += [twin_TK, twin_weights_TK[clear_T].gather(-1, twin_order_TK)]
    distances = [distance(x, y) for x, y in zip(ours, theirs, strict=True)]
    if not max(distances) <= TOLERANCE:
        raise RuntimeError(f"norm, shared experts, picks, weights are {distances} apart")
    return max(distances)


def distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """Relative to y."""
    x, y = x.double(), y.double()
    return ((x - y).norm() / y.norm().clamp(min=1e-12)).item()


class Poison(TorchDispatchMode):
    """Within it, new tensors hold NaN or -1 until they are written: what a kernel forgets shows,
    whatever the memory held before."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._schema.name in ("aten::empty", "aten::new_empty", "aten::empty_like"):
            out.fill_(math.nan if out.is_floating_point() else -1)
        return out
