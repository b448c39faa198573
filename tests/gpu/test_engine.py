"""The engine computes what the plain way computes, on the bundled model or, by --model, another.

Letters: N steps, B sequences, V vocabulary.
"""

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from gpu_fixtures import (
    LOGITS,
    Ids,
    Poison,
    TwoWays,
    assert_same_up_to_ties,
    distance,
    logits_before,
    near_tie,
    two_ways,
    with_engine,
)

from deepseek_moe.decode.engine import Rows, size_for
from deepseek_moe.decode.generation import Generator
from deepseek_moe.decode.sampling import Sampler, greedy, make_sampler
from deepseek_moe.files import BUNDLED_MODEL

TIES = 0.02
"""The share of ids that may be others than the plain way's because of a near-tie."""
BATCHES = (1, 3, 20)
"""One sequence, a padded batch, and one that takes the way of many tokens."""
SAMPLINGS = (
    {"temperature": 1.0},
    {"temperature": 0.8, "top_k": 20},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 1.0, "min_p": 0.05},
    {"repetition_penalty": 1.3},
    {"temperature": 0.9, "top_k": 50, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2},
)


@pytest.fixture
def pair(device: torch.device, dtype: str) -> TwoWays:
    return two_ways(str(BUNDLED_MODEL), device, dtype)


def assert_captured(generator: Generator, batch: int, sample: Sampler) -> None:
    """On a GPU the last steps were one graph, with the sampler inside."""
    engine = generator.engine
    assert not engine.fast or engine.graphs.get((size_for(batch), sample)) is not None


@pytest.mark.parametrize("batch", [*BATCHES, 256])
def test_greedy_ids(batch: int, pair: TwoWays, new_tokens: int) -> None:
    if batch == 256 and not pair.fast.engine.fast:
        pytest.skip("a CPU takes half a minute")
    new = 8 if batch == 256 else new_tokens
    prompts = pair.prompts(batch)
    ours = pair.fast.generate(prompts, new)
    assert_captured(pair.fast, batch, greedy)
    logits_NBV = logits_before(pair.plain, prompts, ours)
    chosen_NB1 = torch.tensor(ours, device=logits_NBV.device).T[..., None]
    behind_NB = logits_NBV.amax(-1) - logits_NBV.gather(-1, chosen_NB1)[..., 0]
    assert (behind_NB <= near_tie(logits_NBV, pair.model.dtype)).all(), behind_NB.max()
    assert (behind_NB > 0).float().mean() <= TIES
    theirs = pair.plain.generate(prompts, new)
    assert_same_up_to_ties(ours, theirs, logits_NBV, pair.model.dtype)


def test_a_wrong_engine_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """This tries the tests themselves, on a CPU."""
    pair = TwoWays(str(BUNDLED_MODEL), torch.device("cpu"), "float32")
    test_greedy_ids(3, pair, 6)
    assert_logits_agree(pair, 3, 4)
    decoder = pair.fast.engine.decoder
    attend = decoder.ops.attend
    too_sharp = SimpleNamespace(**vars(decoder.ops))
    too_sharp.attend = lambda q_TD, *args: attend(1.5 * q_TD, *args)
    monkeypatch.setattr(decoder, "ops", too_sharp)
    with pytest.raises(AssertionError):
        test_greedy_ids(3, pair, 6)
    with pytest.raises(AssertionError, match="by step"):
        assert_logits_agree(pair, 3, 4)


@pytest.mark.parametrize("batch", BATCHES)
def test_two_runs_are_equal_bit_for_bit(batch: int, pair: TwoWays, new_tokens: int) -> None:
    prompts = pair.prompts(batch)
    first, second = (pair.fast.generate(prompts, new_tokens) for _ in range(2))
    assert first == second
    assert torch.equal(*(logits_before(pair.fast, prompts, first) for _ in range(2)))


def test_a_batch_gives_what_each_prompt_gives_alone_and_in_pieces(
    pair: TwoWays, new_tokens: int
) -> None:
    prompts = pair.prompts(20)
    together = pair.fast.generate(prompts, new_tokens)
    alone = [pair.fast.generate([prompt], new_tokens)[0] for prompt in prompts]
    pieces = with_engine(pair.model, chunk=5).generate(prompts, new_tokens)
    logits_NBV = logits_before(pair.fast, prompts, together)
    for ids in (alone, pieces):
        assert_same_up_to_ties(together, ids, logits_NBV, pair.model.dtype)


def test_sequences_that_end_leave_the_batch(
    pair: TwoWays, new_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They end before a stop id, and change nothing for the others."""
    prompts, engine = pair.prompts(20), pair.fast.engine
    whole = pair.fast.generate(prompts, new_tokens)
    logits_NBV = logits_before(pair.fast, prompts, whole)
    stops = {whole[b][b * new_tokens // len(whole)] for b in range(1, len(whole), 3)}
    sizes, step = [], engine.step
    counted = lambda size, sample: (sizes.append(size), step(size, sample))  # noqa: E731
    monkeypatch.setattr(engine, "step", counted)
    made = pair.fast.generate(prompts, new_tokens, stop_ids=stops)
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) > 1
    # `generate` does not tell the stop id that ended a row: it is the likeliest.
    for b, ids in enumerate(made):
        ends = [n for n, token in enumerate(whole[b]) if token in stops]
        whole[b] = whole[b][: ends[0] + 1] if ends else whole[b]
        if len(ids) < new_tokens:
            scores_V = logits_NBV[len(ids), b]
            ids.append(max(stops, key=scores_V.tolist().__getitem__))
    assert_same_up_to_ties(whole, made, logits_NBV, pair.model.dtype)


def test_unwritten_memory_changes_nothing(pair: TwoWays) -> None:
    assert_ignores_unwritten_memory(pair, BATCHES)


def assert_ignores_unwritten_memory(pair: TwoWays, batches: Sequence[int]) -> None:
    """Rows without a sequence, and memory that holds NaN before it is written, change no bit."""
    engine = pair.fast.engine

    @torch.inference_mode()
    def logits(prompts: Ids, rows: Rows) -> torch.Tensor:
        step_BV = engine.decoder.step(rows.ids, rows.position, rows.slot, engine.cache)
        return torch.cat([step_BV[: len(prompts)], engine.prefill(prompts)])

    for batch in batches:
        prompts = pair.prompts(batch)
        engine.start(prompts, greedy, 4)
        rows = engine.rows.first(size_for(batch))
        clean = logits(prompts, rows)
        with Poison():
            poisoned = logits(prompts, rows)
        assert torch.equal(clean, poisoned), f"batch {batch}: {distance(poisoned, clean):.3g}"


@pytest.mark.parametrize("options", SAMPLINGS, ids=lambda options: "-".join(options))
def test_sampling(options: dict[str, float], pair: TwoWays, new_tokens: int) -> None:
    """A seed draws the same ids in a graph and outside; without one, each time others."""
    prompts = pair.prompts(3)
    inside, outside, unseeded = (make_sampler(**options, seed=seed) for seed in (7, 7, None))
    ids = pair.fast.generate(prompts, new_tokens, inside)
    assert_captured(pair.fast, len(prompts), inside)
    again = pair.fast.generate(prompts, new_tokens, lambda logits, seen: outside(logits, seen))
    assert again == ids
    if "temperature" in options:
        first, second = (pair.fast.generate(prompts, new_tokens, unseeded) for _ in range(2))
        assert first != second and ids not in (first, second)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("weights", ["bfloat16", "float16", "int8", "int4"])
def test_logits(weights: str, batch: int, device: torch.device, dtype: str, new_tokens: int):
    quantization = weights if weights.startswith("int") else None
    if device.type == "cuda" and quantization is None:
        dtype = weights
    pair = two_ways(str(BUNDLED_MODEL), device, dtype, quantization)
    assert_logits_agree(pair, batch, new_tokens)


def assert_logits_agree(pair: TwoWays, batch: int, new: int) -> None:
    """After the prompts, and after each of `new` random ids.

    Single steps may be further apart than all together: a token whose last experts are nearly
    equal goes elsewhere.
    """
    prompts, ids = pair.prompts(batch), pair.random_ids(batch, new)
    ours, theirs = (logits_before(way, prompts, ids) for way in (pair.fast, pair.plain))
    steps = [f"{distance(x, y):.2g}" for x, y in zip(ours, theirs, strict=True)]
    assert distance(ours, theirs) <= LOGITS, f"batch {batch}, by step: {' '.join(steps[:20])}"


@pytest.mark.parametrize("sixteen_bits", ["bfloat16", "float16"])
def test_rounding_is_no_worse_than_the_plain_way(
    sixteen_bits: str, device: torch.device, new_tokens: int
) -> None:
    """The engine's logits are about as near to those in fp32 as the plain way's."""
    dtype = sixteen_bits if device.type == "cuda" else "float32"
    pair = two_ways(str(BUNDLED_MODEL), device, dtype)
    exact = two_ways(str(BUNDLED_MODEL), device, "float32")
    prompts, ids = pair.prompts(3), pair.random_ids(3, new_tokens)
    expected, ours, theirs = (
        logits_before(way, prompts, ids) for way in (exact.plain, pair.fast, pair.plain)
    )
    assert distance(ours, expected) <= 1.5 * distance(theirs, expected) + 1e-5


@pytest.mark.gpu
def test_another_model(request: pytest.FixtureRequest) -> None:
    """All checks in one test, so that only one process loads the model."""
    folder = request.config.getoption("--model")
    if not (folder and torch.cuda.is_available()):
        pytest.skip("no --model was given, or no GPU was found")
    pair, batches = TwoWays(folder, torch.device("cuda"), "auto"), (1, 8, 64)
    for batch in batches:
        assert_logits_agree(pair, batch, 4)
    assert_ignores_unwritten_memory(pair, batches)
