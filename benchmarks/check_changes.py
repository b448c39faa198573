"""Models that change after their Generator was made: a part of check_gpu.py.

After each change the engine, or the way that is taken in its place, must compute what a new
Generator without an engine computes: on a GPU also where steps were captured in graphs before.
"""

from collections.abc import Callable, Iterator
from functools import partial

import peft
import torch
from check_kernels import Group, distance
from check_models import TOLERANCE, Pair, recorded, same
from torch import nn

from deepseek_moe.decode.generation import Generator
from deepseek_moe.files import BUNDLED_MODEL

NEW = 12  # tokens of each generation: enough for steps to be captured
FEWER, MORE = 4000, 4099  # ids; the bundled model has 4096
SHOWS = 3 * TOLERANCE  # how far a change moves the logits at least, so that old ones are found


def prompts_of(pair: Pair) -> list[list[int]]:
    """Three, of ids that also the smallest vocabulary here has."""
    return [[i % FEWER for i in ids] for ids in pair.prompts(3)]


def put_adapter_on(pair: Pair) -> peft.PeftModel:
    linears = ["q_proj", "v_proj", "gate_proj", "down_proj"]
    config = peft.LoraConfig(r=8, target_modules=linears, init_lora_weights=False)
    return peft.get_peft_model(pair.loaded[0], config)


def merge_adapter(pair: Pair) -> None:
    adapted = put_adapter_on(pair)
    pair.fast.generate(prompts_of(pair), NEW)  # the plain way
    adapted.merge_and_unload()


def replace_head(pair: Pair) -> None:
    model = pair.loaded[0]
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().roll(1, 0))


def assign_state(pair: Pair) -> None:
    model = pair.loaded[0]
    state = {name: x.roll(1, 0) for name, x in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def resize(size: int, pair: Pair) -> None:
    pair.loaded[0].resize_token_embeddings(size)


def cast(pair: Pair) -> None:
    """To the other 16 bits."""
    model = pair.loaded[0]
    model.to(torch.float16 if model.dtype == torch.bfloat16 else torch.bfloat16)


def change_in_place(pair: Pair) -> None:
    for parameter in pair.loaded[0].parameters():
        parameter.data.copy_(parameter.data.roll(1, 0))


def make_a_second(pair: Pair) -> None:
    """A Generator of the same model, in use, before the weights are changed in place."""
    second = Generator(pair.loaded[0])
    second.generate(prompts_of(pair), NEW)
    change_in_place(pair)


def train_mode(pair: Pair) -> None:
    pair.loaded[0].train()


CHANGES: dict[str, Callable[[Pair], object]] = {
    "an adapter": put_adapter_on,
    "an adapter that was merged": merge_adapter,
    "another head": replace_head,
    "an assigned state": assign_state,
    "more embeddings": partial(resize, MORE),
    "fewer embeddings": partial(resize, FEWER),
    "another dtype": cast,
    "weights changed in place": change_in_place,
    "a second generator": make_a_second,
    "training mode": train_mode,
}
SMALL = ("another dtype", "training mode", "fewer embeddings", "more embeddings")
"""Changes that move few logits, or none."""


def change_checks(device: torch.device) -> Iterator[Group]:
    yield Group([(f"changed: {name}", partial(check_change, name, device)) for name in CHANGES])


def check_change(name: str, device: torch.device) -> str:
    pair = Pair(str(BUNDLED_MODEL), device, "bfloat16" if device.type == "cuda" else "float32")
    prompts = prompts_of(pair)
    ids = [[i % FEWER for i in row] for row in pair.random_ids(3, NEW)]
    pair.fast.generate(prompts, NEW)
    before = recorded(pair.fast, prompts, ids)
    CHANGES[name](pair)
    plain = Generator(pair.loaded[0], fast=False)
    ours, theirs = (recorded(way, prompts, ids) for way in (pair.fast, plain))
    if ours.shape != theirs.shape or not distance(ours, theirs) <= TOLERANCE:
        raise RuntimeError(f"logits {tuple(ours.shape)} are not those of the changed model")
    if name not in SMALL and distance(ours, before) < SHOWS:
        raise RuntimeError("the change does not show in the logits")
    made, expected = (way.generate(prompts, NEW) for way in (pair.fast, plain))
    said = same(pair, made, expected, recorded(plain, prompts, made))
    way = "engine" if pair.fast.engine.decoder is not None else "plain way"
    return f"{way}, logits within {distance(ours, theirs):.2g}; {said}"
