"""The order of training examples, which a resumed run sees again."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader, Sampler
from transformers import TrainerCallback, TrainingArguments

STEPS_SORTED_TOGETHER = 50


class EpochSampler(Sampler[int]):
    """Orders the examples by nothing but `seed` and `epoch`.

    Batches of similar lengths waste little on padding. So the shuffled examples are cut into pieces
    of fifty steps, and each piece is sorted by length. Then the steps are shuffled, except for the
    one with the longest example: it comes first, and shows at once if memory is too small.

    Args:
        lengths: the number of tokens of each example.
        step: the number of examples in a step of all processes; 1 only shuffles.
    """

    def __init__(self, lengths: list[int], seed: int, step: int) -> None:
        self.lengths, self.seed, self.step, self.epoch = list(lengths), seed, step, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        if self.step == 1:
            return iter(order)
        piece = self.step * STEPS_SORTED_TOGETHER
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


class SetEpoch(TrainerCallback):
    """Tells the sampler its epoch.

    accelerate would do this for a sampler with a `set_epoch`, but not if several processes resume
    inside of an epoch: its DataLoaderShard.set_epoch does not look through a SkipBatchSampler.
    """

    def __init__(self, sampler: EpochSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sampler.epoch = math.floor((state.epoch or 0) + 1e-6)


def load_in_order(
    dataset: Dataset, args: TrainingArguments, collate: Callable[..., dict[str, Any]]
) -> tuple[DataLoader, SetEpoch]:
    """Batches of a process, which accelerate divides among processes, and what sets the epoch."""
    step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    if args.train_sampling_strategy == "random":
        step = 1
    sampler = EpochSampler(dataset["length"], args.seed, step)
    loader = DataLoader(
        dataset,
        args.train_batch_size,
        sampler=sampler,
        collate_fn=collate,
        drop_last=args.dataloader_drop_last,
        pin_memory=args.dataloader_pin_memory,
    )
    return loader, SetEpoch(sampler)
