"""Ids in, ids out: prefill, decode, sample, stream. What the ids mean is chat.py's business.

generator = Generator(model)
for step in generator.stream([[100000, 17464]], max_new_tokens=20):
    ...  # step holds one new id for each prompt, None where it has ended
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from ..errors import RunError, UserError
from .engine import Batch, Engine, UnknownModel, refusal_of
from .sampling import BROKEN, Sampler, greedy, mark_broken, seen_in, sum_rows


class Generator:
    """Continues batches of prompts of any lengths with a causal language model.

    This architecture on an NVIDIA GPU goes through the engine (engine.py); everything else, or all
    with `fast` False, goes the plain way: the model's own forward over a growing cache.

    Every call generates with the model as it is when its first token is asked for. The model may
    be trained, cast, moved, resized, or get or lose adapters, hooks, heads or weights between two
    calls: the engine notices, and is built anew or, where it does not know what the model has
    become, the call goes the plain way (with `fast` True it is refused). While a stream runs, the
    engine goes on with the weights that it began with, and the plain way calls the model as it is
    at each step, over the cache of the steps before; so finish a stream before such a change. The
    engine keeps the memory of weights that were replaced until the next call.

    Training mode is off in each step, and back afterwards in every module that was in it.

    What the engine does to the model: the weights of q_proj, k_proj and v_proj of each layer are
    laid side by side in new memory, also those of gate_proj and up_proj (of a dense layer, and of
    the shared experts), and these parameters become views of it. Their names, shapes and values
    stay, and a second Generator finds them side by side and moves nothing. Weights that are parts
    of somebody's larger tensor, as DeepSpeed's ZeRO lays them, are not moved; if they are not side
    by side there, the call goes the plain way.

    Args:
        fast: None takes the engine where it can; True refuses to go without; False never does.
        engine: one that was made of this model, in place of the Generator's own. This is the way
            to try one on a CPU, where it is slow.

    Raises:
        UserError: `fast` is True where the engine cannot run (here, or at a later call).
    """

    def __init__(
        self, model: PreTrainedModel, fast: bool | None = None, engine: Engine | None = None
    ) -> None:
        self.model, self.fast, self.engine = model, fast, engine
        self._find_engine()
        if fast and self.engine is None:
            raise UserError(refusal_of(model))

    @property
    def context(self) -> int:
        """The most tokens of a prompt and its answer together."""
        return self.model.config.max_position_embeddings

    def _find_engine(self) -> None:
        """Makes the engine where there is none yet and it can run."""
        if self.engine is None and self.fast is not False and Engine.supports(self.model):
            self.engine = Engine(self.model)

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
        it fills the context. In the engine `greedy` and a `Sampling` run inside the CUDA graph, any
        other function on the logits that it leaves.

        Raises:
            UserError: no prompt, an empty one, one that fills the context, one with an id that the
                model does not have, nothing to generate.
            RunError: in a step, the model's logits are NaN or infinite.
        """
        self._check(prompts, max_new_tokens)
        return self._steps(prompts, max_new_tokens, sample, stop_ids)

    def _steps(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sample: Sampler,
        stop_ids: Collection[int],
    ) -> Iterator[list[int | None]]:
        batch = self._start(prompts, max_new_tokens, sample)
        try:
            room = [self.context - len(prompt) for prompt in prompts]
            running = set(range(len(prompts)))
            for made in range(1, max_new_tokens + 1):
                new = {b: token for b, token in batch.next().items() if b in running}
                _refuse_broken(new, made)
                running = {b for b, token in new.items() if token not in stop_ids}
                if running:
                    yield [new[b] if b in running else None for b in range(len(prompts))]
                running = {b for b in running if made < room[b]}
                if not running:
                    return
                batch.drop(new.keys() - running)
        finally:  # the engine keeps nothing of a batch that is over, or was left
            if self.engine is not None and self.engine.batch is batch:
                self.engine.batch = None

    def _start(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, sample: Sampler
    ) -> "Batch | PlainBatch":
        """In the engine, if it may and can compute the model as it is now; else the plain way."""
        self._find_engine()
        if self.engine is not None:
            try:
                return self.engine.start(prompts, sample, max_new_tokens)
            except UnknownModel:
                if self.fast:
                    raise
        return PlainBatch(self.model, prompts, sample)

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
        vocabulary = self.model.config.vocab_size
        wrong = [
            i for prompt in prompts for i in (min(prompt), max(prompt)) if not 0 <= i < vocabulary
        ]
        if wrong:
            raise UserError(
                f"the prompt has the id {wrong[0]}, but the model's ids are 0 to {vocabulary - 1}; "
                "encode the prompt with the model's own tokenizer"
            )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """What is inside runs without dropout, gradient checkpointing and whatever else training adds;
    afterwards each module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _refuse_broken(new: dict[int, int], made: int) -> None:
    """`new`: the id of each prompt by its number; `made`: how many each has with it."""
    for number, token in new.items():
        if token == BROKEN:
            raise RunError(
                f"the model's logits for new token {made} of prompt {number + 1} in the batch are "
                "NaN or infinite: its weights are broken, or their products overflow float16; try "
                "--dtype bfloat16, or get the checkpoint anew"
            )


class PlainBatch:
    """`engine.Batch` with any model on any device: the model's forward, padded to the left."""

    def __init__(
        self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], sample: Sampler
    ) -> None:
        self.model, self.sample = model, sample
        self.numbers = list(range(len(prompts)))
        lengths, device = [len(prompt) for prompt in prompts], model.device
        longest = max(lengths)
        ids = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        self.ids_BL = torch.tensor(ids, device=device)
        self.mask_BL = torch.tensor([[0] * (longest - n) + [1] * n for n in lengths], device=device)
        self.position_BL = (self.mask_BL.cumsum(dim=-1) - 1).clamp(min=0)
        self.seen_BV = seen_in(prompts, model.config.vocab_size, device)
        self.cache = DynamicCache(config=model.config)

    @torch.inference_mode()
    def next(self) -> dict[int, int]:
        """The next id of each prompt in the batch, or `BROKEN`, as in the engine."""
        # In each step by itself: between two of a stream, or after a stream that is left, the model
        # may be trained.
        with evaluating(self.model):
            logits_BV = self.model(
                input_ids=self.ids_BL,
                attention_mask=self.mask_BL,
                position_ids=self.position_BL,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
        logits_BV = logits_BV.float()
        sums_B = sum_rows(logits_BV)  # before the sampler, which may change them
        ids_B = self.sample(logits_BV, self.seen_BV)
        self.seen_BV.scatter_(1, ids_B[:, None], True)
        self.ids_BL = ids_B[:, None]
        self.mask_BL = torch.cat([self.mask_BL, self.mask_BL.new_ones(len(ids_B), 1)], dim=-1)
        self.position_BL = self.position_BL[:, -1:] + 1
        return dict(zip(self.numbers, mark_broken(ids_B, sums_B), strict=True))

    @torch.inference_mode()
    def drop(self, numbers: Collection[int]) -> None:
        """These prompts have ended: they leave the batch."""
        kept = [row for row, number in enumerate(self.numbers) if number not in numbers]
        if len(kept) == len(self.numbers):
            return
        self.numbers = [self.numbers[row] for row in kept]
        index = torch.tensor(kept, device=self.ids_BL.device)
        self.cache.batch_select_indices(index)
        for name in ("ids_BL", "mask_BL", "position_BL", "seen_BV"):
            setattr(self, name, getattr(self, name)[index])
