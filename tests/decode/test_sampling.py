"""Samplers against transformers' processors, in what they draw, and in what a CUDA graph allows."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from deepseek_moe.decode.sampling import (
    BROKEN,
    Sampler,
    Sampling,
    draw,
    greedy,
    make_sampler,
    mark_broken,
    sum_rows,
)
from deepseek_moe.errors import UserError

PROBS = torch.tensor([0.05, 0.5, 0.15, 0.3])  # by rank: 1, 3, 2, 0
NAN, INF = float("nan"), float("inf")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unseen(logits: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(logits, dtype=torch.bool)


def drawn(sample: Sampler, rows: int = 4000) -> list[float]:
    """The share of each id in what is drawn with PROBS."""
    logits = PROBS.log().expand(rows, -1)
    ids = sample(logits, unseen(logits))
    assert (ids.shape, ids.dtype) == ((rows,), torch.int64)
    return (ids.bincount(minlength=len(PROBS)) / rows).tolist()


# Against transformers

B, V = 6, 300
PROCESSORS = {  # in the order of `generate`
    "repetition_penalty": RepetitionPenaltyLogitsProcessor,
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
}


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.3},
        {"temperature": 3.0},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1.0, "top_k": 7},
        {"temperature": 1.0, "top_k": 1000},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 2.0, "top_p": 0.9},  # the temperature comes before top_p
        {"temperature": 1.0, "top_p": 1e-6},
        {"temperature": 1.0, "top_k": 20, "top_p": 0.8},
        {"temperature": 1.0, "top_k": 1000, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 1.0, "min_p": 1.0},
        {"temperature": 3.0, "min_p": 0.1},
        {"temperature": 2.0, "top_p": 0.7, "min_p": 0.05},  # top_p counts what min_p drops
        {"temperature": 1.0, "repetition_penalty": 1.5},
        {"temperature": 1.0, "repetition_penalty": 0.5},
        {"temperature": 1.5, "repetition_penalty": 2.0, "top_k": 50, "top_p": 0.9, "min_p": 0.02},
    ],
    ids=str,
)
def test_the_distribution_is_that_of_transformers(options: dict[str, Any]) -> None:
    logits = torch.randn(B, V, generator=seeded()) * 3
    # Each row saw its likeliest ids, positive, and others, some twice; the next rows did not.
    text = torch.cat([logits.topk(2).indices, torch.randint(V, (B, 40), generator=seeded())], -1)
    seen = unseen(logits).scatter(1, text, True)
    processors = [make(options[name]) for name, make in PROCESSORS.items() if name in options]
    expected = LogitsProcessorList(processors)(text, logits.clone()).softmax(-1)

    weights, ids = make_sampler(**options).distribution(logits, seen)
    probs = torch.zeros(B, V).scatter(
        1, torch.arange(V).expand(B, V) if ids is None else ids, weights
    )
    probs /= probs.sum(-1, keepdim=True)
    assert ((probs > 0) == (expected > 0)).all()
    torch.testing.assert_close(probs, expected, rtol=1e-4, atol=1e-8)


def test_the_penalty_is_applied_at_temperature_0() -> None:
    logits = torch.tensor(
        [[2.0, 1.5, -1.0], [2.0, 1.5, -1.0], [-1.0, -1.5, -2.5], [-1.0, -1.5, -9.0]]
    )
    seen = torch.tensor([[True, False, False], [False] * 3, [True, True, False], [True] * 3])
    sample = make_sampler(repetition_penalty=2.0)
    assert sample(logits, seen).tolist() == [1, 0, 0, 0]
    assert make_sampler(repetition_penalty=3.0)(logits, seen).tolist() == [1, 0, 2, 0]
    assert make_sampler(repetition_penalty=0.5)(-logits, ~seen).tolist()[1] == 2
    assert greedy(logits, seen).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("penalty", [1e-300, 1e-40, 1e40, 1e300])
@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1.0, 1e300])
def test_an_extreme_penalty_leaves_no_nan(penalty: float, temperature: float) -> None:
    logits = torch.tensor([[50.0, 0.0, -50.0, -1.0]])
    sample = Sampling(temperature, repetition_penalty=penalty)
    for row in ([True] * 4, [False] * 4, [True, True, False, False]):
        seen = torch.tensor([row])
        assert not sample.distribution(logits, seen)[0].isnan().any()
        assert sample(logits, seen).item() in range(4)


def test_no_more_than_top_k_stay_where_logits_are_equal() -> None:
    logits = torch.zeros(1, 10)
    weights, ids = Sampling(1.0, top_k=3).distribution(logits, unseen(logits))
    assert weights.tolist() == [pytest.approx([1 / 3] * 3)]
    assert len(set(ids[0].tolist())) == 3


# What is drawn


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
        ({"min_p": 0.09}, {0, 1, 2, 3}),
        ({"min_p": 0.11}, {1, 2, 3}),
        ({"min_p": 0.59}, {1, 3}),
        ({"min_p": 1.0}, {1}),
        ({"min_p": 0.11, "top_k": 2}, {1, 3}),
        ({"min_p": 0.31, "top_p": 0.96}, {1, 3}),
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
    logits = torch.randn(8, 100, generator=seeded()) * 20
    sample = make_sampler(temperature, seed=0)
    assert sample(logits, unseen(logits)).tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [1e6, 1e38, 1e300])
def test_a_huge_temperature_draws_evenly(temperature: float) -> None:
    assert drawn(make_sampler(temperature, seed=0)) == pytest.approx([0.25] * 4, abs=0.03)


def test_top_k_1_is_greedy() -> None:
    logits = torch.randn(8, 100, generator=seeded())
    sample = make_sampler(5.0, top_k=1)
    assert sample(logits, unseen(logits)).tolist() == logits.argmax(-1).tolist()


def test_rows_are_drawn_independently() -> None:
    """Of pairs of rows of one distribution, as many agree as chance says; each row has its own."""
    ids = make_sampler(1.0, seed=0)(PROBS.log().expand(8000, -1), None).view(-1, 2)
    agree = (ids[:, 0] == ids[:, 1]).float().mean().item()
    assert agree == pytest.approx(PROBS.square().sum().item(), abs=0.03)
    own = torch.randint(50, (100,), generator=seeded())
    logits = torch.zeros(100, 50).scatter(1, own[:, None], 100.0)
    for limits in ({}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.5}):
        assert make_sampler(1.0, **limits)(logits, unseen(logits)).equal(own)


def test_a_draw_is_that_of_multinomial() -> None:
    probs = torch.rand(64, 500, generator=seeded())
    expected = torch.multinomial(probs, 1, generator=seeded(3)).squeeze(-1)
    assert draw(probs, seeded(3)).equal(expected)


@pytest.mark.parametrize("noise", [0.0, 1e-45, 30.0])
def test_weight_0_is_not_drawn_whatever_the_noise(
    monkeypatch: pytest.MonkeyPatch, noise: float
) -> None:
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda x, **_: x.fill_(noise))
    weights = torch.tensor([[0.0, 1e-30, 0.0], [0.0, 0.0, 1.0], [0.5, 0.0, 0.0]])
    assert draw(weights).tolist() == [1, 2, 0]


# Seeds


@pytest.mark.parametrize("limits", [{}, {"top_k": 20}, {"top_p": 0.5}], ids=str)
def test_a_seed_makes_the_draws_repeatable(limits: dict[str, float]) -> None:
    logits = torch.zeros(16, 50)

    def draws(seed: int) -> list[list[int]]:
        sample = make_sampler(1.0, seed=seed, **limits)
        return [sample(logits, unseen(logits)).tolist() for _ in range(3)]

    first = draws(7)
    assert first == draws(7) != draws(8)
    assert first[0] != first[1] != first[2]


def test_a_seed_is_untouched_by_other_draws_and_no_seed_is_the_default_generator() -> None:
    logits = torch.zeros(16, 50)
    with_seed, without = make_sampler(1.0, seed=1), make_sampler(1.0)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = with_seed(logits, None)
    assert torch.get_rng_state().equal(state)
    free = without(logits, None)
    assert not torch.get_rng_state().equal(state)
    torch.manual_seed(5)
    assert without(logits, None).equal(free)
    assert make_sampler(1.0, seed=1)(logits, None).equal(first)


def test_the_generator_is_one_for_each_device() -> None:
    sample = make_sampler(1.0, seed=4)
    generator = sample.generator(torch.device("cpu"))
    assert generator.initial_seed() == 4
    state = generator.get_state()
    sample(torch.zeros(2, 9), None)
    assert sample.generator(torch.device("cpu")) is generator
    assert not generator.get_state().equal(state)
    assert make_sampler(1.0).generator(torch.device("cpu")) is None
    assert len({make_sampler(1.0, seed=4), make_sampler(1.0, seed=4)}) == 2  # not one stream


# On a GPU


class Recorded(TorchDispatchMode):
    """The names of what runs; every tensor that takes part is on the device `meta`, which has no
    values that anything could wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        assert {x.device.type for x in tensors} == {"meta"}, func
        self.names.append(func.overloadpacket.__name__)
        return out


@pytest.mark.parametrize(
    ("options", "ordered_by"),
    [
        ({}, set()),
        ({"repetition_penalty": 1.5}, set()),
        ({"temperature": 1.0}, set()),
        ({"temperature": 1.0, "min_p": 0.1, "repetition_penalty": 1.5}, set()),
        ({"temperature": 1.0, "top_k": 1000}, set()),
        ({"temperature": 1.0, "top_k": 9}, {"topk"}),
        ({"temperature": 1.0, "top_k": 9, "top_p": 0.5, "min_p": 0.1}, {"topk"}),
        ({"temperature": 1.0, "top_p": 0.5}, {"sort"}),
        ({"temperature": 1.0, "top_p": 0.5, "top_k": 1000}, {"sort"}),
    ],
    ids=str,
)
def test_all_stays_on_the_device_and_orders_no_more_than_needed(
    options: dict[str, Any], ordered_by: set[str]
) -> None:
    logits = torch.empty(3, 200, device="meta")
    seen = torch.empty(3, 200, device="meta", dtype=torch.bool)
    with Recorded() as recorded:
        ids = make_sampler(**options)(logits, seen)
    assert (ids.shape, ids.dtype) == ((3,), torch.int64)
    assert {"sort", "topk"} & set(recorded.names) == ordered_by
    assert "multinomial" not in recorded.names  # its checks cost more than the draw


# What is asked for


def test_greedy_unless_asked_otherwise() -> None:
    assert make_sampler() is greedy
    assert make_sampler(top_k=5, top_p=0.5, min_p=0.1, seed=1) is greedy
    assert isinstance(make_sampler(repetition_penalty=1.1), Sampling)
    assert isinstance(make_sampler(0.1), Sampling)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", NAN),
        ("temperature", INF),
        ("top_p", 0.0),
        ("top_p", -1.0),
        ("top_p", 1.01),
        ("top_p", NAN),
        ("top_k", -1),
        ("min_p", -0.01),
        ("min_p", 1.01),
        ("min_p", NAN),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", NAN),
        ("repetition_penalty", INF),
        ("seed", -1),
        ("seed", 2**64),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_impossible_sampling_values(name: str, value: float, temperature: float) -> None:
    with pytest.raises(UserError, match=f"^{name} is .*must be") as caught:
        make_sampler(**{"temperature": temperature, name: value})
    assert "\n" not in str(caught.value)


def test_rows_with_a_logit_that_is_no_number_are_marked() -> None:
    """One of a row as large as the official vocabulary, and all of a row."""
    inf, nan = float("inf"), float("nan")
    logits_BV = torch.randn(8, 102400) * 1e4
    for row, value in enumerate((nan, inf, -inf)):
        logits_BV[row, 70000] = value
        logits_BV[3 + row] = value
    ids_B = torch.arange(8)
    assert mark_broken(ids_B, sum_rows(logits_BV)) == [BROKEN] * 6 + [6, 7]
    assert mark_broken(ids_B, sum_rows(logits_BV[:, :70001])) == [BROKEN] * 6 + [6, 7]
