"""Generation against transformers' own, on the bundled model; sampling; impossible requests."""

from collections.abc import Callable

import pytest
import torch
from text_fixtures import BUNDLED, bundled_model, tokenizer_of

from deepseek_moe.errors import UserError
from deepseek_moe.generation import Generator, greedy, make_sampler

TEXTS = ["Once upon a time", "The", "It was a cold night, and nobody in the house could sleep. He"]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    ids = tokenizer_of(BUNDLED)(TEXTS).input_ids
    assert len({len(one) for one in ids}) == len(ids)
    return ids


@pytest.fixture
def generator() -> Generator:
    return Generator(bundled_model())


def by_transformers(prompts: list[list[int]], new: int) -> list[list[int]]:
    tokenizer, longest = tokenizer_of(BUNDLED), max(map(len, prompts))
    batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
    out = bundled_model().generate(**batch, do_sample=False, max_new_tokens=new, eos_token_id=-1)
    return out[:, longest:].tolist()


@pytest.mark.parametrize("text", range(len(TEXTS)))
def test_greedy_equals_transformers(
    generator: Generator, prompts: list[list[int]], text: int
) -> None:
    one = [prompts[text]]
    assert generator.generate(one, 12) == by_transformers(one, 12)


def test_greedy_batch_equals_transformers(generator: Generator, prompts: list[list[int]]) -> None:
    assert generator.generate(prompts, 12) == by_transformers(prompts, 12)


def test_batch_equals_single(generator: Generator, prompts: list[list[int]]) -> None:
    single = [generator.generate([prompt], 12)[0] for prompt in prompts]
    assert generator.generate(prompts, 12) == single
    assert generator.generate(prompts[::-1], 12) == single[::-1]


def test_stream_yields_what_generate_returns(
    generator: Generator, prompts: list[list[int]]
) -> None:
    steps = list(generator.stream(prompts, 6))
    assert [list(ids) for ids in zip(*steps, strict=True)] == generator.generate(prompts, 6)


def test_stream_gives_each_token_before_it_computes_the_next(
    generator: Generator, prompts: list[list[int]]
) -> None:
    calls = []

    def counting(logits: torch.Tensor) -> torch.Tensor:
        calls.append(logits.shape)
        return greedy(logits)

    stream = generator.stream(prompts, 5, counting)
    for n in range(1, 6):
        next(stream)
        assert calls == [(len(prompts), bundled_model().config.vocab_size)] * n
    assert next(stream, "end") == "end"


@pytest.mark.parametrize("new", [1, 2, 9])
def test_max_new_tokens(generator: Generator, prompts: list[list[int]], new: int) -> None:
    assert [len(ids) for ids in generator.generate(prompts, new)] == [new] * len(prompts)


def test_a_stop_id_ends_its_sequence_alone(generator: Generator, prompts: list[list[int]]) -> None:
    free = generator.generate(prompts, 12)
    stop = next(t for t in free[0][3:] if free[0].index(t) >= 3)
    expected = [ids[: ids.index(stop)] if stop in ids else ids for ids in free]
    assert generator.generate(prompts, 12, stop_ids={stop}) == expected
    single = [generator.generate([prompt], 12, stop_ids={stop})[0] for prompt in prompts]
    assert single == expected


def test_ended_sequences_yield_none(generator: Generator, prompts: list[list[int]]) -> None:
    second = generator.generate(prompts[:1], 2)[0][1]
    others = [p for p in prompts[1:] if second not in generator.generate([p], 4)[0]]
    steps = list(generator.stream([prompts[0], *others], 4, stop_ids={second}))
    assert others
    assert [step[0] is None for step in steps] == [False, True, True, True]
    assert all(None not in step[1:] for step in steps)


def test_nothing_is_yielded_where_all_stop_at_once(
    generator: Generator, prompts: list[list[int]]
) -> None:
    first = {ids[0] for ids in generator.generate(prompts, 1)}
    assert list(generator.stream(prompts, 9, stop_ids=first)) == []
    assert generator.generate(prompts, 9, stop_ids=first) == [[]] * len(prompts)


def test_a_full_context_ends_its_sequence_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundled_model().config, "max_position_embeddings", 12)
    generator = Generator(bundled_model())
    prompts = [[5] * 3, [6] * 10, [7] * 11]
    together = generator.generate(prompts, 100)
    assert [len(ids) for ids in together] == [9, 2, 1]
    assert together == [generator.generate([prompt], 100)[0] for prompt in prompts]


def test_the_last_place_of_the_real_context_can_be_used(generator: Generator) -> None:
    assert generator.context == 1024
    assert len(generator.generate([[5] * 1023], 10)[0]) == 1


def test_a_seed_repeats_the_whole_text(generator: Generator, prompts: list[list[int]]) -> None:
    def sampled(seed: int) -> list[list[int]]:
        return generator.generate(prompts, 12, make_sampler(1.0, seed=seed))

    assert sampled(1) == sampled(1) != sampled(2)


@pytest.mark.parametrize(
    ("prompts", "new", "said"),
    [
        ([], 5, "empty"),
        ([[]], 5, "empty"),
        ([[5], []], 5, "empty"),
        ([[5] * 1024], 5, "1024 tokens.*context is 1024.*shorten"),
        ([[5], [5] * 3000], 5, "3000 tokens.*context is 1024.*shorten"),
        ([[5]], 0, "max_new_tokens is 0"),
        ([[5]], -3, "max_new_tokens is -3"),
    ],
)
def test_impossible_requests(
    generator: Generator, prompts: list[list[int]], new: int, said: str
) -> None:
    with pytest.raises(UserError, match=said) as caught:
        generator.generate(prompts, new)
    assert "\n" not in str(caught.value)


PROBS = torch.tensor([0.05, 0.5, 0.15, 0.3])  # by rank: 1, 3, 2, 0


def drawn(sample: Callable[[torch.Tensor], torch.Tensor], rows: int = 4000) -> list[float]:
    """The share of each id in what is drawn with PROBS."""
    ids = sample(PROBS.log().expand(rows, -1))
    assert ids.shape == (rows,)
    return (ids.bincount(minlength=len(PROBS)) / rows).tolist()


@pytest.mark.parametrize(
    ("limits", "kept"),
    [
        ({}, {0, 1, 2, 3}),
        ({"top_k": 1}, {1}),
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 3}, {1, 2, 3}),
        ({"top_k": 99}, {0, 1, 2, 3}),
        ({"top_p": 1e-9}, {1}),
        ({"top_p": 0.49}, {1}),
        ({"top_p": 0.51}, {1, 3}),
        ({"top_p": 0.79}, {1, 3}),
        ({"top_p": 0.81}, {1, 2, 3}),
        ({"top_p": 0.96}, {0, 1, 2, 3}),
        ({"top_p": 0.96, "top_k": 2}, {1, 3}),
        ({"top_p": 0.4, "top_k": 3}, {1}),
        # top_p counts what top_k leaves: 0.5 / 0.8 alone is above 0.6.
        ({"top_p": 0.6, "top_k": 2}, {1}),
    ],
)
def test_limits_keep_the_likeliest_in_proportion(limits: dict[str, float], kept: set[int]) -> None:
    shares = drawn(make_sampler(1.0, seed=0, **limits))
    expected = torch.tensor([p if i in kept else 0.0 for i, p in enumerate(PROBS.tolist())])
    assert {i for i, share in enumerate(shares) if share} == kept
    assert shares == pytest.approx((expected / expected.sum()).tolist(), abs=0.03)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_divides_the_logits(temperature: float) -> None:
    shares = drawn(make_sampler(temperature, seed=0))
    expected = (PROBS.log() / temperature).softmax(-1)
    assert shares == pytest.approx(expected.tolist(), abs=0.03)


@pytest.mark.parametrize("temperature", [0.0, 1e-4, 1e-30, 1e-45, 1e-300])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = torch.randn(8, 100, generator=torch.Generator().manual_seed(0)) * 20
    sample = make_sampler(temperature, seed=0)
    assert sample(logits).tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [1e6, 1e38, 1e300])
def test_a_huge_temperature_draws_evenly(temperature: float) -> None:
    assert drawn(make_sampler(temperature, seed=0)) == pytest.approx([0.25] * 4, abs=0.03)


def test_top_k_1_is_greedy() -> None:
    logits = torch.randn(8, 100, generator=torch.Generator().manual_seed(0))
    assert make_sampler(5.0, top_k=1)(logits).tolist() == logits.argmax(-1).tolist()


def test_a_seed_makes_the_draws_repeatable() -> None:
    logits = torch.zeros(16, 50)

    def draws(seed: int) -> list[list[int]]:
        sample = make_sampler(1.0, seed=seed)
        return [sample(logits).tolist() for _ in range(3)]

    first = draws(7)
    assert first == draws(7) != draws(8)
    assert first[0] != first[1] != first[2]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", -1.0),
        ("top_p", 1.01),
        ("top_p", float("nan")),
        ("top_k", -1),
        ("seed", 2**64),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_impossible_sampling_values(name: str, value: float, temperature: float) -> None:
    with pytest.raises(UserError, match=name) as caught:
        make_sampler(**{"temperature": temperature, name: value})
    assert "must be" in str(caught.value)
    assert "\n" not in str(caught.value)
