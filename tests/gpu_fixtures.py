"""What the tests of kernels and of the engine share: a model with two ways through it, and how
results of the two are compared.

Greedy ids may differ where two logits are so close that rounding swaps them, and then everything
after them differs. So the plain way is given the ids that the engine made, and must find each of
them the likeliest, or nearly so.

Letters: N steps, B sequences, V vocabulary.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from deepseek_moe.decode.engine import CHUNK, Engine
from deepseek_moe.decode.generation import Generator
from deepseek_moe.decode.load import load
from deepseek_moe.kernels.decode import torch_ops

LOGITS = 0.03
"""The relative distance that logits may have after all layers in 16 bits."""
TIE = 4
"""So many steps of the dtype, at the largest logit, may rounding move two logits apart."""
TEXT = (
    "Once upon a time there lived a poor woodcutter with his wife and two children in a small "
    "hut at the edge of a great forest. He had little to bite and to break, and when a great "
    "famine fell upon the land he could no longer get them their daily bread. One night, as he "
    "lay in bed and could not sleep for his troubles, he sighed and said to his wife"
)
Ids = Sequence[Sequence[int]]


@dataclass
class TwoWays:
    """A model, and two generators of it: `fast` has the engine, `plain` has not."""

    folder: str
    device: torch.device
    dtype: str
    quantization: str | None = None

    @cached_property
    def _loaded(self) -> tuple[PreTrainedModel, Any]:
        return load(self.folder, self.dtype, str(self.device), quantization=self.quantization)

    @property
    def model(self) -> PreTrainedModel:
        return self._loaded[0]

    @cached_property
    def fast(self) -> Generator:
        return with_engine(self.model)

    @cached_property
    def plain(self) -> Generator:
        return Generator(self.model, fast=False)

    def prompts(self, count: int) -> list[list[int]]:
        """`count` prompts of different lengths, the longest last."""
        ids = self._loaded[1](TEXT).input_ids
        return [ids[: 3 + (len(ids) - 3) * (b + 1) // count] for b in range(count)]

    def random_ids(self, rows: int, steps: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(rows)
        vocabulary = self.model.config.vocab_size
        return torch.randint(vocabulary, (rows, steps), generator=generator).tolist()


two_ways = functools.cache(TwoWays)
"""The same object for the same arguments: tests share a model and what was compiled for it."""


def with_engine(model: PreTrainedModel, chunk: int = CHUNK) -> Generator:
    """A generator with an engine, which on a CPU runs the twins in torch step by step."""
    generator = Generator(model, fast=False)
    generator.engine = Engine(model, chunk, torch_ops if model.device.type == "cpu" else None)
    return generator


class Forced:
    """A sampler that returns `ids` [B, N] whatever the logits are, and keeps the logits."""

    def __init__(self, ids: Ids) -> None:
        self.ids_NB, self.logits = torch.tensor(ids).T, []

    def __call__(self, logits_BV: torch.Tensor, seen_BV: torch.Tensor) -> torch.Tensor:
        ids_B = torch.zeros(len(logits_BV), dtype=torch.int64)  # with rows that hold no sequence
        ids_B[: self.ids_NB.shape[1]] = self.ids_NB[len(self.logits)]
        self.logits.append(logits_BV[: self.ids_NB.shape[1]].clone())
        return ids_B.to(logits_BV.device)


def logits_before(generator: Generator, prompts: Ids, ids: Ids) -> torch.Tensor:
    """The logits [N, B, V] in fp32 from which each of `ids` [B, N] would have been chosen."""
    forced = Forced(ids)
    generator.generate(prompts, len(ids[0]), forced)
    return torch.stack(forced.logits)


def assert_likeliest(plain: Generator, prompts: Ids, ids: Ids) -> float:
    """The plain way finds each of `ids`, a row a prompt, the likeliest, up to TIE steps between
    numbers of the model's dtype that are as large as the largest logit. Returns the share of those
    that are not the very likeliest."""
    N = max(map(len, ids))
    logits_NBV = logits_before(plain, prompts, [[*row, *[0] * (N - len(row))] for row in ids])
    behind_NB = torch.zeros(logits_NBV.shape[:2], device=logits_NBV.device)
    for b, row in enumerate(ids):
        chosen_N = logits_NBV[range(len(row)), b, row]
        behind_NB[: len(row), b] = logits_NBV[: len(row), b].amax(-1) - chosen_N
    step = torch.finfo(plain.model.dtype).eps * 2 ** logits_NBV.abs().amax(-1).log2().floor()
    assert (behind_NB <= TIE * step).all(), f"{(behind_NB / step).max():.3g} steps"
    return (behind_NB > 0).float().mean().item()


def distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """|x - y| / |y|."""
    x, y = x.double(), y.double()
    return ((x - y).norm() / y.norm().clamp(min=1e-12)).item()


class Poison(TorchDispatchMode):
    """New tensors hold NaN or -1 until they are written, whatever the memory held before."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._schema.name in ("aten::empty", "aten::new_empty", "aten::empty_like"):
            out.fill_(math.nan if out.is_floating_point() else -1)
        return out
