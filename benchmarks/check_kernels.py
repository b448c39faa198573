"""Kernels, and the experts in training, against their plain twins on a GPU: a part of check_gpu.py.

Letters: T tokens, K experts a token, E experts, D hidden, O out, I in, R rank.
"""

import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from deepseek_moe.decoder import FEW
from deepseek_moe.experts import LowRank, _fused_forward, grouped_experts_forward
from deepseek_moe.kernels import plain
from deepseek_moe.kernels.weight import Weight
from deepseek_moe.quantization import Quantization, dequantize

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))  # of kernel_cases

TOLERANCE = 1e-2  # relative distance of outputs that are rounded to 16 bits
OFFICIAL = {"hidden": 2048, "heads": 16, "kv_heads": 16, "head_dim": 128}
OFFICIAL |= {"experts": 64, "top_k": 6, "width": 1408}
NARROW = OFFICIAL | {"hidden": 512, "width": 352}
GRADIENTS = 2e-2  # relative distance of gradients in bf16, and
WORSE = 1.5  # times the plain way's
ROUTINGS = ("uniform", "half of the picks on 8 experts", "8 experts without tokens")
KINDS = ("all weights", "adapters over bf16", "adapters over nf4")
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


def fused_experts_checks(device: torch.device) -> Iterator[Group]:
    """On a CPU small ones, interpreted."""
    names = {f"fused experts in training, {kind}": kind for kind in KINDS}
    checks = [(name, partial(check_fused_experts, kind, device)) for name, kind in names.items()]
    yield Group(checks, gigabytes=20)


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

    from deepseek_moe.kernels import fused

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


def check_fused_experts(kind: str, device: torch.device) -> str:
    """The output and every gradient, in bf16, beside the plain way in fp32 and in bf16. (On a CPU
    in fp32: Triton's interpreter cannot add in bf16.)"""
    from deepseek_moe.kernels import fused

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    training, worst, where = Training(kind, device), -1.0, ""
    for routing in ROUTINGS:
        index_TK = training.picks(routing)
        exact = training.run(grouped_experts_forward, torch.float32, index_TK)
        theirs = training.run(grouped_experts_forward, dtype, index_TK)
        for recompute in (False, True):
            forward = partial(_fused_forward, dtype=dtype, ops=fused)
            ours, again = (training.run(forward, dtype, index_TK, recompute) for _ in range(2))
            for name, wanted in exact.items():
                at = f"{name}, {routing}, recompute {recompute}"
                mine, plain_way = distance(ours[name], wanted), distance(theirs[name], wanted)
                if not mine <= min(GRADIENTS, WORSE * plain_way + 1e-5):
                    raise RuntimeError(f"{at}: {mine:.2g} from fp32, the plain way {plain_way:.2g}")
                if not torch.equal(ours[name], again[name]):
                    raise RuntimeError(f"{at}: another run gives other numbers")
                worst, where = max((worst, where), (mine, at))
    return f"within {worst:.2g} ({where}), twice bit for bit"


class Training:
    """Experts, adapters and inputs whose numbers are the same in bf16 and fp32."""

    def __init__(self, kind: str, device: torch.device) -> None:
        self.random, self.kind = torch.Generator(device).manual_seed(0), kind
        self.tokens, (self.E, self.D, width) = 512, (64, 2048, 1408)
        if device.type != "cuda":
            self.tokens, (self.E, self.D, width) = 40, (16, 64, 64)
        self.K, self.rank = (6, 64) if device.type == "cuda" else (3, 8)
        shapes = {"gate_up_proj": (2 * width, self.D), "down_proj": (self.D, width)}
        self.stacks = {n: self.normal(self.E, *s, std=s[1] ** -0.5) for n, s in shapes.items()}
        if kind.endswith("nf4"):
            self.stacks = {n: Quantization(4).quantize(x) for n, x in self.stacks.items()}
        self.factors = {}
        for n, (O, I) in shapes.items() if kind.startswith("adapters") else ():  # noqa: E741
            a_ERI, b_ERO = self.normal(self.E, self.rank, I), self.normal(self.E, self.rank, O)
            self.factors[n] = (a_ERI * I**-0.5, b_ERO * self.rank**-0.5)
        self.hidden_TD, self.probe_TD = (self.normal(self.tokens, self.D) for _ in range(2))
        scores_TK = torch.rand(self.tokens, self.K, generator=self.random, device=device)
        self.weights_TK = scores_TK.bfloat16().float()

    def normal(self, *shape: int, std: float = 1.0) -> torch.Tensor:
        options = {"generator": self.random, "device": self.random.device}
        return (torch.randn(*shape, **options) * std).bfloat16()

    def picks(self, routing: str) -> torch.Tensor:
        """[T, K], each token's all different."""
        options = {"generator": self.random, "device": self.random.device}
        scores_TE = torch.rand(self.tokens, self.E, **options)
        if routing.startswith("half"):
            half = self.K // 2
            few_TK = scores_TE[:, :8].topk(half).indices
            many_TK = scores_TE[:, 8:].topk(self.K - half).indices + 8
            return torch.cat([few_TK, many_TK], dim=1)
        if routing.endswith("without tokens"):  # the first, the last, and some between
            scores_TE[:, [0, 1, self.E // 2, -6, -4, -3, -2, -1]] = -1.0
        return scores_TE.topk(self.K).indices

    def run(
        self, forward: Any, dtype: torch.dtype, index_TK: torch.Tensor, recompute: bool = False
    ) -> dict[str, torch.Tensor]:
        """The output, and the gradients of all that can have one."""
        # `act_fn` is a function: for the module, grouped_experts_forward would take the fused way.
        experts = SimpleNamespace(num_experts=self.E, act_fn=F.silu, recompute=recompute)
        leaves = {"hidden": self.leaf(self.hidden_TD, dtype), "weights": self.leaf(self.weights_TK)}
        for name, stack in self.stacks.items():
            if self.kind == "all weights":
                leaves[name] = stack = self.leaf(stack, dtype)
            elif dtype == torch.float32:  # what it is in bf16
                stack = dequantize(stack, torch.bfloat16).float()
            setattr(experts, name, stack)
        adapters = {}
        for name, factors in self.factors.items():
            leaves[f"{name} A"], leaves[f"{name} B"] = a, b = [self.leaf(x) for x in factors]
            adapters[name] = [LowRank(a, b, 0.0)]
        out_TD = forward(experts, leaves["hidden"], index_TK, leaves["weights"], adapters)
        grads = torch.autograd.grad(out_TD, list(leaves.values()), self.probe_TD.to(out_TD.dtype))
        return {"output": out_TD.detach(), **dict(zip(leaves, grads, strict=True))}

    @staticmethod
    def leaf(x: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return x.detach().to(dtype).clone().requires_grad_()
