"""The order of examples, which a resumed run sees again."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import TrainerCallback


class EpochSampler(Sampler[int]):
    """Examples in an order that only seed and epoch decide, so that a resumed run sees the same.

    Batches of similar length waste little on padding: the shuffled examples are cut into pieces of
    fifty steps and each is sorted by length, longest first; then the steps are shuffled, except the
    longest, which comes first: if memory is too small, that shows at once. `step` 1 only shuffles.
    """

    def __init__(self, lengths: list[int], seed: int, step: int) -> None:
        self.lengths, self.seed, self.step, self.epoch = list(lengths), seed, step, 0
        self.callback = _SetEpoch(self)

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        if self.step == 1:
            return iter(order)
        piece = self.step * 50
        pieces = [order[at : at + piece] for at in range(0, len(order), piece)]
        order = [i for p in pieces for i in sorted(p, key=lambda i: -self.lengths[i])]
        steps = [order[at : at + self.step] for at in range(0, len(order), self.step)]
        last = steps.pop() if len(steps[-1]) < self.step else []  # only the last may be short
        if steps:
            shuffled = torch.randperm(len(steps), generator=generator).tolist()
            longest = max(shuffled, key=lambda n: max(self.lengths[i] for i in steps[n]))
            shuffled.remove(longest)
            steps = [steps[n] for n in [longest, *shuffled]]
        return iter([i for step in steps for i in step] + last)


class _SetEpoch(TrainerCallback):
    """accelerate tells samplers the epoch in some arrangements of loaders and not in others."""

    def __init__(self, sampler: EpochSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sampler.epoch = math.floor((state.epoch or 0) + 1e-6)
