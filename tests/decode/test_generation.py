"""Generation, in the plain way and in the engine, against transformers' own."""

import copy
from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
from gpu_fixtures import with_engine
from text_fixtures import BUNDLED, bundled_model, tokenizer_of
from torch import nn

from deepseek_moe import DeepseekForCausalLM
from deepseek_moe.decode.generation import Generator
from deepseek_moe.decode.sampling import Sampling, greedy
from deepseek_moe.errors import RunError, UserError

MakeModel = Callable[..., DeepseekForCausalLM]
IDS = [[5, 17, 44], [8, 61]]  # prompts of a model that the fixture `tiny_model` has made


def test_greedy_equals_transformers(generator, prompts):
    batch = tokenizer_of(BUNDLED).pad({"input_ids": prompts}, return_tensors="pt")
    out = bundled_model().generate(**batch, do_sample=False, max_new_tokens=16, eos_token_id=-1)
    assert generator.generate(prompts, 16) == out[:, batch.input_ids.shape[1] :].tolist()


def test_batch_equals_single(generator, prompts):
    single = [generator.generate([prompt], 8)[0] for prompt in prompts]
    assert generator.generate(prompts, 8) == single
    assert generator.generate(prompts[::-1], 8) == single[::-1]
    assert generator.generate(prompts, 1) == [ids[:1] for ids in single]


def test_each_token_is_given_before_more_are_computed_than_needed(generator, prompts):
    calls = []

    def counting(logits: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        calls.append(len(logits))
        return greedy(logits, seen)

    made = [len(calls) for _ in generator.stream(prompts, 4, counting)]
    # The engine gives the first id at once; then a step is always under way.
    assert made == ([1, 2, 3, 4] if generator.engine is None else [1, 3, 4, 4])
    assert len(calls) == 4


def test_a_stop_id_ends_its_sequence_alone(generator, prompts):
    free = generator.generate(prompts, 12)
    stop = next(t for t in free[0][3:] if free[0].index(t) >= 3)
    expected = [ids[: ids.index(stop)] if stop in ids else ids for ids in free]
    assert generator.generate(prompts, 12, stop_ids={stop}) == expected
    steps = list(generator.stream(prompts, 12, stop_ids={stop}))
    for row, ids in zip(zip(*steps, strict=True), expected, strict=True):
        assert list(row) == ids + [None] * (len(steps) - len(ids))
    first = {ids[0] for ids in free}
    assert list(generator.stream(prompts, 9, stop_ids=first)) == []
    assert generator.generate(prompts, 9, stop_ids=first) == [[]] * len(prompts)


def test_a_full_context_ends_its_sequence_alone(generator):
    prompts = [[5] * 3, [6] * 10, [7] * 11]
    with patch.object(bundled_model().config, "max_position_embeddings", 12):
        together = generator.generate(prompts, 100)
        assert [len(ids) for ids in together] == [9, 2, 1]
        assert together == [generator.generate([prompt], 100)[0] for prompt in prompts]


def test_samplers_do_what_they_say(generator, prompts):
    def sampled(seed: int) -> list[list[int]]:
        return generator.generate(prompts, 8, Sampling(1.0, top_k=20, seed=seed))

    def even(logits_BV: torch.Tensor, seen_BV: torch.Tensor) -> torch.Tensor:
        logits_BV[:, 1::2] = float("-inf")
        return greedy(logits_BV, seen_BV)

    assert sampled(1) == sampled(1) != sampled(2)
    made = generator.generate(prompts, 5, even)
    assert [len(ids) for ids in made] == [5] * len(prompts)
    assert not any(token % 2 for ids in made for token in ids)
    made = generator.generate(prompts, 12, Sampling(repetition_penalty=1.5))
    plain = Generator(bundled_model())
    assert made == plain.generate(prompts, 12, Sampling(repetition_penalty=1.5))
    assert made != plain.generate(prompts, 12)


@pytest.mark.parametrize(
    ("prompts", "new", "said"),
    [
        ([], 5, "empty"),
        ([[5], []], 5, "empty"),
        ([[5], [5] * 1024], 5, "1024 tokens.*context is 1024.*shorten"),
        ([[5], [9, 4096]], 5, "the id 4096.*ids are 0 to 4095"),
        ([[5, -1]], 5, "the id -1"),
        ([[5]], 0, "max_new_tokens is 0"),
    ],
)
def test_impossible_requests(prompts, new, said):
    with pytest.raises(UserError, match=said) as caught:
        Generator(bundled_model()).generate(prompts, new)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make", [Generator, with_engine])
@pytest.mark.parametrize(
    ("value", "sample"), [(float("nan"), greedy), (float("inf"), Sampling(1.0, top_k=5, seed=1))]
)
def test_logits_that_are_no_numbers_are_refused(value, sample, make, prompts):
    """As soon as a prompt's are: here after a token that is in the prompt, or was just made."""
    (free,) = Generator(bundled_model()).generate(prompts[:1], 12)
    at = next(i for i, token in enumerate(free) if token not in prompts[0] + free[:i])
    model = copy.deepcopy(bundled_model())
    model.model.embed_tokens.weight.data[free[at]] = value
    generator = make(model)
    said = r"token 1 of prompt 2 .* NaN or infinite[^\n]*bfloat16[^\n]*$"
    with pytest.raises(RunError, match=said):
        generator.generate([[5], [5, free[at]]], 4, sample)
    if sample is greedy:
        stream = generator.stream(prompts[:1], 12)
        assert [next(stream)[0] for _ in range(at + 1)] == free[: at + 1]
        with pytest.raises(RunError, match=f"token {at + 2} of prompt 1 "):
            next(stream)
        # Nothing follows the last token, so its logits are not looked at.
        assert generator.generate(prompts[:1], at + 1) == [free[: at + 1]]


def with_dropout(tiny_model: MakeModel) -> DeepseekForCausalLM:
    return tiny_model(attention_dropout=0.9)


def with_an_adapter(tiny_model: MakeModel) -> nn.Module:
    """On linears and on experts, each of which drops out by itself."""
    pytest.importorskip("peft", reason="adapters are PEFT's: pip install peft")
    from adapter_fixtures import EXPERTS, add_random_adapters, move_what_trains

    return move_what_trains(add_random_adapters(tiny_model(), ["q_proj", *EXPERTS], 0.9), 1.0)


def with_checkpointing(tiny_model: MakeModel) -> DeepseekForCausalLM:
    """As finetune.py leaves it: transformers keeps no cache in training then."""
    model = tiny_model()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model.config.use_cache = False
    return model


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


@pytest.mark.parametrize(
    ("make_generator", "make"),
    [
        (Generator, with_dropout),
        (with_engine, with_dropout),
        (Generator, with_an_adapter),
        (Generator, with_checkpointing),
    ],
)
def test_a_model_in_training_mode(make_generator, make, tiny_model):
    """Its text is that of evaluation mode, and each of its modules stays in its own mode."""
    model = make(tiny_model).eval()
    generator = make_generator(model)
    expected = generator.generate(IDS, 8)
    model.train()
    model.get_input_embeddings().eval()
    before = modes(model)
    assert len(set(before)) == 2
    assert generator.generate(IDS, 8) == expected
    assert modes(model) == before


def test_a_model_that_is_trained_between_the_steps_of_a_stream(tiny_model):
    model = with_dropout(tiny_model)
    generator = Generator(model)
    expected = list(generator.stream(IDS, 6))
    made = []
    for step in generator.stream(IDS, 6):
        made.append(step)
        assert all(modes(model)) == (len(made) > 1)  # as it was before the step
        model.train()
        model(torch.tensor(IDS[:1])).logits.sum().backward()
    assert made == expected


def test_the_mode_comes_back_after_an_error(tiny_model):
    model = tiny_model().train()
    error = RuntimeError("no")
    with patch.object(model.lm_head, "forward", side_effect=error), pytest.raises(RuntimeError):
        Generator(model).generate([[5]], 2)
    assert all(modes(model))
