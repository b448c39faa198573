"""`model.generate` by the engine gives what transformers' own loop gives, or leaves it to that."""

import copy
import pickle
import threading
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from text_fixtures import BUNDLED, bundled_model, tokenizer_of
from transformers import (
    DynamicCache,
    GenerationMixin,
    LogitsProcessor,
    StoppingCriteria,
    TextIteratorStreamer,
)
from transformers.generation import GenerateDecoderOnlyOutput

from deepseek_moe import DeepseekForCausalLM
from deepseek_moe.decode.engine import Engine
from deepseek_moe.decode.transformers_generate import SharedEngine
from deepseek_moe.errors import UserError
from deepseek_moe.kernels.decode import torch_ops
from deepseek_moe.model.modeling_deepseek import CACHE

TEXTS = ["Once upon a time", "The", "It was a cold night, and nobody in the house could sleep. He"]
TOKENIZER = tokenizer_of(BUNDLED)
THE, COMMA = TOKENIZER(" the,", add_special_tokens=False).input_ids


@pytest.fixture
def model() -> DeepseekForCausalLM:
    """The bundled model, with an engine on the plain twins of its kernels."""
    model = copy.deepcopy(bundled_model())
    model.shared_engine = SharedEngine(Engine(model, ops=torch_ops))
    return model


@pytest.fixture
def loops() -> Iterator[Any]:
    """Counts the calls of transformers' own loop."""
    own = GenerationMixin._sample
    with patch.object(GenerationMixin, "_sample", autospec=True, side_effect=own) as loop:
        yield loop


def inputs(texts: list[str] = TEXTS, **options: Any) -> dict[str, torch.Tensor]:
    return TOKENIZER(texts, return_tensors="pt", padding=True, **options)


class EndsAfter(StoppingCriteria):
    """Ends row r after `lengths[r]` new tokens."""

    def __init__(self, start: int, lengths: list[int]) -> None:
        self.ends = torch.tensor(lengths) + start

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return input_ids.shape[1] >= self.ends


START = inputs()["input_ids"].shape[1]


SAME = (
    {},
    {"repetition_penalty": 1.4},
    {"eos_token_id": THE},
    {"eos_token_id": [4095, THE, COMMA], "pad_token_id": 7},
    {"eos_token_id": None},
    {"stop_strings": ["the", " of a"], "tokenizer": TOKENIZER},
    {"stop_strings": "the", "tokenizer": TOKENIZER, "eos_token_id": None},
    {"stopping_criteria": [EndsAfter(START, [2, 5, 3])]},
    {"stopping_criteria": [EndsAfter(START, [2, 5, 3])], "eos_token_id": COMMA},
    {"num_return_sequences": 2, "do_sample": True, "top_k": 1},
    {"max_length": START + 3, "max_new_tokens": None},
    {"max_time": 100.0},
)


@pytest.mark.parametrize("options", SAME, ids=["-".join(one) for one in SAME])
def test_the_ids_are_those_of_transformers(options, model, loops):
    options = {"max_new_tokens": 12} | options
    made = model.generate(**inputs(), **options)
    if "repetition_penalty" in options:  # transformers 5.17 penalises padding too
        loops.reset_mock()
        model.generate(**inputs(TEXTS[:1]), **options)
    assert not loops.called
    assert made.equal(model.generate(**inputs(), **options, fast=False))
    assert loops.called


def test_sampling_draws_from_the_same_distribution(model, loops):
    """The shares of the first id in many draws, whose standard deviation is below 0.012."""
    ids = inputs(TEXTS[:1])["input_ids"]
    options = {"do_sample": True, "temperature": 2.0, "top_k": 6, "top_p": 0.9, "max_new_tokens": 1}
    shares = []
    for fast in (True, False):
        torch.manual_seed(0)
        drawn = model.generate(ids, **options, num_return_sequences=2000, fast=fast)[:, -1]
        shares.append(torch.bincount(drawn, minlength=model.config.vocab_size) / len(drawn))
        assert loops.called is not fast
    assert (shares[0] > 0).sum() > 2
    torch.testing.assert_close(*shares, atol=0.06, rtol=0)


class Unchanged(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores


@pytest.mark.parametrize(
    "options",
    [
        {"logits_processor": [Unchanged()]},
        {"output_scores": True, "return_dict_in_generate": True},
        {CACHE: DynamicCache()},
        {"min_new_tokens": 3},
        {"no_repeat_ngram_size": 2},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"do_sample": True, "typical_p": 0.9},
        {"max_new_tokens": 2000},
    ],
    ids="-".join,
)
def test_what_the_engine_does_not_do_is_left_to_transformers(options, model, loops):
    loops.side_effect = lambda *args, **kwargs: "transformers"
    assert model.generate(**inputs(TEXTS[:1]), **{"max_new_tokens": 3} | options) == "transformers"


def test_a_prompt_beyond_the_context_is_refused_unless_asked_for(model, loops):
    """Padding does not count, and a rotation that is scaled may go beyond."""
    long = torch.full((1, model.config.max_position_embeddings + 1), THE)
    with pytest.raises(UserError, match=r"1025 tokens, .* context is 1024.*fast=False"):
        model.generate(long, max_new_tokens=1)
    assert not loops.called
    mask = (torch.arange(1025) > 0).long()[None]
    for options in ({"fast": False}, {"attention_mask": mask}):
        assert model.generate(long, max_new_tokens=1, **options).shape == (1, 1026)
    model.config.rope_parameters["rope_type"] = "dynamic"
    loops.side_effect = lambda *args, **kwargs: "transformers"
    assert model.generate(long, max_new_tokens=1) == "transformers"


def test_padding_on_the_right_and_beams_are_left_to_transformers(model, loops):
    padded = inputs(padding_side="right")
    model.generate(**padded, max_new_tokens=2)
    assert loops.call_count == 1
    beams = model.generate(**inputs(), num_beams=3, max_new_tokens=4)
    assert beams.equal(model.generate(**inputs(), num_beams=3, max_new_tokens=4, fast=False))
    assert loops.call_count == 1


def test_a_hook_is_heard(model, loops):
    """Without it, the engine returns what transformers would, also as a dict."""
    called = []
    hook = model.model.layers[1].mlp.gate.register_forward_hook(lambda *_: called.append(1))
    model.generate(**inputs(), max_new_tokens=2)
    assert loops.called and called
    hook.remove()
    ids = inputs(TEXTS[:1])["input_ids"]  # without a mask
    out = model.generate(ids, max_new_tokens=5, return_dict_in_generate=True)
    assert loops.call_count == 1
    assert isinstance(out, GenerateDecoderOnlyOutput)
    assert out.sequences.equal(model.generate(ids, max_new_tokens=5, fast=False))


class Put:
    """A streamer that notes what it is given, and generates by itself meanwhile."""

    def __init__(self, model: DeepseekForCausalLM) -> None:
        self.model, self.given, self.ended, self.inner = model, [], False, None

    def put(self, ids: torch.Tensor) -> None:
        self.given.append(ids.tolist())
        self.inner = self.model.generate(**inputs(TEXTS[1:2]), max_new_tokens=2)

    def end(self) -> None:
        self.ended = True


def test_a_streamer_gets_the_ids_and_may_generate_too(model):
    streamers = [Put(model), Put(model)]
    for fast, streamer in zip((True, False), streamers, strict=True):
        model.generate(**inputs(), max_new_tokens=4, streamer=streamer, fast=fast)
    assert streamers[0].given == streamers[1].given and len(streamers[0].given) == 5
    assert all(streamer.ended for streamer in streamers)


def test_threads_generate_one_after_another(model, loops):
    """As servers do, each of which reads the text of its thread while it is made."""
    texts = {}

    def generate(number: int) -> None:
        streamer = TextIteratorStreamer(TOKENIZER)
        given = inputs(TEXTS[number : number + 1])
        arguments = {**given, "max_new_tokens": 15, "streamer": streamer}
        thread = threading.Thread(target=model.generate, kwargs=arguments)
        thread.start()
        texts[number] = "".join(streamer)
        thread.join()

    threads = [threading.Thread(target=generate, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not loops.called
    for number, text in texts.items():
        made = model.generate(**inputs(TEXTS[number : number + 1]), max_new_tokens=15, fast=False)
        assert text == TOKENIZER.decode(made[0])


def test_a_client_that_leaves_does_not_block_the_next(model):
    class Leaves(Put):
        def put(self, ids: torch.Tensor) -> None:
            if self.given:
                raise ConnectionError("gone")
            self.given.append(1)

    with pytest.raises(ConnectionError):
        model.generate(**inputs(), max_new_tokens=9, streamer=Leaves(model))
    assert model.generate(**inputs(), max_new_tokens=1).shape[1] == START + 1


def test_the_engine_lives_as_long_as_it_is_of_use(model):
    """It stays out of copies, and goes when the model is moved, cast or about to train."""
    assert copy.deepcopy(model).shared_engine is None
    assert pickle.loads(pickle.dumps(model)).shared_engine is None
    first = model.shared_engine
    model.generate(**inputs(), max_new_tokens=1)
    assert model.shared_engine is first
    model.train().generate(**inputs(), max_new_tokens=1)
    assert model.shared_engine is None
    model.shared_engine = first
    model.to(torch.float16)
    assert model.shared_engine is None
