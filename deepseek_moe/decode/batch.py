"""Prompts that are continued together: what every way of doing so offers, and the plain way."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from ..model.modeling_deepseek import CACHE
from .sampling import Prompts, Sampler, mark_broken, seen_in, sum_rows


class Batch(ABC):
    """Prompts that are continued together, a row each: row r continues prompt `numbers[r]`."""

    def __init__(self, prompts: Prompts) -> None:
        self.numbers = list(range(len(prompts)))

    @abstractmethod
    def next(self) -> dict[int, int]:
        """The next id of each prompt by its number; `BROKEN` where its logits are not finite.

        Prompts that were dropped after this step began may still be among them.
        """

    def drop(self, ended: Collection[int]) -> None:
        """Takes the prompts of these numbers out of the batch."""
        kept = [row for row, number in enumerate(self.numbers) if number not in ended]
        if len(kept) < len(self.numbers):
            self.numbers = [self.numbers[row] for row in kept]
            self._keep(kept)

    @abstractmethod
    def _keep(self, rows: list[int]) -> None:
        """Moves these rows together and forgets the others."""

    @abstractmethod
    def close(self) -> None:
        """Gives back the memory of a batch that is over, or of which nobody wants more."""


class PlainBatch(Batch):
    """With any model on any device: the model's own forward over a growing cache, with the prompts
    padded to the left."""

    def __init__(self, model: PreTrainedModel, prompts: Prompts, sample: Sampler) -> None:
        super().__init__(prompts)
        self.model, self.sample = model, sample
        ids = [torch.tensor(prompt, device=model.device) for prompt in prompts]
        self.ids_BL = pad_sequence(ids, batch_first=True, padding_side="left")
        ones = [torch.ones_like(prompt) for prompt in ids]
        self.mask_BL = pad_sequence(ones, batch_first=True, padding_side="left")
        self.seen_BV = seen_in(prompts, model.config.vocab_size, model.device)
        self.cache = DynamicCache(config=model.config)

    @torch.inference_mode()
    def next(self) -> dict[int, int]:
        # Training mode is turned off for this step only, because the model may be trained before
        # the next, or after a stream that nobody ends.
        position_BL = (self.mask_BL.cumsum(dim=-1) - 1).clamp(min=0)
        with evaluating(self.model):
            logits_BV = self.model(
                input_ids=self.ids_BL,
                attention_mask=self.mask_BL,
                position_ids=position_BL[:, -self.ids_BL.shape[1] :],
                use_cache=True,
                logits_to_keep=1,
                **{CACHE: self.cache},
            ).logits[:, -1]
        logits_BV = logits_BV.float()
        sums_B = sum_rows(logits_BV)  # before the sampler, which may change them
        ids_B = self.sample(logits_BV, self.seen_BV)
        self.seen_BV.scatter_(1, ids_B[:, None], True)
        self.ids_BL = ids_B[:, None]
        self.mask_BL = torch.cat([self.mask_BL, self.mask_BL.new_ones(len(ids_B), 1)], dim=-1)
        return dict(zip(self.numbers, mark_broken(ids_B, sums_B), strict=True))

    @torch.inference_mode()
    def _keep(self, rows: list[int]) -> None:
        index = torch.tensor(rows, device=self.ids_BL.device)
        self.cache.batch_select_indices(index)
        self.ids_BL, self.mask_BL = self.ids_BL[index], self.mask_BL[index]
        self.seen_BV = self.seen_BV[index]

    def close(self) -> None:
        self.cache = None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, `model` runs without dropout, gradient checkpointing and what else training adds.
    Afterwards each of its modules is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
