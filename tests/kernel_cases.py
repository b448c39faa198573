"""One table of cases for all kernels, which the tests on a CPU and on a GPU share.

A kernel and its twin in torch are called alike. `CASES` makes their arguments, and
`assert_twins_agree` compares what they return and write.

Letters: T tokens, K experts a token, E experts, D hidden.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from gpu_fixtures import Poison, distance

from deepseek_moe.decode.decoder import FEW
from deepseek_moe.decode.int_quantizer import quantize
from deepseek_moe.kernels.decode import Place, torch_ops, triton_ops
from deepseek_moe.kernels.int_weights import Weight
from deepseek_moe.kernels.optimizer import torch_ops as optimizer_torch_ops
from deepseek_moe.kernels.optimizer import triton_ops as optimizer_triton_ops
from deepseek_moe.kernels.training import torch_ops as training_torch_ops
from deepseek_moe.kernels.training import triton_ops as training_triton_ops

OFFICIAL = {"hidden": 2048, "heads": 16, "kv_heads": 16, "head_dim": 128}
OFFICIAL |= {"experts": 64, "top_k": 6, "width": 1408}
PRUNED = ((1, 1), (7, 6), (24, 6), (40, 2))
"""Numbers of experts, and of those that a token uses, which a model may have after pruning."""
KERNELS_OF_FEW_TOKENS = {"experts_down", "experts_gate_up", "gate_up", "linear", "qkv", "route"}
"""Kernels of steps of up to FEW tokens, which are compiled for each number of tokens."""
ROOMS = (
    (triton_ops, torch_ops),
    (training_triton_ops, training_torch_ops),
    (optimizer_triton_ops, optimizer_torch_ops),
)
TWINS = {
    name: (kernel, getattr(plain, name))
    for fused, plain in ROOMS
    for name, kernel in vars(fused).items()
    if not name.startswith("_")
}
"""Each kernel and its twin in torch."""


@dataclass
class Case:
    """A call of a kernel and its twin, by its name in CASES. `bits` 8 and 4 are int8 and int4."""

    name: str
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
    eps: float = 1e-6

    def __str__(self) -> str:
        numbers = f"int{self.bits}" if self.bits < 16 else str(self.dtype).removeprefix("torch.")
        return f"{self.name}-{numbers}-{self.tokens}-{self.top_k} of {self.experts}"

    @cached_property
    def random(self) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(self.seed)

    def normal(self, *shape: int, std: float = 1.0) -> torch.Tensor:
        x = torch.randn(*shape, generator=self.random, device=self.device) * std
        return x.to(self.dtype)

    def integers(self, end: int, *shape: int) -> torch.Tensor:
        return torch.randint(end, shape, generator=self.random, device=self.device)

    def weight(self, *shape: int) -> Weight:
        x = self.normal(*shape, std=shape[-1] ** -0.5)
        return Weight(x) if self.bits == 16 else Weight(*quantize(x, self.bits), self.bits)

    @cached_property
    def position_T(self) -> torch.Tensor:
        position_T = self.integers(self.capacity, self.tokens).int()
        if self.tokens > 2:
            position_T[1] = -1
        return position_T

    @property
    def counters(self) -> torch.Tensor:
        return torch.zeros(4096, dtype=torch.int32, device=self.device)

    @property
    def cos_sin(self) -> tuple[torch.Tensor, torch.Tensor]:
        half = self.head_dim // 2
        rate = 10000.0 ** (-torch.arange(half, device=self.device) / half)
        angle = torch.arange(self.capacity, device=self.device)[:, None] * rate
        return angle.cos(), angle.sin()

    @property
    def place(self) -> Place:
        slots = self.tokens + 2
        slot_T = torch.randperm(slots, generator=self.random, device=self.device)[: self.tokens]
        shape = (slots, self.kv_heads, self.capacity, self.head_dim)
        return Place(self.normal(*shape), self.normal(*shape), self.position_T, slot_T.int())

    @property
    def routing(self) -> tuple[torch.Tensor, torch.Tensor]:
        logits_TE = self.normal(self.tokens, self.experts).float()
        return torch_ops.pick_experts(logits_TE, self.position_T, self.top_k, False)

    @property
    def places(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return torch_ops.sort_picks(self.routing[0], self.experts)

    @property
    def hidden_TD(self) -> torch.Tensor:
        return self.normal(self.tokens, self.hidden, std=2.0)

    @property
    def norm_D(self) -> torch.Tensor:
        return 1 + self.normal(self.hidden, std=0.2)

    @property
    def normed(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        return self.hidden_TD, self.norm_D, self.eps

    @property
    def qkv_rows(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    def queries(self, count: int) -> torch.Tensor:
        """As `rotate` gives them: a part of wider rows."""
        return self.normal(count, 3, self.heads * self.head_dim)[:, 1]


def _attend_prompt(c: Case) -> list[Any]:
    lengths, seen = [37, 1, 130][: c.tokens], [200, 3, 0][: c.tokens]
    ends = torch.tensor([0, *lengths], device=c.device).cumsum(0).int()
    last_B = torch.tensor(seen, device=c.device).int() + ends.diff() - 1
    slot_B = torch.arange(len(lengths), device=c.device).int()
    place = c.place._replace(position_T=last_B, slot_T=slot_B)
    return [c.queries(int(ends[-1])), place, ends, max(lengths)]


def _route(c: Case) -> list[Any]:
    """Hidden states whose logits are a ladder, so that rounding changes no choice."""
    gate_ED, norm_D = c.normal(c.experts, c.hidden, std=0.02), c.norm_D
    ladder_TE = torch.rand(c.tokens, c.experts, generator=c.random, device=c.device).argsort(-1)
    inverse_DE = torch.linalg.pinv(gate_ED.float() * norm_D.float())
    hidden_TD = ((ladder_TE - c.experts / 2) @ inverse_DE.T).to(c.dtype)
    picks = (c.position_T, c.top_k, c.seed % 2 == 0, c.counters)
    return [hidden_TD, norm_D, c.eps, gate_ED, c.weight(2 * 72, c.hidden), *picks]


def _experts_down(c: Case) -> list[Any]:
    act, shared_act = c.normal(c.tokens, c.top_k, c.width), c.normal(c.tokens, 2 * c.width)
    weight, shared = c.weight(c.experts, c.hidden, c.width), c.weight(c.hidden, 2 * c.width)
    return [act, shared_act, weight, shared, *c.routing, c.hidden_TD, c.counters]


def _advance(c: Case) -> list[Any]:
    new = c.integers(64, c.tokens)
    seen = torch.zeros(c.tokens, 64, dtype=torch.bool, device=c.device)
    return [new, new + 1, c.position_T, seen, c.capacity // 2]


def _combine(c: Case) -> list[Any]:
    index, weights = c.routing
    place = torch_ops.sort_picks(index, c.experts)[1]
    out = c.normal(c.tokens * c.top_k, c.hidden)
    return [out, place, weights, c.hidden_TD, c.hidden_TD, c.norm_D, c.eps]


def _weighted_swiglu(c: Case, width: int, low: bool) -> list[Any]:
    low_NF = c.normal(c.tokens, 2 * width) if low else None
    return [c.normal(c.tokens, 2 * width), low_NF, c.normal(c.tokens).float(), 0.0, None]


def _weighted_swiglu_backward(c: Case, width: int, low: bool) -> list[Any]:
    low_NF = c.normal(c.tokens, width) if low else None
    gate_up, weights = c.normal(c.tokens, 2 * width), c.normal(c.tokens).float()
    return [c.normal(c.tokens, width), low_NF, gate_up, weights, low, 0.0, None]


def _adamw(c: Case) -> list[Any]:
    shape = (c.tokens, 300 if c.seed % 2 else 512)  # Odd: the last block is shorter.
    blocks = -(-shape[0] * shape[1] // optimizer_torch_ops.ADAMW_BLOCK)
    state = {name: c.integers(256, *shape).to(torch.uint8) for name in ("m", "v")}
    state |= {name: c.normal(blocks).float().abs() for name in ("m_scale", "v_scale")}
    state["step"] = torch.tensor(1 + c.seed)
    options = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.999), "eps": 1e-8}
    return [c.normal(*shape).bfloat16(), c.normal(*shape).bfloat16(), state, options, c.seed]


def _sum_picks(c: Case) -> list[Any]:
    place = c.places[1]
    place = place.masked_fill(place == c.tokens, -1)  # A pick without a place.
    x = c.normal(c.tokens * c.top_k, c.hidden)
    return [x, x * 2 if c.seed % 2 else None, place]


def _unpack_4bit(c: Case, nested: bool) -> list[Any]:
    # One token: sizes that fill whole programs. More tokens: the last byte is half used, and there
    # is more than one scale of scales.
    shape = torch.Size((3, 128, 64) if c.tokens == 1 else (c.tokens, 127, 85))
    blocks = -(-shape.numel() // 64)
    code, code2, absmax2 = (c.normal(n).float() for n in (16, 256, -(-blocks // 256)))
    absmax = c.integers(256, blocks).to(torch.uint8)
    state = SimpleNamespace(
        shape=shape, dtype=c.dtype, code=code, absmax=absmax if nested else absmax.float(),
        blocksize=64, nested=nested, offset=c.normal(1).float()[0],
        state2=SimpleNamespace(code=code2, absmax=absmax2, blocksize=256),
    )  # fmt: skip
    return [c.integers(256, -(-shape.numel() // 2), 1).to(torch.uint8), state]


CASES: dict[str, Callable[[Case], list[Any]]] = {
    "adamw": _adamw,
    "add_norm": lambda c: [c.hidden_TD, c.hidden_TD, c.norm_D, c.eps],
    "add_norm:without residual": lambda c: [c.hidden_TD, None, c.norm_D, c.eps],
    "advance": _advance,
    "attend": lambda c: [c.queries(c.tokens), c.place, c.counters],
    "attend_prompt": _attend_prompt,
    "combine": _combine,
    "dense": lambda c: [c.hidden_TD, c.weight(80, c.hidden)],
    "experts_down": _experts_down,
    "experts_gate_up": lambda c: [
        c.hidden_TD, c.weight(c.experts, 2 * c.width, c.hidden), c.routing[0],
    ],
    "gate_up": lambda c: [*c.normed, c.weight(2 * 72, c.hidden)],
    "grouped_down": lambda c: [
        c.normal(c.tokens * c.top_k, c.width), c.weight(c.experts, c.hidden, c.width), c.places[2],
    ],
    "grouped_gate_up": lambda c: [
        c.hidden_TD, c.weight(c.experts, 2 * c.width, c.hidden), *c.places[::2],
    ],
    "linear": lambda c: [
        c.hidden_TD, c.weight(80, c.hidden), c.norm_D, c.eps, c.normal(c.tokens, 80),
    ],
    "linear:without norm": lambda c: [
        c.hidden_TD, c.weight(72, c.hidden), None, 0.0, None, torch.float32,
    ],
    "matrix": lambda c: [c.weight(c.experts, 24, c.hidden), c.dtype],
    "pick_experts": lambda c: [c.normal(c.tokens, c.experts).float(), c.position_T, c.top_k, True],
    "qkv": lambda c: [*c.normed, c.weight(c.qkv_rows, c.hidden), c.cos_sin, c.place],
    "rotate": lambda c: [c.normal(c.tokens, c.qkv_rows), c.cos_sin, c.place],
    "route": _route,
    "sort_picks": lambda c: [c.routing[0], c.experts],
    "sum_picks": _sum_picks,
    "swiglu": lambda c: [c.normal(c.tokens, 2 * 72)],
    "unpack_4bit": lambda c: _unpack_4bit(c, nested=True),
    "unpack_4bit:scales in fp32": lambda c: _unpack_4bit(c, nested=False),
    "drop_out": lambda c: [c.hidden_TD, 0.0, None],  # with dropout: tests/kernels
    "weighted_swiglu": lambda c: _weighted_swiglu(c, 72, low=True),
    "weighted_swiglu:without adapter": lambda c: _weighted_swiglu(c, c.width, low=False),
    "weighted_swiglu_backward": lambda c: _weighted_swiglu_backward(c, 72, low=True),
    "weighted_swiglu_backward:no adapter": lambda c: _weighted_swiglu_backward(c, c.width, False),
}  # fmt: skip
CASES_OF_EXPERTS = ("combine", "experts_down", "experts_gate_up", "grouped_down", "grouped_gate_up")
CASES_OF_EXPERTS += ("pick_experts", "route", "sort_picks", "sum_picks")
"""Cases in which the number of experts counts."""
DEFINED: dict[str, Callable[[Case, list[Any]], Any]] = {
    "experts_gate_up": lambda c, args: args[-1] < c.experts,  # not those of empty picks
    "grouped_down": lambda c, args: slice(int(args[-1][-1])),  # not places of no expert
    "grouped_gate_up": lambda c, args: slice(int(args[-1][-1])),
    "qkv": lambda c, args: c.position_T >= 0,  # not those without a token
    "rotate": lambda c, args: c.position_T >= 0,
}
"""The rows of a result that have a meaning, where they are not all."""


def small_cases() -> list[Case]:
    """What Triton's interpreter computes in seconds."""
    cases = [
        Case(name, tokens, bits, seed=tokens)
        for name in CASES
        for bits in ((16, 8, 4) if _has_weight(name) else (16,))
        for tokens in (1, 3)
    ]
    return cases + [
        Case(name, tokens, seed=tokens, hidden=64, width=32, experts=experts, top_k=top_k)
        for name in CASES_OF_EXPERTS
        for experts, top_k in PRUNED
        for tokens in (1, 3)
    ]


def official_cases() -> list[Case]:
    """What a GPU computes, in the sizes of the official model.

    They are smaller where the twin would copy too many whole matrices, or where what a kernel
    writes would be a small part of a large cache.
    """
    cases = []
    for name in CASES:
        kinds = [(16, torch.bfloat16), (16, torch.float16)]
        if name == "pick_experts":  # Its scores are fp32; rounded to 16 bits, many would be equal.
            kinds = [(16, torch.float32)]
        if _has_weight(name):
            kinds += [(8, torch.bfloat16), (4, torch.bfloat16)]
        tokens = (1, 2, FEW) if name.split(":")[0] in KERNELS_OF_FEW_TOKENS else (1, 2, 8, 40)
        if name.startswith("grouped"):
            tokens += (700,)  # So many go through the library.
        for (bits, dtype), T in ((kind, T) for kind in kinds for T in tokens):
            sizes = OFFICIAL | ({"capacity": 64} if name in ("qkv", "rotate") else {})
            if name.startswith(("experts_", "grouped_")) and T > 2:
                sizes |= {"hidden": 512, "width": 352}
            seed = T + bits // 8  # even and odd: with and without renormalised weights
            cases.append(Case(name, T, bits, dtype, "cuda", seed, **sizes))
    for name in CASES_OF_EXPERTS:
        dtype = torch.float32 if name == "pick_experts" else torch.bfloat16
        sizes = OFFICIAL | {"hidden": 512, "width": 352}
        for (E, K), T in ((pruned, T) for pruned in PRUNED for T in (1, FEW)):
            pruned = sizes | {"experts": E, "top_k": K}
            cases.append(Case(name, T, 16, dtype, "cuda", T, **pruned))
    return cases


def _has_weight(name: str) -> bool:
    return any(isinstance(arg, Weight) for arg in CASES[name](Case(name, tokens=1)))


def assert_twins_agree(case: Case, tolerance: float) -> None:
    """Compares all that a kernel and its twin return and write, by relative distance.

    Memory that neither writes holds NaN or -1, so that a place which a kernel forgets shows.
    """
    name = case.name.split(":")[0]
    args = CASES[case.name](case)
    copies = deepcopy(args)
    with Poison():
        ours, theirs = (op(*own) for op, own in zip(TWINS[name], (args, copies), strict=True))
    if name == "rotate":
        args[0] = copies[0]  # The kernel rotates in place, its twin does not.
    if name in DEFINED:
        rows = DEFINED[name](case, args)
        ours, theirs = ours[rows], theirs[rows]
    for x, y in zip(_tensors([ours, args]), _tensors([theirs, copies]), strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype, (name, x.shape, y.shape, x.dtype)
        apart = distance(x, y)
        most = 0.0 if name == "unpack_4bit" else tolerance
        assert apart <= most, f"{name}: relative distance {apart:.2g}"


def _tensors(x: Any) -> list[torch.Tensor]:
    if isinstance(x, torch.Tensor):
        return [x]
    parts = x.values() if isinstance(x, dict) else x if isinstance(x, list | tuple) else ()
    return [tensor for part in parts for tensor in _tensors(part)]
