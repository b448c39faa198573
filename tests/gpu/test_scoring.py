"""Log-probabilities of continuations by the engine's kernels, beside the plain way."""

import pytest
import torch
from gpu_fixtures import two_ways

from deepseek_moe.bundled import BUNDLED_MODEL
from deepseek_moe.evaluate.scoring import Pair, score

NEAR = {"float32": 1e-4, "bfloat16": 0.05}
"""The mean distance in nats a token. Single ones are up to ten times as far."""


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_the_engine_scores_as_the_plain_way_does(quantization, device, dtype):
    """Contexts that are shared and that are not, over all positions of the model."""
    ways = two_ways(str(BUNDLED_MODEL), device, dtype, quantization)
    context = ways.model.config.max_position_embeddings
    ids = (ways.prompts(1)[0] * 20)[:context]
    lengths = (1, 2, 30, 31, 500, context - 20)
    pairs = [
        Pair(tuple(ids[:length]), tuple(ids[start : start + count]))
        for length in lengths
        for start, count in ((length, 20), (5, 7), (9, 1))
    ]
    pairs.append(Pair(tuple(ids[:1]), tuple(ids[1:])))
    found, wanted = (
        torch.tensor([nats for _, (nats, _) in sorted(score(way, pairs))])
        for way in (ways.fast, ways.plain)
    )
    tokens = torch.tensor([len(pair.continuation) for pair in pairs])
    apart = (found - wanted).abs() / tokens
    assert apart.mean() < NEAR[dtype] and apart.max() < 10 * NEAR[dtype]
