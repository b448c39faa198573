"""Models that change after their Generator was made.

After each change the engine, or the plain way where the engine refuses, computes what a new
Generator computes: on a GPU also where steps were captured in graphs before.
"""

from collections.abc import Callable
from functools import partial

import peft
import pytest
import torch
from gpu_fixtures import (
    LOGITS,
    TwoWays,
    assert_same_up_to_ties,
    distance,
    logits_before,
)
from torch import nn

from deepseek_moe.decode.generation import Generator
from deepseek_moe.files import BUNDLED_MODEL

NEW = 12  # tokens of each generation, enough for steps to be captured
FEWER, MORE = 4000, 4099  # ids; the bundled model has 4096
SHOWS = 3 * LOGITS
"""A change moves the logits at least so far, so that logits of the old model are found."""


def prompts_of(pair: TwoWays) -> list[list[int]]:
    """Three, of ids that also the smallest vocabulary here has."""
    return [[i % FEWER for i in ids] for ids in pair.prompts(3)]


def add_adapter(pair: TwoWays) -> peft.PeftModel:
    linears = ["q_proj", "v_proj", "gate_proj", "down_proj"]
    config = peft.LoraConfig(r=8, target_modules=linears, init_lora_weights=False)
    return peft.get_peft_model(pair.model, config)


def merge_adapter(pair: TwoWays) -> None:
    adapted = add_adapter(pair)
    pair.fast.generate(prompts_of(pair), NEW)  # goes the plain way
    adapted.merge_and_unload()


def replace_head(pair: TwoWays) -> None:
    head = pair.model.lm_head
    head.weight = nn.Parameter(head.weight.detach().roll(1, 0))


def assign_state(pair: TwoWays) -> None:
    state = {name: x.roll(1, 0) for name, x in pair.model.state_dict().items()}
    pair.model.load_state_dict(state, assign=True)


def resize(size: int, pair: TwoWays) -> None:
    pair.model.resize_token_embeddings(size)


def cast(pair: TwoWays) -> None:
    """To the other 16 bits."""
    half = pair.model.dtype == torch.bfloat16
    pair.model.to(torch.float16 if half else torch.bfloat16)


def change_in_place(pair: TwoWays) -> None:
    for parameter in pair.model.parameters():
        parameter.data.copy_(parameter.data.roll(1, 0))


def use_a_second_generator(pair: TwoWays) -> None:
    """It may move the weights, which are changed in place after that."""
    Generator(pair.model).generate(prompts_of(pair), NEW)
    change_in_place(pair)


def train_mode(pair: TwoWays) -> None:
    pair.model.train()


CHANGES: dict[str, Callable[[TwoWays], object]] = {
    "adapter": add_adapter,
    "merged adapter": merge_adapter,
    "head": replace_head,
    "assigned state": assign_state,
    "more embeddings": partial(resize, MORE),
    "fewer embeddings": partial(resize, FEWER),
    "dtype": cast,
    "weights in place": change_in_place,
    "second generator": use_a_second_generator,
    "training mode": train_mode,
}
MOVE_FEW_LOGITS = ("dtype", "training mode", "fewer embeddings", "more embeddings")


@pytest.mark.parametrize("change", CHANGES)
def test_the_changed_model_is_computed(change: str, device: torch.device, dtype: str) -> None:
    pair = TwoWays(str(BUNDLED_MODEL), device, dtype)
    prompts = prompts_of(pair)
    ids = [[i % FEWER for i in row] for row in pair.random_ids(3, NEW)]
    pair.fast.generate(prompts, NEW)
    before = logits_before(pair.fast, prompts, ids)
    CHANGES[change](pair)
    plain = Generator(pair.model, fast=False)
    ours, theirs = (logits_before(way, prompts, ids) for way in (pair.fast, plain))
    assert ours.shape == theirs.shape and distance(ours, theirs) <= LOGITS
    if change not in MOVE_FEW_LOGITS:
        assert distance(ours, before) >= SHOWS
    made, expected = (way.generate(prompts, NEW) for way in (pair.fast, plain))
    logits_NBV = logits_before(plain, prompts, made)
    assert_same_up_to_ties(made, expected, logits_NBV, pair.model.dtype)
