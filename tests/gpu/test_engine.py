"""The engine computes what the plain way computes, on the bundled model or, by --model, another.

Letters: N steps, B sequences, V vocabulary.
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import peft
import pytest
import torch
from finetune_fixtures import write_base
from gpu_fixtures import (
    LOGITS,
    Ids,
    Poison,
    TwoWays,
    assert_likeliest,
    distance,
    logits_before,
    two_ways,
    with_engine,
)
from transformers import PreTrainedModel

from deepseek_moe.bundled import BUNDLED_MODEL
from deepseek_moe.decode.engine import Rows, size_for
from deepseek_moe.decode.generation import Generator
from deepseek_moe.decode.sampling import Sampler, Sampling, greedy

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
LORA = peft.LoraConfig(r=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
CHANGES: dict[str, Callable[[PreTrainedModel], object]] = {
    "adapter": lambda model: peft.get_peft_model(model, LORA),
    "assigned state": lambda model: model.load_state_dict(
        {name: x.roll(1, 0) for name, x in model.state_dict().items()}, assign=True
    ),
    "weights in place": lambda model: [p.data.copy_(p.roll(1, 0)) for p in model.parameters()],
    "dtype": lambda model: model.to(torch.float16),
}


@pytest.fixture
def pair(device: torch.device, dtype: str) -> TwoWays:
    return two_ways(str(BUNDLED_MODEL), device, dtype)


def assert_captured(generator: Generator, batch: int, sample: Sampler) -> None:
    """On a GPU the last steps were one graph, with the sampler inside."""
    engine = generator.engine
    assert not engine.fast or engine.graphs.get((size_for(batch), sample)) is not None


@pytest.mark.parametrize("batch", [*BATCHES, 256])
def test_greedy_ids(batch, pair, new_tokens):
    if batch == 256 and not pair.fast.engine.fast:
        pytest.skip("a CPU takes half a minute")
    new = 8 if batch == 256 else new_tokens
    prompts = pair.prompts(batch)
    ids = pair.fast.generate(prompts, new)
    assert_captured(pair.fast, batch, greedy)
    assert assert_likeliest(pair.plain, prompts, ids) <= TIES


def test_the_generate_of_transformers(pair, new_tokens):
    """It makes the likeliest ids by the engine, and repeats what it draws from a seed."""
    model, prompts = pair.model, pair.prompts(3)
    width = max(map(len, prompts))
    padded = [[0] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    given = {
        "input_ids": torch.tensor(padded, device=model.device),
        "attention_mask": torch.tensor(mask, device=model.device),
        "eos_token_id": None,
        "max_new_tokens": new_tokens,
    }
    try:
        for _ in range(2):  # The second call replays the graphs of the first.
            made = model.generate(**given)[:, width:].tolist()
            assert model.shared_engine is not None or model.device.type == "cpu"
            assert assert_likeliest(pair.plain, prompts, made) <= TIES
        sampled = given | {"do_sample": True, "temperature": 0.8, "top_k": 20}
        torch.manual_seed(3)
        first = model.generate(**sampled)
        torch.manual_seed(3)
        assert model.generate(**sampled).equal(first)
    finally:
        model.shared_engine = None


def test_a_wrong_engine_is_found(monkeypatch):
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
def test_two_runs_are_equal_bit_for_bit(batch, pair, new_tokens):
    prompts = pair.prompts(batch)
    first, second = (pair.fast.generate(prompts, new_tokens) for _ in range(2))
    assert first == second
    assert torch.equal(*(logits_before(pair.fast, prompts, first) for _ in range(2)))


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_a_model_without_shared_experts(quantization, device, dtype, tmp_path):
    """In the shape of DeepMixtral: no dense layer, weights of experts that sum to 1, few heads."""
    shape = {"n_shared_experts": None, "first_k_dense_replace": 0, "norm_topk_prob": True}
    shape |= {"num_key_value_heads": 1, "hidden_size": 256, "moe_intermediate_size": 192}
    folder = write_base(tmp_path / "base", initializer_range=0.05, **shape)
    pair = TwoWays(str(folder), device, dtype, quantization)
    for batch in BATCHES:
        assert_logits_agree(pair, batch, 4)


def test_long_prompts_go_through_in_pieces(pair, new_tokens):
    prompts = pair.prompts(20)
    assert_likeliest(
        pair.plain, prompts, with_engine(pair.model, chunk=5).generate(prompts, new_tokens)
    )


def test_sequences_that_end_leave_the_batch(pair, new_tokens, monkeypatch):
    """They end before a stop id, and change nothing for the others."""
    prompts, engine = pair.prompts(20), pair.fast.engine
    whole = pair.fast.generate(prompts, new_tokens)
    stops = {whole[b][b * new_tokens // len(whole)] for b in range(1, len(whole), 3)}
    sizes, step = [], engine.step
    counted = lambda size, sample: (sizes.append(size), step(size, sample))  # noqa: E731
    monkeypatch.setattr(engine, "step", counted)
    made = pair.fast.generate(prompts, new_tokens, stop_ids=stops)
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) > 1
    monkeypatch.undo()
    whole_rows = [[*ids, *[0] * (new_tokens - len(ids))] for ids in made]
    logits_NBV = logits_before(pair.plain, prompts, whole_rows)
    for b, ids in enumerate(made):
        assert not stops & set(ids)
        if len(ids) < new_tokens:  # `generate` does not tell the stop id: it is the likeliest
            ids.append(max(stops, key=logits_NBV[len(ids), b].tolist().__getitem__))
    assert_likeliest(pair.plain, prompts, made)


def test_unwritten_memory_changes_nothing(pair):
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


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_computed_as_it_is(change, device, dtype):
    """By the engine, or the plain way where the engine refuses, and also where steps were captured
    before. decode/test_supported.py has more changes."""
    pair = TwoWays(str(BUNDLED_MODEL), device, dtype)
    prompts, ids = pair.prompts(3), pair.random_ids(3, 12)
    pair.fast.generate(prompts, 12)
    before = logits_before(pair.fast, prompts, ids)
    CHANGES[change](pair.model)
    plain = Generator(pair.model, fast=False)
    ours, theirs = (logits_before(way, prompts, ids) for way in (pair.fast, plain))
    assert distance(ours, theirs) <= LOGITS
    assert change == "dtype" or distance(ours, before) >= 3 * LOGITS
    assert_likeliest(plain, prompts, pair.fast.generate(prompts, 12))


@pytest.mark.parametrize("options", SAMPLINGS, ids=lambda options: "-".join(options))
def test_sampling(options, pair, new_tokens):
    """A seed draws the same ids in a graph and outside; without one, each time others."""
    prompts = pair.prompts(3)
    inside, outside, unseeded = (Sampling(**options, seed=seed) for seed in (7, 7, None))
    ids = pair.fast.generate(prompts, new_tokens, inside)
    assert_captured(pair.fast, len(prompts), inside)
    again = pair.fast.generate(prompts, new_tokens, lambda logits, seen: outside(logits, seen))
    assert again == ids
    if "temperature" in options:
        first, second = (pair.fast.generate(prompts, new_tokens, unseeded) for _ in range(2))
        assert first != second and ids not in (first, second)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("weights", ["bfloat16", "float16", "int8", "int4"])
def test_logits(weights, batch, device, dtype, new_tokens):
    """They are near the plain way's, and about as near to those in fp32 as the plain way's."""
    quantization = weights if weights.startswith("int") else None
    if device.type == "cuda" and quantization is None:
        dtype = weights
    pair = two_ways(str(BUNDLED_MODEL), device, dtype, quantization)
    ours, theirs = assert_logits_agree(pair, batch, new_tokens)
    if quantization is None and batch == 3:
        exact = two_ways(str(BUNDLED_MODEL), device, "float32").plain
        exact = logits_before(exact, pair.prompts(batch), pair.random_ids(batch, new_tokens))
        assert distance(ours, exact) <= 1.5 * distance(theirs, exact) + 1e-5


def assert_logits_agree(pair: TwoWays, batch: int, new: int) -> tuple[torch.Tensor, torch.Tensor]:
    """After the prompts, and after each of `new` random ids. Returns both ways' logits.

    Single steps may be further apart than all together: a token whose last experts are nearly
    equal goes elsewhere.
    """
    prompts, ids = pair.prompts(batch), pair.random_ids(batch, new)
    ours, theirs = (logits_before(way, prompts, ids) for way in (pair.fast, pair.plain))
    steps = [f"{distance(x, y):.2g}" for x, y in zip(ours, theirs, strict=True)]
    assert distance(ours, theirs) <= LOGITS, f"batch {batch}, by step: {' '.join(steps[:20])}"
    return ours, theirs


@pytest.mark.gpu
def test_another_model(request):
    """All checks in one test, so that only one process loads the model."""
    folder = request.config.getoption("--model")
    if not (folder and torch.cuda.is_available()):
        pytest.skip("no --model was given, or no GPU was found")
    pair, batches = TwoWays(folder, torch.device("cuda"), "auto"), (1, 8, 64)
    for batch in batches:
        assert_logits_agree(pair, batch, 4)
    assert_ignores_unwritten_memory(pair, batches)
