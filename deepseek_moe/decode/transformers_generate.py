"""transformers' `generate` by the engine: prepared by transformers, computed here.

What the engine does not do, such as returned scores or processors of the user's own, is left to
transformers. Letters: B sequences, L length of the padded prompts.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    MaxLengthCriteria,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..errors import RunError, UserError
from ..model.modeling_deepseek import DeepseekForCausalLM
from .batch import Batch
from .engine import Engine, UnsupportedModel
from .sampling import BROKEN, Prompts, Sampling
from .supported import is_supported

OPTIONS = {
    RepetitionPenaltyLogitsProcessor: ("repetition_penalty", "penalty"),
    TemperatureLogitsWarper: ("temperature", "temperature"),
    TopKLogitsWarper: ("top_k", "top_k"),
    TopPLogitsWarper: ("top_p", "top_p"),
    MinPLogitsWarper: ("min_p", "min_p"),
}
"""Processors in the order in which transformers and `Sampling` apply them: the option that each is,
and its attribute that holds the value."""
PREPARED = {"attention_mask", "position_ids", "cache", "past_key_values", "use_cache"}
PREPARED |= {"logits_to_keep", "cache_position", "tokenizer"}
"""What transformers hands to the model's forward in every call."""
RETURNED = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


class SharedEngine:
    """The engine of a model, which one call of `generate` at a time uses; others wait.

    A copy of the model, or a pickle, has none.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine, self.lock, self.busy = engine, threading.RLock(), False

    def __reduce__(self) -> tuple[type, tuple]:
        return type(None), ()

    @contextmanager
    def reserved(self) -> Iterator[Engine | None]:
        """None inside of another call of the same thread, as a streamer may make one."""
        with self.lock:
            if self.busy:
                yield None
                return
            self.busy = True
            try:
                yield self.engine
            finally:
                self.busy = False


def sample_by_engine(
    model: DeepseekForCausalLM,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    streamer: Any = None,
    **model_kwargs: Any,
) -> torch.Tensor | GenerateDecoderOnlyOutput | None:
    """Does what `GenerationMixin._sample` does, with the same arguments and results.

    Returns:
        None, before anything has happened, where transformers must do it.

    Raises:
        UserError: a prompt is longer than the context, beyond which text would mean nothing.
    """
    _refuse_longer(model, input_ids, model_kwargs.get("attention_mask"))
    sample = sampling_of(logits_processor, generation_config.do_sample)
    prompts = prompts_of(input_ids, model_kwargs.get("attention_mask"))
    steps = (stopping_criteria.max_length or 0) - input_ids.shape[1]
    if (
        synced_gpus
        or sample is None
        or prompts is None
        or not 0 < steps <= model.config.max_position_embeddings - max(map(len, prompts))
        or model_kwargs.keys() - PREPARED
        or not model_kwargs.get("use_cache", True)
        or generation_config.cache_implementation is not None
        or any(getattr(generation_config, name, False) for name in RETURNED)
        or (sample.repetition_penalty != 1 and not _leaves_padding_out(logits_processor, prompts))
    ):
        return None
    if (shared := _engine_of(model)) is None:
        return None
    with shared.reserved() as engine:
        batch = None
        with suppress(UnsupportedModel):
            batch = engine and engine.start(prompts, sample, steps)
        if batch is None:
            return None
        try:
            loop = _Loop(input_ids, stopping_criteria, generation_config, streamer)
            made = loop.run(batch, steps)
        finally:
            batch.close()
            if model.training:  # It will want the memory of the cache.
                model.shared_engine = None
    as_dict = generation_config.return_dict_in_generate
    return GenerateDecoderOnlyOutput(sequences=made) if as_dict else made


class _Loop:
    """The loop over the steps of one call."""

    def __init__(
        self,
        input_ids: torch.Tensor,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        streamer: Any,
    ) -> None:
        self.ids_BL, self.streamer = input_ids, streamer
        # The batch itself ends at max_length, and the end-of-text ids are compared on the host.
        eos = [one.eos_token_id.tolist() for one in criteria if type(one) is EosTokenCriteria]
        self.stop_ids = {token for ids in eos for token in ids}
        native = (MaxLengthCriteria, EosTokenCriteria)
        self.others = StoppingCriteriaList(one for one in criteria if type(one) not in native)
        # Where nothing tells the end of a text, transformers pads nothing: all go on to the last.
        self.pads = any(hasattr(one, "eos_token_id") for one in criteria)
        pad = getattr(config, "_pad_token_tensor", None)
        self.pad = 0 if pad is None else int(pad)

    def run(self, batch: Batch, steps: int) -> torch.Tensor:
        """Returns prompts and new ids, [B, L + steps] or fewer, padded behind each text's end."""
        rows = range(len(self.ids_BL))
        going = set(rows)
        columns: list[list[int]] = []
        for _ in range(steps):
            new = batch.next()
            if BROKEN in (new[b] for b in going):
                raise RunError(
                    "the model's logits are NaN or infinite: its weights are broken, or their "
                    "products overflow float16; use bfloat16, or get the checkpoint anew"
                )
            column = [self.pad if self.pads and b not in going else new[b] for b in rows]
            columns.append(column)
            going -= {b for b in going if column[b] in self.stop_ids}
            if self.streamer is not None:
                self.streamer.put(torch.tensor(column))
            if self.others:
                self._append(columns)
                columns = []
                stops = self.others(self.ids_BL, None).tolist()
                going -= {b for b in going if stops[b]}
            if not going:
                break
            if self.pads:
                batch.drop(new.keys() - going)
        self._append(columns)
        if self.streamer is not None:
            self.streamer.end()
        return self.ids_BL

    def _append(self, columns: list[list[int]]) -> None:
        if columns:
            new_BL = torch.tensor(columns, dtype=self.ids_BL.dtype, device=self.ids_BL.device).T
            self.ids_BL = torch.cat([self.ids_BL, new_BL], dim=-1)


def sampling_of(processors: LogitsProcessorList, do_sample: bool) -> Sampling | None:
    """The sampler that does what `processors` do, or None if there is none."""
    kinds = [type(one) for one in processors]
    if kinds != [kind for kind in OPTIONS if kind in kinds]:
        return None
    if not do_sample and set(kinds) - {RepetitionPenaltyLogitsProcessor}:
        return None
    options = {"temperature": 1.0 if do_sample else 0.0}
    for one in processors:
        name, attribute = OPTIONS[type(one)]
        options[name] = getattr(one, attribute)
    return _sampling(**options)


@cache  # CUDA graphs are captured for one sampler, so equal calls must give the same one
def _sampling(**options: float) -> Sampling:
    return Sampling(**options)


def prompts_of(ids_BL: torch.Tensor, mask_BL: torch.Tensor | None) -> Prompts | None:
    """The prompts without their padding, which must be on their left; None if it is not."""
    if mask_BL is None:
        return ids_BL.tolist() if ids_BL.shape[1] else None
    mask_BL = mask_BL.to("cpu").bool()
    if mask_BL.shape != ids_BL.shape or not mask_BL[:, -1].all():
        return None
    if not (mask_BL.int().diff(dim=-1) >= 0).all():
        return None
    return [row[mask].tolist() for row, mask in zip(ids_BL.cpu(), mask_BL, strict=True)]


def _refuse_longer(
    model: DeepseekForCausalLM, ids_BL: torch.Tensor, mask_BL: torch.Tensor | None
) -> None:
    context, longest = model.config.max_position_embeddings, ids_BL.shape[1]
    if longest <= context or model.config.rope_parameters["rope_type"] != "default":
        return
    if mask_BL is not None:
        longest = int(mask_BL.sum(-1).max())
    if longest > context:
        raise UserError(
            f"the prompt has {longest} tokens, but the model's context is {context}, answer "
            "included; shorten the prompt, or give fast=False to go beyond all the same"
        )


def _leaves_padding_out(processors: LogitsProcessorList, prompts: Prompts) -> bool:
    """Whether the repetition penalty counts no padding as a part of the text, as `Sampling`.
    transformers 5.17 counts it; without padding there is nothing to leave out."""
    if len(set(map(len, prompts))) == 1:
        return True
    return isinstance(getattr(processors[0], "prompt_ignore_length", None), torch.Tensor)


def _engine_of(model: DeepseekForCausalLM) -> SharedEngine | None:
    """The engine that an earlier call has made, or a new one; None if there can be none."""
    if model.shared_engine is None and is_supported(model):
        model.shared_engine = SharedEngine(Engine(model))
    return model.shared_engine
