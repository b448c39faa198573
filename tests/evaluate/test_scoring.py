"""Log-probabilities of continuations, by the engine and by its twin, the plain way."""

from collections.abc import Callable
from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
from gpu_fixtures import with_engine
from text_fixtures import bundled_model
from torch import nn

from deepseek_moe import DeepseekForCausalLM, Generator
from deepseek_moe.errors import RunError
from deepseek_moe.evaluate import scoring
from deepseek_moe.evaluate.scoring import Answer, Pair, score

Way = Callable[[DeepseekForCausalLM], Generator]


def plainly(model: DeepseekForCausalLM) -> Generator:
    return Generator(model, fast=False)


def in_small_chunks(model: DeepseekForCausalLM) -> Generator:
    return with_engine(model, chunk=16)


ways = pytest.mark.parametrize("way", [plainly, with_engine, in_small_chunks])


def answers(generator: Generator, pairs: list[Pair]) -> list[Answer]:
    return [answer for _, answer in sorted(score(generator, pairs))]


def one_by_one(model: DeepseekForCausalLM, pair: Pair) -> Answer:
    """All logits of the whole text."""
    with torch.no_grad():
        logs = model(torch.tensor([pair.read])).logits[0].double().log_softmax(-1)
    logs = logs[len(pair.context) - 1 :]
    nats = sum(logs[at, token].item() for at, token in enumerate(pair.continuation))
    return nats, logs.argmax(-1).tolist() == list(pair.continuation)


def pairs_of(vocabulary: int, context: int) -> list[Pair]:
    """Contexts of several lengths, the longest up to the model's limit, with two continuations
    each, and some that stand alone, are of one token, or stand twice."""
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(vocabulary, (length,), generator=generator).tolist())

    found = []
    for length in (1, 3, 17, 40):
        before = ids(length)
        found += [Pair(before, ids(4)), Pair(before, ids(7)), Pair(before, ids(1))]
    limit = ids(context - 1)
    found += [
        Pair(limit, ids(2)),
        Pair(limit[:3], ids(context - 2)),
        Pair(ids(5), ids(9)),
        found[4],
    ]
    return found


@ways
@pytest.mark.parametrize("most", [20, 8192])
def test_equals_all_logits_of_each_text(way, most, tiny_model, monkeypatch):
    monkeypatch.setattr(scoring, "MOST_ON_CPU", most)
    model = tiny_model()
    pairs = pairs_of(96, 64)
    wanted = [one_by_one(model, pair) for pair in pairs]
    pairs[3:3] = [Pair((5,), ())]
    wanted[3:3] = [(0.0, True)]
    found = answers(way(model), pairs)
    assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in wanted], rel=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]


@ways
def test_the_likeliest_continuation_is_known(way):
    model = bundled_model()
    context = (4094, 17, 250, 31)
    (made,) = Generator(model, fast=False).generate([list(context)], 5)
    last = (*made[:-1], (made[-1] + 1) % 4000)
    found = answers(way(model), [Pair(context, tuple(made)), Pair(context, last)])
    assert [greedy for _, greedy in found] == [True, False]


def test_a_shared_context_is_read_once_and_no_other_logits_are_made(tiny_model):
    model, pairs = tiny_model(), pairs_of(96, 64)
    fast = with_engine(model)
    decoder, read, heads = fast.engine.decoder, [], []
    prefill, logits = decoder.prefill, decoder.logits
    with (
        patch.object(decoder, "prefill", lambda ids, *a: read.append(len(ids)) or prefill(ids, *a)),
        patch.object(decoder, "logits", lambda x: heads.append(len(x)) or logits(x)),
    ):
        answers(fast, pairs)
    contexts = {pair.context for pair in pairs}
    rest = sum(len(pair.continuation) - 1 for pair in pairs)
    assert sum(read) == sum(map(len, contexts)) + rest
    assert sum(heads) == sum(len(pair.continuation) for pair in pairs)
    model.lm_head.register_forward_hook(lambda _, given, __: heads.append(-given[0].shape[0]))
    answers(plainly(model), pairs)
    assert sum(heads) == 0


def test_batches_hold_what_fits_and_keep_contexts_together():
    pairs = pairs_of(96, 64) * 2
    batches = list(scoring._batches(pairs, 100))
    assert sorted(p for batch in batches for p in batch) == list(range(len(pairs)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(len(pairs[p].read) for p in batch) <= 100
    order = [pairs[p].context for batch in batches for p in batch]
    changes = sum(one != other for one, other in pairwise(order))
    assert changes == len(set(order)) - 1


def test_the_model_counts_as_it_is_now(tiny_model):
    model, pairs = tiny_model(), pairs_of(96, 64)
    fast = with_engine(model)
    before = answers(fast, pairs)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.flip(0))
    after = answers(fast, pairs)
    assert after != before
    wanted = [one_by_one(model, pair)[0] for pair in pairs]
    assert [nats for nats, _ in after] == pytest.approx(wanted, rel=1e-5)


@ways
def test_weights_that_are_broken_are_an_error(way, tiny_model):
    model = tiny_model()
    model.lm_head.weight.data[3] = torch.nan
    with pytest.raises(RunError, match="logits are NaN"):
        answers(way(model), [Pair((1, 2), (3, 4))])
