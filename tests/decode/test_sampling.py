"""Samplers against transformers' processors, in what they draw, and in what a CUDA graph allows."""

from unittest.mock import patch

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from deepseek_moe.decode.sampling import BROKEN, Sampling, draw, mark_broken, sum_rows
from deepseek_moe.errors import UserError

NAN, INF = float("nan"), float("inf")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unseen(logits: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(logits, dtype=torch.bool)


# Against transformers

B, V = 6, 512
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
        {"temperature": 3.0},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 2.0, "top_p": 0.9},  # the temperature comes before top_p
        {"temperature": 1.0, "top_p": 1e-6},
        {"temperature": 1.0, "top_k": 1000, "top_p": 0.8},
        {"temperature": 2.0, "top_p": 0.7, "min_p": 0.05},  # top_p counts what min_p drops
        {"temperature": 1.0, "repetition_penalty": 0.5},
        {"temperature": 1.5, "repetition_penalty": 2.0, "top_k": 50, "top_p": 0.9, "min_p": 0.02},
    ],
    ids=str,
)
def test_the_distribution_is_that_of_transformers(options):
    logits = torch.randn(B, V, generator=seeded(0)) * 3
    # Each row saw its likeliest ids, positive, and others, some twice; the next rows did not.
    text = torch.cat([logits.topk(2).indices, torch.randint(V, (B, 40), generator=seeded(0))], -1)
    seen = unseen(logits).scatter(1, text, True)
    processors = [make(options[name]) for name, make in PROCESSORS.items() if name in options]
    expected = LogitsProcessorList(processors)(text, logits.clone()).softmax(-1)

    weights, ids = Sampling(**options).distribution(logits, seen)
    ids = torch.arange(V).expand(B, V) if ids is None else ids
    probs = torch.zeros(B, V).scatter(1, ids, weights)
    probs /= probs.sum(-1, keepdim=True)
    assert ((probs > 0) == (expected > 0)).all()
    torch.testing.assert_close(probs, expected, rtol=1e-4, atol=1e-8)

    drawn = ids.gather(1, torch.multinomial(weights, 1, generator=seeded(7))).squeeze(1)
    assert Sampling(**options, seed=7)(logits, seen).equal(drawn)
    assert Sampling(**options | {"temperature": 0.0})(logits, seen).equal(expected.argmax(-1))


def test_no_more_than_top_k_stay_where_logits_are_equal():
    logits = torch.zeros(1, 10)
    weights, ids = Sampling(1.0, top_k=3).distribution(logits, unseen(logits))
    assert weights.tolist() == [pytest.approx([1 / 3] * 3)]
    assert len(set(ids[0].tolist())) == 3


# Extreme values


@pytest.mark.parametrize("penalty", [1e-300, 1e-40, 1.0, 1e40, 1e300])
@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1e-45, 1e-4, 1.0, 1e300])
def test_extreme_values_leave_no_nan(penalty, temperature):
    logits = torch.tensor([[50.0, 0.0, -50.0, -1.0]])
    sample = Sampling(temperature, repetition_penalty=penalty)
    for row in ([True] * 4, [False] * 4, [True, True, False, False]):
        seen = torch.tensor([row])
        weights = sample.distribution(logits, seen)[0]
        assert weights.isfinite().all() and weights.any()
        assert sample(logits, seen).item() in range(4)
        if penalty == 1 and temperature < 1:
            assert sample(logits, seen).item() == 0
        if penalty == 1 and temperature > 1:
            assert weights.tolist() == [[0.25] * 4]


@pytest.mark.parametrize("noise", [0.0, 1e-45, 30.0])
def test_weight_0_is_not_drawn_whatever_the_noise(monkeypatch, noise):
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda x, **_: x.fill_(noise))
    weights = torch.tensor([[0.0, 1e-30, 0.0], [0.0, 0.0, 1.0], [0.5, 0.0, 0.0]])
    assert draw(weights).tolist() == [1, 2, 0]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", (-0.1, NAN, INF)),
        ("top_p", (0.0, 1.01, NAN)),
        ("top_k", (-1,)),
        ("min_p", (-0.01, 1.01, NAN)),
        ("repetition_penalty", (0.0, -1.0, NAN, INF)),
        ("seed", (-1, 2**64)),
    ],
)
def test_impossible_sampling_values(name, values):
    for value in values:
        with pytest.raises(UserError, match=f"^{name} is .*must be") as caught:
            Sampling(**{name: value})
        assert "\n" not in str(caught.value)


def test_rows_with_a_logit_that_is_no_number_are_marked():
    """One of a row as large as the official vocabulary, and all of a row."""
    logits_BV = torch.randn(8, 102400) * 1e4
    for row, value in enumerate((NAN, INF, -INF)):
        logits_BV[row, 70000] = value
        logits_BV[3 + row] = value
    ids_B = torch.arange(8)
    assert mark_broken(ids_B, sum_rows(logits_BV)) == [BROKEN] * 6 + [6, 7]
    assert mark_broken(ids_B, sum_rows(logits_BV[:, :70001])) == [BROKEN] * 6 + [6, 7]


# Seeds


def test_a_seed_makes_the_draws_repeatable():
    logits, device = torch.zeros(16, 50), torch.device("cpu")
    torch.manual_seed(5)
    state = torch.get_rng_state()

    def draws(seed: int) -> list[list[int]]:
        sample = Sampling(1.0, top_k=20, seed=seed)
        assert sample.generator(device).initial_seed() == seed
        return [sample(logits, unseen(logits)).tolist() for _ in range(3)]

    first = draws(7)
    assert first == draws(7) != draws(8)
    assert first[0] != first[1] != first[2]
    assert torch.get_rng_state().equal(state)
    assert len({Sampling(1.0, seed=4), Sampling(1.0, seed=4)}) == 2  # not one stream


def test_without_a_seed_the_draws_are_those_of_the_default_generator():
    logits, sample = torch.zeros(16, 50), Sampling(1.0)
    assert sample.generator(torch.device("cpu")) is None
    torch.manual_seed(5)
    first = sample(logits, unseen(logits))
    assert not sample(logits, unseen(logits)).equal(first)
    torch.manual_seed(5)
    assert sample(logits, unseen(logits)).equal(first)


# On a GPU


@pytest.mark.parametrize(
    ("options", "unneeded"),
    [
        ({"repetition_penalty": 1.5}, ("sort", "topk")),
        ({"temperature": 1.0, "min_p": 0.1, "top_k": 1000}, ("sort", "topk")),
        ({"temperature": 1.0, "top_k": 9, "top_p": 0.5, "min_p": 0.1}, ("sort",)),
        ({"temperature": 1.0, "top_p": 0.5, "top_k": 1000}, ("topk",)),
    ],
    ids=str,
)
def test_nothing_waits_for_a_value_or_is_ordered_without_need(options, unneeded):
    """Tensors on the device `meta` have no values that anything could wait for."""
    logits = torch.empty(3, 200, device="meta")
    seen = torch.empty(3, 200, device="meta", dtype=torch.bool)
    with patch.multiple(torch.Tensor, multinomial=None, **dict.fromkeys(unneeded)):
        ids = Sampling(**options)(logits, seen)
    assert (ids.device.type, ids.shape, ids.dtype) == ("meta", (3,), torch.int64)
