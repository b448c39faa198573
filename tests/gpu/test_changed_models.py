"""Models that change after their Generator was made; decode/test_supported.py has more changes.

After each change the engine, or the plain way where the engine refuses, computes what a new
Generator computes: on a GPU also where steps were captured in graphs before.
"""

from collections.abc import Callable

import peft
import pytest
import torch
from gpu_fixtures import LOGITS, TwoWays, assert_same_up_to_ties, distance, logits_before

from deepseek_moe.decode.generation import Generator
from deepseek_moe.files import BUNDLED_MODEL

NEW = 12  # tokens of each generation, enough for steps to be captured
SHOWS = 3 * LOGITS
"""A change moves the logits at least so far, so that logits of the old model are found."""


def add_adapter(pair: TwoWays) -> peft.PeftModel:
    """The engine refuses it."""
    linears = ["q_proj", "v_proj", "gate_proj", "down_proj"]
    config = peft.LoraConfig(r=8, target_modules=linears, init_lora_weights=False)
    return peft.get_peft_model(pair.model, config)


def merge_adapter(pair: TwoWays) -> None:
    adapted = add_adapter(pair)
    pair.fast.generate(pair.prompts(3), NEW)  # goes the plain way
    adapted.merge_and_unload()


def assign_state(pair: TwoWays) -> None:
    state = {name: x.roll(1, 0) for name, x in pair.model.state_dict().items()}
    pair.model.load_state_dict(state, assign=True)


def change_in_place(pair: TwoWays) -> None:
    """After a second generator, which may have moved the weights."""
    Generator(pair.model).generate(pair.prompts(3), NEW)
    for parameter in pair.model.parameters():
        parameter.data.copy_(parameter.data.roll(1, 0))


def cast(pair: TwoWays) -> None:
    """To the other 16 bits."""
    half = pair.model.dtype == torch.bfloat16
    pair.model.to(torch.float16 if half else torch.bfloat16)


CHANGES: dict[str, Callable[[TwoWays], object]] = {
    "adapter": add_adapter,
    "merged adapter": merge_adapter,
    "assigned state": assign_state,
    "weights in place": change_in_place,
    "more embeddings": lambda pair: pair.model.resize_token_embeddings(4099),
    "dtype": cast,
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_changed_model_is_computed(change: str, device: torch.device, dtype: str) -> None:
    pair = TwoWays(str(BUNDLED_MODEL), device, dtype)
    prompts, ids = pair.prompts(3), pair.random_ids(3, NEW)
    pair.fast.generate(prompts, NEW)
    before = logits_before(pair.fast, prompts, ids)
    CHANGES[change](pair)
    plain = Generator(pair.model, fast=False)
    ours, theirs = (logits_before(way, prompts, ids) for way in (pair.fast, plain))
    assert ours.shape == theirs.shape and distance(ours, theirs) <= LOGITS
    if change not in ("more embeddings", "dtype"):
        assert distance(ours, before) >= SHOWS
    made, expected = (way.generate(prompts, NEW) for way in (pair.fast, plain))
    logits_NBV = logits_before(plain, prompts, made)
    assert_same_up_to_ties(made, expected, logits_NBV, pair.model.dtype)
