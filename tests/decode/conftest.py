"""What the tests of decoding share: prompts of several lengths, on CPUs both ways of decoding."""

import pytest
from gpu_fixtures import with_engine
from text_fixtures import BUNDLED, bundled_model, tokenizer_of

from deepseek_moe.decode.generation import Generator

TEXTS = ["Once upon a time", "The", "It was a cold night, and nobody in the house could sleep. He"]


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    ids = tokenizer_of(BUNDLED)(TEXTS).input_ids
    assert len({len(one) for one in ids}) == len(ids)
    return ids


@pytest.fixture(params=["plain", "engine"])
def generator(request: pytest.FixtureRequest) -> Generator:
    """Of the bundled model: the plain way, and the engine on the plain twins of its kernels."""
    make = with_engine if request.param == "engine" else Generator
    return make(bundled_model())
