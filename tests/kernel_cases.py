"""One table of cases for all kernels, which the tests on a CPU and on a GPU share.

A kernel and its twin in torch are called alike. `CASES[name](case)` gives their arguments, and
`assert_twins_agree` calls both and compares what they return and write.

Letters: T tokens, K experts a token, E experts, D hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from gpu_fixtures import Poison, distance

from deepseek_moe.decode.decoder import FEW
from deepseek_moe.decode.int_quantizer import quantize
from deepseek_moe.kernels.decode import torch_ops, triton_ops
from deepseek_moe.kernels.int_weights import Weight
from deepseek_moe.kernels.training import adamw, adamw_torch
from deepseek_moe.kernels.training import torch_ops as training_torch_ops
from deepseek_moe.kernels.training import triton_ops as training_triton_ops

OFFICIAL = {"hidden": 2048, "heads": 16, "kv_heads": 16, "head_dim": 128}
OFFICIAL |= {"experts": 64, "top_k": 6, "width": 1408}
KERNELS_OF_FEW_TOKENS = {"experts_down", "experts_gate_up", "gate_up", "linear", "qkv", "route"}
"""Kernels of steps of up to FEW tokens, which are compiled for each number of tokens."""
TWINS = {
    name: (getattr(triton, name), getattr(torch_, name))
    for triton, torch_ in (
        (triton_ops, torch_ops),
        (training_triton_ops, training_torch_ops),
        (adamw, adamw_torch),
    )
    for name in triton.__all__
}
"""Each kernel and its twin in torch."""


@dataclass
class Case:
    """Sizes, device and dtype of the tensors that `CASES` makes."""

    tokens: int
    bits: int = 16
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    seed: int = 0
    hidden: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    experts: int = 6
    top_k: int = 3
    width: int = 64
    capacity: int = 1024

    def __post_init__(self) -> None:
        self.random = torch.Generator(self.device).manual_seed(self.seed)
        self.eps = 1e-6
        self.slots = self.tokens + 2
        options = {"generator": self.random, "device": self.device}
        self.slot = torch.randperm(self.slots, **options)[: self.tokens].int()
        self.position = torch.randint(self.capacity, (self.tokens,), **options).int()
        if self.tokens > 2:
            self.position[1] = -1
        self.counters = torch.zeros(4096, dtype=torch.int32, device=self.device)

    def normal(self, *shape: int, std: float = 1.0) -> torch.Tensor:
        x = torch.randn(*shape, generator=self.random, device=self.device) * std
        return x.to(self.dtype)

    def weight(self, *shape: int) -> Weight:
        x = self.normal(*shape, std=shape[-1] ** -0.5)
        return Weight(x) if self.bits == 16 else Weight(*quantize(x, self.bits), self.bits)

    def cos_sin(self) -> tuple[torch.Tensor, torch.Tensor]:
        half = self.head_dim // 2
        rate = 10000.0 ** (-torch.arange(half, device=self.device) / half)
        angle = torch.arange(self.capacity, device=self.device)[:, None] * rate
        return angle.cos().float().contiguous(), angle.sin().float().contiguous()

    def cache(self) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (self.slots, self.kv_heads, self.capacity, self.head_dim)
        return self.normal(*shape), self.normal(*shape)

    def routing(self) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.normal(self.tokens, self.experts).float()
        return torch_ops.pick_experts(logits, self.position, self.top_k, False)

    @property
    def hidden_TD(self) -> torch.Tensor:
        return self.normal(self.tokens, self.hidden, std=2.0)

    @property
    def norm_D(self) -> torch.Tensor:
        return 1 + self.normal(self.hidden, std=0.2)

    @property
    def normed(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        return self.hidden_TD, self.norm_D, self.eps


def _linear(c: Case) -> list[Any]:
    residual = c.normal(c.tokens, 80)
    return [c.hidden_TD, c.weight(80, c.hidden), c.norm_D, c.eps, residual]


def _qkv(c: Case) -> list[Any]:
    weight = c.weight((c.heads + 2 * c.kv_heads) * c.head_dim, c.hidden)
    return [*c.normed, weight, c.cos_sin(), c.position, c.slot, c.cache(), c.heads]


def _attend(c: Case) -> list[Any]:
    q = c.normal(c.tokens, 3, c.heads * c.head_dim)[
        :, 1
    ]  # As `rotate` gives it: a part of wider rows.
    return [q, c.cache(), c.position, c.slot, c.head_dim**-0.5, c.counters]


def _attend_prompt(c: Case) -> list[Any]:
    lengths = [37, 1, 130][: c.tokens]
    ends = torch.tensor([0, *lengths], device=c.device).cumsum(0).int()
    seen = [200, 3, 0][: c.tokens]
    last = torch.tensor(seen, device=c.device).int() + ends.diff() - 1
    q = c.normal(int(ends[-1]), 3, c.heads * c.head_dim)[:, 1]
    slot = torch.arange(len(lengths), device=c.device).int()
    return [q, c.cache(), ends, last, slot, max(lengths), c.head_dim**-0.5]


def _route(c: Case) -> list[Any]:
    gate, shared = c.normal(c.experts, c.hidden, std=0.1), c.weight(2 * 72, c.hidden)
    return [*c.normed, gate, shared, c.position, c.top_k, c.seed % 2 == 0, c.counters]


def _experts_down(c: Case) -> list[Any]:
    act, shared_act = c.normal(c.tokens, c.top_k, c.width), c.normal(c.tokens, 2 * c.width)
    weight, shared = c.weight(c.experts, c.hidden, c.width), c.weight(c.hidden, 2 * c.width)
    return [act, shared_act, weight, shared, *c.routing(), c.hidden_TD, c.counters]


def _advance(c: Case) -> list[Any]:
    new = torch.randint(64, (c.tokens,), generator=c.random, device=c.device)
    seen = torch.zeros(c.tokens, 64, dtype=torch.bool, device=c.device)
    return [new, new + 1, c.position, seen, c.capacity // 2]


def _rotate(c: Case) -> list[Any]:
    qkv = c.normal(c.tokens, (c.heads + 2 * c.kv_heads) * c.head_dim)
    return [qkv, c.cos_sin(), c.position, c.slot, c.cache(), c.heads]


def _combine(c: Case) -> list[Any]:
    index, weights = c.routing()
    place = torch_ops.sort_picks(index, c.experts)[1]
    out = c.normal(c.tokens * c.top_k, c.hidden)
    return [out, place, weights, c.hidden_TD, c.hidden_TD, c.norm_D, c.eps]


def _grouped_gate_up(c: Case) -> list[Any]:
    token, _, ends = torch_ops.sort_picks(c.routing()[0], c.experts)
    return [c.hidden_TD, c.weight(c.experts, 2 * c.width, c.hidden), token, ends]


def _grouped_down(c: Case) -> list[Any]:
    ends = torch_ops.sort_picks(c.routing()[0], c.experts)[2]
    x = c.normal(c.tokens * c.top_k, c.width)
    return [x, c.weight(c.experts, c.hidden, c.width), ends]


def _weighted_swiglu(c: Case) -> list[Any]:
    gate_up = c.normal(c.tokens, 2 * 72)
    return [gate_up, c.normal(c.tokens, 2 * 72), c.normal(c.tokens).float(), 0.0, 0]


def _weighted_swiglu_backward(c: Case) -> list[Any]:
    grads = c.normal(c.tokens, 72), c.normal(c.tokens, 72)
    return [*grads, c.normal(c.tokens, 2 * 72), c.normal(c.tokens).float(), True, 0.0, 0]


def _weighted_swiglu_backward_alone(c: Case) -> list[Any]:
    gate_up = c.normal(c.tokens, 2 * c.width)
    grad, weights = c.normal(c.tokens, c.width), c.normal(c.tokens).float()
    return [grad, None, gate_up, weights, False, 0.0, 0]


def _adamw(c: Case) -> list[Any]:
    shape = (c.tokens, 300 if c.seed % 2 else 512)  # Odd: the last block is shorter.
    blocks = -(-shape[0] * shape[1] // adamw_torch.ADAMW_BLOCK)
    weight, grad = c.normal(*shape).bfloat16(), c.normal(*shape).bfloat16()
    codes = torch.randint(256, (2, *shape), generator=c.random, device=c.device).to(torch.uint8)
    scales = c.normal(2, blocks).float().abs()
    return [weight, grad, *codes, *scales, 1e-2, 0.1, (0.9, 0.999), 1e-8, 1 + c.seed, c.seed]


def _sum_picks(c: Case) -> list[Any]:
    place = torch_ops.sort_picks(c.routing()[0], c.experts)[1]
    place = place.masked_fill(place == c.tokens, -1)  # A pick without a place.
    x = c.normal(c.tokens * c.top_k, c.hidden)
    return [x, x * 2 if c.seed % 2 else None, place]


def _unpack_4bit(c: Case) -> list[Any]:
    # One token: sizes that fill whole programs. More tokens: the last byte is half used, and there
    # is more than one scale of scales.
    shape = torch.Size((3, 128, 64) if c.tokens == 1 else (c.tokens, 127, 85))
    blocks, options = -(-shape.numel() // 64), {"generator": c.random, "device": c.device}
    packed = torch.randint(256, (-(-shape.numel() // 2), 1), **options).to(torch.uint8)
    absmax = torch.randint(256, (blocks,), **options).to(torch.uint8)
    code, code2, absmax2 = (c.normal(n).float() for n in (16, 256, -(-blocks // 256)))
    return [packed, code, absmax, code2, absmax2, c.normal(1).float()[0], shape, c.dtype]


def _unpack_4bit_alone(c: Case) -> list[Any]:
    packed, code, absmax, *_, shape, dtype = _unpack_4bit(c)
    return [packed, code, absmax.float(), None, None, None, shape, dtype]


CASES: dict[str, Callable[[Case], list[Any]]] = {
    "adamw": _adamw,
    "add_norm": lambda c: [c.hidden_TD, c.hidden_TD, c.norm_D, c.eps],
    "add_norm:without residual": lambda c: [c.hidden_TD, None, c.norm_D, c.eps],
    "advance": _advance,
    "attend": _attend,
    "attend_prompt": _attend_prompt,
    "pick_experts": lambda c: [c.normal(c.tokens, c.experts).float(), c.position, c.top_k, True],
    "weighted_swiglu_backward": _weighted_swiglu_backward,
    "weighted_swiglu_backward:without adapter": _weighted_swiglu_backward_alone,
    "combine": _combine,
    "dense": lambda c: [c.hidden_TD, c.weight(80, c.hidden)],
    "experts_down": _experts_down,
    "experts_gate_up": lambda c: [
        c.hidden_TD,
        c.weight(c.experts, 2 * c.width, c.hidden),
        c.routing()[0],
    ],
    "gate_up": lambda c: [*c.normed, c.weight(2 * 72, c.hidden)],
    "grouped_down": _grouped_down,
    "grouped_gate_up": _grouped_gate_up,
    "linear": _linear,
    "linear:without norm": lambda c: [
        c.hidden_TD,
        c.weight(72, c.hidden),
        None,
        0.0,
        None,
        torch.float32,
    ],
    "matrix": lambda c: [c.weight(c.experts, 24, c.hidden), c.dtype],
    "weighted_swiglu": _weighted_swiglu,
    "weighted_swiglu:without adapter": lambda c: [
        c.normal(c.tokens, 2 * c.width),
        None,
        c.normal(c.tokens).float(),
        0.0,
        0,
    ],
    "qkv": _qkv,
    "rotate": _rotate,
    "route": _route,
    "sort_picks": lambda c: [c.routing()[0], c.experts],
    "sum_picks": _sum_picks,
    "swiglu": lambda c: [c.normal(c.tokens, 2 * 72)],
    "unpack_4bit": _unpack_4bit,
    "unpack_4bit:scales in fp32": _unpack_4bit_alone,
}


class Run(NamedTuple):
    """One call of a kernel and its twin: `bits` 8 and 4 are int8 and int4 weights."""

    name: str
    tokens: int
    dtype: torch.dtype
    bits: int = 16

    def __str__(self) -> str:
        numbers = f"int{self.bits}" if self.bits < 16 else str(self.dtype).removeprefix("torch.")
        return f"{self.name}-{numbers}-{self.tokens}"


def small_runs() -> list[Run]:
    """What Triton's interpreter computes in seconds."""
    return [
        Run(name, tokens, torch.float32, bits)
        for name in sorted(CASES)
        for bits in ((16, 8, 4) if _has_weight(name) else (16,))
        for tokens in (1, 3)
    ]


def official_runs() -> list[Run]:
    """What a GPU computes, in the sizes of `official_case`."""
    runs = []
    for name in sorted(CASES):
        kinds = [(16, torch.bfloat16), (16, torch.float16)]
        if name == "pick_experts":  # Its scores are fp32; rounded to 16 bits, many would be equal.
            kinds = [(16, torch.float32)]
        if _has_weight(name):
            kinds += [(8, torch.bfloat16), (4, torch.bfloat16)]
        tokens = (1, 2, FEW) if name.split(":")[0] in KERNELS_OF_FEW_TOKENS else (1, 2, 8, 40)
        if name.startswith("grouped"):
            tokens += (700,)  # So many go through the library.
        runs += [Run(name, T, dtype, bits) for bits, dtype in kinds for T in tokens]
    return runs


def official_case(run: Run, device: torch.device) -> Case:
    """Sizes of the official model.

    They are smaller where the twin would copy too many whole matrices, or where what a kernel
    writes would be a small part of a large cache.
    """
    sizes = OFFICIAL
    if run.name in ("qkv", "rotate"):
        sizes = OFFICIAL | {"capacity": 64}
    elif run.name.startswith(("experts_", "grouped_")) and run.tokens > 2:
        sizes = OFFICIAL | {"hidden": 512, "width": 352}
    seed = run.tokens + run.bits // 8  # even and odd: with and without renormalised weights
    return Case(run.tokens, run.bits, run.dtype, str(device), seed, **sizes)


def _has_weight(name: str) -> bool:
    return any(isinstance(arg, Weight) for arg in CASES[name](Case(tokens=1)))


def assert_twins_agree(name: str, case: Case, tolerance: float) -> None:
    """Compares all that a kernel and its twin return and write, by relative distance.

    Memory that neither writes holds NaN or -1, so that a place which a kernel forgets shows.
    """
    with Poison():
        args = CASES[name](case)
        copies = [_copy(arg) for arg in args]
        kernel, plain = TWINS[name.split(":")[0]]
        ours, theirs = _defined(name, case, args, kernel(*args), plain(*copies))
    tolerance = 0.0 if name.startswith("unpack_4bit") else tolerance
    for x, y in zip(_tensors([ours, args]), _tensors([theirs, copies]), strict=True):
        if name == "rotate" and x.shape == y.shape == args[0].shape:
            continue  # The kernel rotates in place, its twin does not.
        assert x.shape == y.shape and x.dtype == y.dtype, (name, x.shape, y.shape, x.dtype)
        apart = distance(x, y)
        assert apart <= tolerance, f"{name}: relative distance {apart:.2g}"


def _defined(name: str, case: Case, args: list[Any], ours: Any, theirs: Any) -> tuple[Any, Any]:
    """The parts of both results that have a meaning."""
    if name == "route":
        return _clear_picks(case, args, ours, theirs)
    if name == "experts_gate_up":  # Rows of empty picks are undefined.
        rows: Any = args[-1] < case.experts
    elif name.startswith("grouped"):  # Places of no expert are undefined.
        rows = slice(int(args[-1][-1]))
    elif name in ("qkv", "rotate"):  # Rows without a token are undefined.
        rows = case.position >= 0
    else:
        return ours, theirs
    if isinstance(ours, torch.Tensor):
        return ours[rows], theirs[rows]
    return tuple(x[rows] for x in ours), tuple(y[rows] for y in theirs)


def _clear_picks(case: Case, args: list[Any], ours: Any, theirs: Any) -> tuple[Any, Any]:
    """Results of `route`, the picks of each token sorted.

    In 16 bits the picks of a token are left out whose last expert is ahead of the next one by no
    more than rounding: there the twins may differ.
    """
    hidden_TD, norm_D, eps, gate_ED, _, position_T = args[:6]
    logits_TE = torch_ops.linear(hidden_TD, Weight(gate_ED), norm_D, eps, dtype=torch.float32)
    top_TK = logits_TE.topk(case.top_k + 1, dim=-1).values
    margin = 0.0 if case.dtype == torch.float32 else 0.01 * logits_TE.std(correction=0)
    clear_T = (top_TK[:, -2] - top_TK[:, -1] > margin) | (position_T < 0)
    enough = case.tokens < 8 or clear_T.float().mean() >= 0.5
    assert enough, f"only {int(clear_T.sum())} of {case.tokens} tokens have favourites"
    found = []
    for *others, index_TK, weights_TK in (ours, theirs):
        index_TK, order_TK = index_TK[clear_T].sort(dim=-1)
        found.append((*others, index_TK, weights_TK[clear_T].gather(-1, order_TK)))
    return found[0], found[1]


def _copy(arg: Any) -> Any:
    if isinstance(arg, torch.Tensor):
        return arg.clone()
    if isinstance(arg, Weight):
        return Weight(*map(_copy, arg))
    return type(arg)(map(_copy, arg)) if isinstance(arg, tuple) else arg


def _tensors(x: Any) -> list[torch.Tensor]:
    if isinstance(x, torch.Tensor):
        return [x]
    return [t for part in x for t in _tensors(part)] if isinstance(x, list | tuple) else []
