"""Ids in, ids out: prefill, decode, sample, stream. What the ids mean is chat.py's business.

generator = Generator(model)
for step in generator.stream([[100000, 17464]], max_new_tokens=20):
    ...  # step holds one new id for each prompt, None where it has ended
"""

from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from .errors import UserError

Sampler = Callable[[torch.Tensor], torch.Tensor]
"""Logits of the next position, fp32 [B, V], to ids [B]."""


def greedy(logits_BV: torch.Tensor) -> torch.Tensor:
    """The likeliest id of each row."""
    return logits_BV.argmax(dim=-1)


def make_sampler(
    temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int | None = None
) -> Sampler:
    """A sampler: greedy at temperature 0, else by chance.

    Args:
        temperature: divides the logits; below 1 favours the likely, above 1 the unlikely.
        top_k: keep only the `top_k` likeliest ids; 0 keeps all.
        top_p: keep the likeliest ids whose probabilities first reach `top_p` together.
        seed: makes the draws repeatable.

    Raises:
        UserError: a value that no distribution has.
    """
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature is {temperature}; it must be 0 (greedy) or above")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}; it must be above 0 and at most 1")
    if top_k < 0:
        raise UserError(f"top_k is {top_k}; it must be 0 (off) or above")
    if seed is not None and not 0 <= seed < 2**63:
        raise UserError(f"seed is {seed}; it must be from 0 to 2**63 - 1")
    if temperature == 0:
        return greedy
    temperature = max(temperature, 1e-30)  # smaller ones are 0 in fp32
    generators: dict[torch.device, torch.Generator] = {}

    def sample(logits_BV: torch.Tensor) -> torch.Tensor:
        device = logits_BV.device
        if seed is not None and device not in generators:
            generators[device] = torch.Generator(device).manual_seed(seed)
        # The largest logit becomes 0 first, so that a small temperature cannot overflow.
        logits_BV = (logits_BV - logits_BV.amax(dim=-1, keepdim=True)) / temperature
        logits_BV, ids_BV = logits_BV.sort(dim=-1, descending=True)
        if top_k:
            logits_BV, ids_BV = logits_BV[:, :top_k], ids_BV[:, :top_k]
        probs_BV = logits_BV.softmax(dim=-1)
        before_BV = probs_BV.cumsum(dim=-1) - probs_BV  # 0 for the likeliest, which always stays
        probs_BV = probs_BV.masked_fill(before_BV >= top_p, 0.0)
        picks_B1 = torch.multinomial(probs_BV, 1, generator=generators.get(device))
        return ids_BV.gather(-1, picks_B1).squeeze(-1)

    return sample


class Generator:
    """Continues batches of prompts of any lengths with a causal language model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval()
        self.context = model.config.max_position_embeddings

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sample: Sampler = greedy,
        stop_ids: Collection[int] = (),
    ) -> list[list[int]]:
        """The new ids of each prompt, without the stop id. Arguments as for `stream`."""
        new: list[list[int]] = [[] for _ in prompts]
        for step in self.stream(prompts, max_new_tokens, sample, stop_ids):
            for ids, token in zip(new, step, strict=True):
                if token is not None:
                    ids.append(token)
        return new

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sample: Sampler = greedy,
        stop_ids: Collection[int] = (),
    ) -> Iterator[list[int | None]]:
        """Step by step, the next id of every prompt; None for those that have ended.

        A sequence ends at one of `stop_ids` (which is not yielded), after `max_new_tokens`, or when
        it fills the context.

        Raises:
            UserError: no prompt, an empty one, one that fills the context, nothing to generate.
        """
        self._check(prompts, max_new_tokens)
        return self._steps(prompts, max_new_tokens, sample, stop_ids)

    @torch.inference_mode()
    def _steps(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sample: Sampler,
        stop_ids: Collection[int],
    ) -> Iterator[list[int | None]]:
        device = self.model.device
        lengths = [len(prompt) for prompt in prompts]
        longest = max(lengths)
        ids_BL = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
        mask_BL = torch.tensor([[0] * (longest - n) + [1] * n for n in lengths], device=device)
        position_BL = (mask_BL.cumsum(dim=-1) - 1).clamp(min=0)
        cache = DynamicCache(config=self.model.config)
        running = [True] * len(prompts)
        for made in range(max_new_tokens):
            logits_BV = self.model(
                input_ids=ids_BL,
                attention_mask=mask_BL,
                position_ids=position_BL,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            next_B = sample(logits_BV.float())
            step = next_B.tolist()
            for i, token in enumerate(step):
                running[i] = running[i] and token not in stop_ids
                step[i] = token if running[i] else None
            if any(running):
                yield step
            running = [
                go and n + made + 1 < self.context for go, n in zip(running, lengths, strict=True)
            ]
            if not any(running):
                return
            ids_BL = next_B[:, None]
            mask_BL = torch.cat([mask_BL, mask_BL.new_ones(len(prompts), 1)], dim=-1)
            position_BL = position_BL[:, -1:] + 1

    def _check(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        if not prompts or not all(prompts):
            raise UserError("the prompt is empty; give it at least one token")
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {max_new_tokens}; it must be 1 or more")
        longest = max(len(prompt) for prompt in prompts)
        if longest >= self.context:
            raise UserError(
                f"the prompt has {longest} tokens, but the model's context is {self.context}, "
                "answer included; shorten the prompt"
            )
