"""Generation, in the plain way and in the engine, against transformers' own."""

import copy
from collections.abc import Callable

import pytest
import torch
from text_fixtures import BUNDLED, bundled_model, tokenizer_of

from deepseek_moe import DeepseekForCausalLM
from deepseek_moe.decode.engine import Engine
from deepseek_moe.decode.generation import Generator
from deepseek_moe.decode.sampling import Sampler, greedy, make_sampler
from deepseek_moe.errors import RunError, UserError
from deepseek_moe.kernels.decode import torch_ops


def test_greedy_equals_transformers(generator: Generator, prompts: list[list[int]]) -> None:
    batch = tokenizer_of(BUNDLED).pad({"input_ids": prompts}, return_tensors="pt")
    out = bundled_model().generate(**batch, do_sample=False, max_new_tokens=16, eos_token_id=-1)
    assert generator.generate(prompts, 16) == out[:, batch.input_ids.shape[1] :].tolist()


def test_batch_equals_single(generator: Generator, prompts: list[list[int]]) -> None:
    single = [generator.generate([prompt], 12)[0] for prompt in prompts]
    assert generator.generate(prompts, 12) == single
    assert generator.generate(prompts[::-1], 12) == single[::-1]
    assert generator.generate(prompts, 1) == [ids[:1] for ids in single]


def test_the_plain_way_gives_each_token_before_it_computes_the_next(
    prompts: list[list[int]],
) -> None:
    calls = []

    def counting(logits: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        calls.append(logits.shape)
        return greedy(logits, seen)

    stream = Generator(bundled_model()).stream(prompts, 5, counting)
    for n in range(1, 6):
        next(stream)
        assert calls == [(len(prompts), bundled_model().config.vocab_size)] * n
    assert next(stream, "end") == "end"


def test_a_stop_id_ends_its_sequence_alone(generator: Generator, prompts: list[list[int]]) -> None:
    free = generator.generate(prompts, 12)
    stop = next(t for t in free[0][3:] if free[0].index(t) >= 3)
    expected = [ids[: ids.index(stop)] if stop in ids else ids for ids in free]
    assert generator.generate(prompts, 12, stop_ids={stop}) == expected
    steps = list(generator.stream(prompts, 12, stop_ids={stop}))
    for row, ids in zip(zip(*steps, strict=True), expected, strict=True):
        assert list(row) == ids + [None] * (len(steps) - len(ids))


def test_nothing_is_yielded_if_all_stop_at_once(
    generator: Generator, prompts: list[list[int]]
) -> None:
    first = {ids[0] for ids in generator.generate(prompts, 1)}
    assert list(generator.stream(prompts, 9, stop_ids=first)) == []
    assert generator.generate(prompts, 9, stop_ids=first) == [[]] * len(prompts)


def test_a_full_context_ends_its_sequence_alone(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundled_model().config, "max_position_embeddings", 12)
    prompts = [[5] * 3, [6] * 10, [7] * 11]
    together = generator.generate(prompts, 100)
    assert [len(ids) for ids in together] == [9, 2, 1]
    assert together == [generator.generate([prompt], 100)[0] for prompt in prompts]


def test_a_seed_repeats_the_whole_text(generator: Generator, prompts: list[list[int]]) -> None:
    def sampled(seed: int) -> list[list[int]]:
        return generator.generate(prompts, 12, make_sampler(1.0, top_k=20, seed=seed))

    assert sampled(1) == sampled(1) != sampled(2)


def test_the_penalty_is_the_same_in_both_ways(prompts: list[list[int]]) -> None:
    model, sample = bundled_model(), make_sampler(repetition_penalty=1.5)
    made = Generator(model, engine=Engine(model, ops=torch_ops)).generate(prompts, 12, sample)
    assert made == Generator(model).generate(prompts, 12, sample)
    assert made != Generator(model).generate(prompts, 12)


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
def test_impossible_requests(prompts: list[list[int]], new: int, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        Generator(bundled_model()).generate(prompts, new)
    assert "\n" not in str(caught.value)


# ---- a model that is being trained ----


def with_dropout(tiny_model: Callable[..., DeepseekForCausalLM]) -> DeepseekForCausalLM:
    return tiny_model(hidden_size=64, num_attention_heads=2, attention_dropout=0.9)


def with_an_adapter(tiny_model: Callable[..., DeepseekForCausalLM]) -> torch.nn.Module:
    """On linears and on experts, each of which drops out by itself."""
    pytest.importorskip("peft", reason="adapters are PEFT's: pip install peft")
    from deepseek_moe.training.trainable import add_lora

    targets = ["q_proj", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = add_lora(tiny_model(), targets, 4, 64, 0.9, [])
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    return model


def with_checkpointing(tiny_model: Callable[..., DeepseekForCausalLM]) -> DeepseekForCausalLM:
    """As finetune.py leaves it: transformers keeps no cache in training then."""
    model = tiny_model()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model.config.use_cache = False
    return model


def modes(model: torch.nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("make", [with_dropout, with_an_adapter, with_checkpointing])
def test_a_model_in_training_mode(
    make: Callable[..., torch.nn.Module], tiny_model: Callable[..., DeepseekForCausalLM]
) -> None:
    """Its text is that of evaluation mode, and each of its modules stays in its own mode."""
    model, prompts = make(tiny_model).eval(), [[5, 17, 44], [8, 61]]
    generator = Generator(model)
    expected = generator.generate(prompts, 8)
    model.train()
    model.get_input_embeddings().eval()
    before = modes(model)
    assert len(set(before)) == 2
    assert generator.generate(prompts, 8) == expected
    assert modes(model) == before
    assert Generator(model.train()).generate(prompts, 8) == expected
    assert all(modes(model))


def test_a_model_that_is_trained_between_the_steps_of_a_stream(
    tiny_model: Callable[..., DeepseekForCausalLM],
) -> None:
    model, prompts = with_dropout(tiny_model), [[5, 17, 44], [8, 61]]
    generator = Generator(model)
    expected = list(generator.stream(prompts, 6))
    stream = generator.stream(prompts, 6)
    made = [next(stream)]
    for step in stream:
        made.append(step)
        assert not model.training
        model.train()
        model(torch.tensor(prompts[:1])).logits.sum().backward()
        model.eval()
    assert made == expected
    left = generator.stream(prompts, 6)
    model.train()
    next(left)
    assert all(modes(model))  # though nobody ends the stream


def test_the_mode_comes_back_after_an_error(
    tiny_model: Callable[..., DeepseekForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model().train()

    def fails(*_: object) -> None:
        assert not any(modes(model))
        raise RuntimeError("no")

    monkeypatch.setattr(model.lm_head, "forward", fails)
    with pytest.raises(RuntimeError, match="no"):
        Generator(model).generate([[5]], 2)
    assert all(modes(model))


def test_the_engine_in_training_mode(tiny_model: Callable[..., DeepseekForCausalLM]) -> None:
    model, prompts = with_dropout(tiny_model), [[5, 17, 44], [8, 61]]
    generator = Generator(model, engine=Engine(model, ops=torch_ops))
    expected = generator.generate(prompts, 8)
    model.train()
    assert generator.generate(prompts, 8) == expected
    assert generator.engine.decoder is not None
    assert all(modes(model))


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize(
    ("value", "sample"),
    [
        (float("nan"), greedy),
        (float("-inf"), greedy),
        (float("inf"), make_sampler(1.0, top_k=5)),
        (float("nan"), make_sampler(1.0, seed=1)),
    ],
)
def test_logits_that_are_no_numbers_are_refused(
    value: float, sample: Sampler, fast: bool, prompts: list[list[int]]
) -> None:
    """As soon as a prompt's are: here after a token that is in the prompt, or was just made."""
    (free,) = Generator(bundled_model()).generate(prompts[:1], 12)
    at = next(i for i, token in enumerate(free) if token not in prompts[0] + free[:i])
    model = copy.deepcopy(bundled_model())
    model.model.embed_tokens.weight.data[free[at]] = value
    generator = Generator(model, engine=Engine(model, ops=torch_ops) if fast else None)
    said = "token 1 of prompt 2 .* NaN or infinite.*bfloat16"
    with pytest.raises(RunError, match=said) as caught:
        generator.generate([[5], [5, free[at]]], 4, sample)
    assert "\n" not in str(caught.value)
    if sample is greedy:
        stream = generator.stream(prompts[:1], 12)
        assert [next(stream)[0] for _ in range(at + 1)] == free[: at + 1]
        with pytest.raises(RunError, match=f"token {at + 2} of prompt 1 "):
            next(stream)
        # Nothing follows the last token, so its logits are not looked at.
        assert generator.generate(prompts[:1], at + 1) == [free[: at + 1]]


def test_a_sampler_may_mask_logits(generator: Generator, prompts: list[list[int]]) -> None:
    def even(logits_BV: torch.Tensor, seen_BV: torch.Tensor) -> torch.Tensor:
        logits_BV[:, 1::2] = float("-inf")
        return greedy(logits_BV, seen_BV)

    made = generator.generate(prompts, 5, even)
    assert [len(ids) for ids in made] == [5] * len(prompts)
    assert not any(token % 2 for ids in made for token in ids)
