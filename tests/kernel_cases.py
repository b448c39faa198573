"""Inputs for every kernel, on any device: the kernel and its plain twin are called alike.

`CASES[name](case)` gives the arguments; `agree` calls both and compares all they return and write.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from deepseek_moe.decode.int_quantizer import quantize
from deepseek_moe.kernels.decode import torch_ops, triton_ops
from deepseek_moe.kernels.int_weights import Weight
from deepseek_moe.kernels.training import adamw, adamw_torch
from deepseek_moe.kernels.training import torch_ops as training_torch_ops
from deepseek_moe.kernels.training import triton_ops as training_triton_ops

TWINS = {
    name: (getattr(triton, name), getattr(torch_, name))
    for triton, torch_ in (
        (triton_ops, torch_ops),
        (training_triton_ops, training_torch_ops),
        (adamw, adamw_torch),
    )
    for name in triton.__all__
}
"""Each kernel and its plain twin."""


@dataclass
class Case:
    """Sizes, and where and of what numbers the tensors are."""

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
    empty_row: bool = True

    def __post_init__(self) -> None:
        self.random = torch.Generator(self.device).manual_seed(self.seed)
        self.eps = 1e-6
        self.slots = self.tokens + 2
        options = {"generator": self.random, "device": self.device}
        self.slot = torch.randperm(self.slots, **options)[: self.tokens].int()
        self.position = torch.randint(self.capacity, (self.tokens,), **options).int()
        if self.empty_row and self.tokens > 2:
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


def _linear_bare(c: Case) -> list[Any]:
    return [c.hidden_TD, c.weight(72, c.hidden), None, 0.0, None, torch.float32]


def _qkv(c: Case) -> list[Any]:
    weight = c.weight((c.heads + 2 * c.kv_heads) * c.head_dim, c.hidden)
    return [*c.normed, weight, c.cos_sin(), c.position, c.slot, c.cache(), c.heads]


def _attend(c: Case) -> list[Any]:
    q = c.normal(c.tokens, 3, c.heads * c.head_dim)[:, 1]  # `rotate` gives a part of wider rows
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


def _gate_up(c: Case) -> list[Any]:
    return [*c.normed, c.weight(2 * 72, c.hidden)]


def _experts_gate_up(c: Case) -> list[Any]:
    return [c.hidden_TD, c.weight(c.experts, 2 * c.width, c.hidden), c.routing()[0]]


def _experts_down(c: Case) -> list[Any]:
    act, shared_act = c.normal(c.tokens, c.top_k, c.width), c.normal(c.tokens, 2 * c.width)
    weight, shared = c.weight(c.experts, c.hidden, c.width), c.weight(c.hidden, 2 * c.width)
    return [act, shared_act, weight, shared, *c.routing(), c.hidden_TD, c.counters]


def _add_norm(c: Case) -> list[Any]:
    return [c.hidden_TD, c.hidden_TD, c.norm_D, c.eps]


def _advance(c: Case) -> list[Any]:
    new = torch.randint(64, (c.tokens,), generator=c.random, device=c.device)
    seen = torch.zeros(c.tokens, 64, dtype=torch.bool, device=c.device)
    return [new, new + 1, c.position, seen, c.capacity // 2]


def _norm_alone(c: Case) -> list[Any]:
    return [c.hidden_TD, None, c.norm_D, c.eps]


def _rotate(c: Case) -> list[Any]:
    qkv = c.normal(c.tokens, (c.heads + 2 * c.kv_heads) * c.head_dim)
    return [qkv, c.cos_sin(), c.position, c.slot, c.cache(), c.heads]


def _pick_experts(c: Case) -> list[Any]:
    return [c.normal(c.tokens, c.experts).float(), c.position, c.top_k, True]


def _sort_picks(c: Case) -> list[Any]:
    return [c.routing()[0], c.experts]


def _swiglu(c: Case) -> list[Any]:
    return [c.normal(c.tokens, 2 * 72)]


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


def _dense(c: Case) -> list[Any]:
    return [c.hidden_TD, c.weight(80, c.hidden)]


def _matrix(c: Case) -> list[Any]:
    return [c.weight(c.experts, 24, c.hidden), c.dtype]


def _weighted_swiglu(c: Case) -> list[Any]:
    gate_up = c.normal(c.tokens, 2 * 72)
    return [gate_up, c.normal(c.tokens, 2 * 72), c.normal(c.tokens).float(), 0.0, 0]


def _weighted_swiglu_alone(c: Case) -> list[Any]:
    return [c.normal(c.tokens, 2 * c.width), None, c.normal(c.tokens).float(), 0.0, 0]


def _weighted_swiglu_backward(c: Case) -> list[Any]:
    grads = c.normal(c.tokens, 72), c.normal(c.tokens, 72)
    return [*grads, c.normal(c.tokens, 2 * 72), c.normal(c.tokens).float(), True, 0.0, 0]


def _weighted_swiglu_backward_alone(c: Case) -> list[Any]:
    gate_up = c.normal(c.tokens, 2 * c.width)
    grad, weights = c.normal(c.tokens, c.width), c.normal(c.tokens).float()
    return [grad, None, gate_up, weights, False, 0.0, 0]


def _adamw(c: Case) -> list[Any]:
    shape = (c.tokens, 300 if c.seed % 2 else 512)  # the last block is shorter, or not
    blocks = -(-shape[0] * shape[1] // adamw_torch.ADAMW_BLOCK)
    weight, grad = c.normal(*shape).bfloat16(), c.normal(*shape).bfloat16()
    codes = torch.randint(256, (2, *shape), generator=c.random, device=c.device).to(torch.uint8)
    scales = c.normal(2, blocks).float().abs()
    return [weight, grad, *codes, *scales, 1e-2, 0.1, (0.9, 0.999), 1e-8, 1 + c.seed, c.seed]


def _sum_picks(c: Case) -> list[Any]:
    place = torch_ops.sort_picks(c.routing()[0], c.experts)[1]
    place = place.masked_fill(place == c.tokens, -1)  # one of no place, if there are some
    x = c.normal(c.tokens * c.top_k, c.hidden)
    return [x, x * 2 if c.seed % 2 else None, place]


def _unpack_4bit(c: Case) -> list[Any]:
    # Whole programs, or not even whole bytes; more than one scale of scales.
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
    "add_norm": _add_norm,
    "add_norm:without residual": _norm_alone,
    "advance": _advance,
    "attend": _attend,
    "attend_prompt": _attend_prompt,
    "pick_experts": _pick_experts,
    "weighted_swiglu_backward": _weighted_swiglu_backward,
    "weighted_swiglu_backward:without adapter": _weighted_swiglu_backward_alone,
    "combine": _combine,
    "dense": _dense,
    "experts_down": _experts_down,
    "experts_gate_up": _experts_gate_up,
    "gate_up": _gate_up,
    "grouped_down": _grouped_down,
    "grouped_gate_up": _grouped_gate_up,
    "linear": _linear,
    "linear:without norm": _linear_bare,
    "matrix": _matrix,
    "weighted_swiglu": _weighted_swiglu,
    "weighted_swiglu:without adapter": _weighted_swiglu_alone,
    "qkv": _qkv,
    "rotate": _rotate,
    "route": _route,
    "sort_picks": _sort_picks,
    "sum_picks": _sum_picks,
    "swiglu": _swiglu,
    "unpack_4bit": _unpack_4bit,
    "unpack_4bit:scales in fp32": _unpack_4bit_alone,
}


def agree(name: str, case: Case, tolerance: float) -> float:
    """The largest relative distance between what the kernel and its twin return and write."""
    args = CASES[name](case)
    name = name.split(":")[0]
    copies = [_copy(arg) for arg in args]
    kernel, plain = TWINS[name]
    ours, theirs = kernel(*args), plain(*copies)
    if name == "experts_gate_up":  # rows of picks of no expert mean nothing
        real = args[-1] < case.experts
        ours, theirs = ours[real], theirs[real]
    if name.startswith("grouped"):  # places of no expert
        ours, theirs = (out[: args[-1][-1]] for out in (ours, theirs))
    if name == "qkv":
        ours, theirs = ours[case.position >= 0], theirs[case.position >= 0]
    if name == "rotate":  # rows without a token are left as they are
        ours, theirs = (out[case.position >= 0] for out in (ours, theirs))
    if name == "route":  # the picks may stand in another order
        ours, theirs = ((x, act, *_sorted(i, w)) for x, act, i, w in (ours, theirs))
    tolerance = 0.0 if name == "unpack_4bit" else tolerance
    worst = 0.0
    for x, y in zip(_tensors([ours, args]), _tensors([theirs, copies]), strict=True):
        if name == "rotate" and x.shape == y.shape == args[0].shape:
            continue  # rotated in place by the kernel, not by its twin
        distance = (x.double() - y.double()).norm() / y.double().norm().clamp(min=1e-12)
        assert x.shape == y.shape and x.dtype == y.dtype, (name, x.shape, y.shape, x.dtype)
        assert distance <= tolerance, f"{name}: relative distance {distance:.2g}"
        worst = max(worst, distance.item())
    return worst


def _sorted(index_TK: torch.Tensor, weights_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    index_TK, order_TK = index_TK.sort(dim=-1)
    return index_TK, weights_TK.gather(-1, order_TK)


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
