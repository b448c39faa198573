"""What CUDA graphs need of a step, without a GPU. tests/gpu/test_training.py replays them."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch

from deepseek_moe import DeepseekForCausalLM
from deepseek_moe.training.compute.replayed_model import ReplayedModel, power_of_two, rounded
from deepseek_moe.training.examples import Collator

MakeModel = Callable[..., DeepseekForCausalLM]
LENGTHS = (9, 4, 6)


def batch() -> dict[str, Any]:
    source = torch.Generator().manual_seed(1)
    rows = []
    for length in LENGTHS:
        ids = torch.randint(2, 96, (length,), generator=source).tolist()
        trained = [0] + [1] * (length - 1)
        rows.append({"input_ids": ids, "trained": trained, "length": length, "source": "x"})
    return Collator(pad_token_id=1, packing=False)(rows, flat=16)


def test_rounded_shapes_change_neither_loss_nor_gradients(tiny_model: MakeModel) -> None:
    """One example more is in the shapes, with none of the tokens, and does not count."""
    found, given = [], batch()
    given |= {"num_sequences": len(LENGTHS), "aux_loss_scale": 0.5}
    tensors, numbers = rounded(**given)
    assert numbers == {"num_sequences": 4, "max_length_q": 16}
    assert tensors["cu_seq_lens_q"].tolist() == [0, 9, 13, 19, 32, 32]
    assert tensors.pop("attention_mask").dim() == 4  # on a CPU attention wants the real one
    names = ("input_ids", "position_ids", "sequence_ids", "num_sequences", "aux_loss_scale")
    for arguments in ({name: given[name] for name in names}, tensors | numbers):
        model = tiny_model(aux_loss_alpha=0.1).train()
        outputs = model.model(**arguments, use_cache=False)
        outputs.last_hidden_state.square().sum().backward()
        grads = [one.grad for one in model.model.parameters() if one.grad is not None]
        found.append([outputs.last_hidden_state, outputs.aux_losses, *grads])
    assert found[0][1].min() > 0
    torch.testing.assert_close(*found)


def replayed(tiny_model: MakeModel) -> ReplayedModel:
    """The attributes of a decoder that replays, but for graphs."""
    model = tiny_model().model
    model.__class__, model.trained = ReplayedModel, list(model.parameters())
    model.gradients, model.graphs, model.step_seed = {}, {}, torch.zeros((), dtype=torch.int64)
    model.has_stepped = False
    return model


def test_graphs_wait_for_the_first_step(
    tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it the optimizer's averages are not there, for which memory must have room."""
    model, asked = replayed(tiny_model).train(), []
    monkeypatch.setattr(ReplayedModel, "_has_room", lambda self: asked.append(1))
    inputs = batch()
    names = ("input_ids", "position_ids", "sequence_ids", "cu_seq_lens_q", "max_length_q")
    inputs = {name: inputs[name] for name in names} | {"num_sequences": len(LENGTHS)}
    for number, stepped in enumerate([False, False, False, True]):
        if stepped:
            model.zero_grad()
        # On a CPU attention wants no mask without numbers.
        with suppress(RuntimeError, IndexError):
            model(**inputs).last_hidden_state.sum().backward()
        for one in model.parameters():
            one.grad = torch.zeros_like(one) if one.grad is None else one.grad
        assert bool(asked) == stepped, number


def test_gradients_stay_where_they_are(tiny_model: MakeModel) -> None:
    """They go on as zeros where the optimizer had dropped them, else as they were."""
    model = replayed(tiny_model)
    first, second, *_ = model.parameters()
    first.grad = torch.zeros_like(first)  # by a plain pass; a second one would take as much again
    place = first.grad.data_ptr()
    model.place_gradients()
    places = [one.grad.data_ptr() for one in (first, second)]
    assert places[0] == place
    first.grad += 1
    second.grad += 1
    second.grad = None
    model.place_gradients()
    assert [one.grad.data_ptr() for one in (first, second)] == places
    assert first.grad.eq(1).all() and second.grad.eq(0).all()


@pytest.mark.parametrize(
    ("free", "share", "reserved", "has_grads", "pool", "wanted"),
    [
        (10.1, 1.0, 50, True, 0, True),  # twice the 5 beside what is allocated
        (9.9, 1.0, 50, True, 0, False),
        (99, 0.5, 39.9, True, 0, True),  # the process may take 50
        (99, 0.5, 40.1, True, 0, False),
        (9.1, 1.0, 50, False, 0, True),  # 1 for gradients, and twice the 4 that were something else
        (8.9, 1.0, 50, False, 0, False),
        (7.1, 1.0, 50, True, 3, True),  # earlier graphs have 3 of what these need
        (6.9, 1.0, 50, True, 3, False),
        (5.1, 1.0, 50, True, 6, True),
    ],
)
def test_graphs_need_room_for_a_step_twice(
    free: float,
    share: float,
    reserved: float,
    has_grads: bool,
    pool: float,
    wanted: bool,
    tiny_model: MakeModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All memory here is in units of the model's gradients."""
    model = replayed(tiny_model)
    unit = sum(one.nbytes for one in model.parameters())
    model.pool_bytes = pool * unit
    for one in model.parameters():
        one.grad = torch.zeros_like(one) if has_grads else None
    answers = {
        "empty_cache": None,
        "mem_get_info": (free * unit, 100 * unit),
        "get_per_process_memory_fraction": share,
        "memory_reserved": reserved * unit,
        "memory_allocated": 30 * unit,
        "max_memory_allocated": 35 * unit,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    assert model._has_room() == wanted


@pytest.mark.parametrize(("number", "wanted"), [(1, 1), (2, 2), (3, 4), (8, 8), (9, 16)])
def test_power_of_two(number: int, wanted: int) -> None:
    assert power_of_two(number) == wanted
