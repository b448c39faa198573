"""Experts one by one: by their official names in a state dict, and as views of the stacks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers.trainer_utils import load_sharded_checkpoint

from deepseek_moe import DeepseekForCausalLM
from deepseek_moe.model.layout import official_parts

MakeModel = Callable[..., DeepseekForCausalLM]
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.fixture
def saved(tiny_model: MakeModel, tmp_path: Path) -> tuple[DeepseekForCausalLM, Path]:
    """A model, and the folder in which transformers saved it in several files."""
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    return model, tmp_path


def zeroed(model: DeepseekForCausalLM) -> DeepseekForCausalLM:
    other = DeepseekForCausalLM(model.config)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    return other


def assert_equal(one: DeepseekForCausalLM, other: DeepseekForCausalLM) -> None:
    assert [
        n for n, p in one.state_dict().items() if not torch.equal(p, other.state_dict()[n])
    ] == []


def official(folder: Path) -> dict[str, torch.Tensor]:
    return {k: x for file in folder.glob("*.safetensors") for k, x in load_file(file).items()}


@pytest.mark.parametrize("strict", [True, False])
def test_a_saved_state_dict_loads(saved: tuple[Any, Path], strict: bool) -> None:
    model, folder = saved
    state = official(folder)
    other = zeroed(model)
    result = other.load_state_dict(state, strict=strict)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert_equal(model, other)
    assert EXPERT in state  # The caller's dict stays as it was.


def test_its_own_state_dict_loads_as_before(saved: tuple[Any, Path]) -> None:
    model, _ = saved
    other = zeroed(model)
    other.load_state_dict(model.state_dict())
    assert_equal(model, other)


def test_file_after_file_loads_though_a_file_has_some_experts_of_a_layer_only(
    saved: tuple[Any, Path],
) -> None:
    model, folder = saved
    other = zeroed(model)
    load_sharded_checkpoint(other, str(folder), strict=False, prefer_safe=True)
    assert_equal(model, other)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    layers = [{f for n, f in index["weight_map"].items() if f".{i}.mlp.exp" in n} for i in (1, 2)]
    assert max(map(len, layers)) > 1


def test_a_strict_load_that_leaves_an_expert_unfilled_raises(saved: tuple[Any, Path]) -> None:
    model, folder = saved
    state = official(folder)
    del state[EXPERT]
    with pytest.raises(RuntimeError, match=r"Missing key.*layers\.1\.mlp\.experts\.gate_up_proj"):
        zeroed(model).load_state_dict(state)


def test_the_matrices_of_an_expert_are_views(saved: tuple[Any, Path]) -> None:
    model, folder = saved
    state = official(folder)
    experts = model.model.layers[1].mlp.experts
    assert len(experts) == model.config.n_routed_experts == len(list(experts))
    for name, stack in experts.named_parameters():
        for part, where in official_parts(f"model.layers.1.mlp.experts.{name}", stack.shape):
            *_, number, matrix, _ = part.split(".")
            weight = getattr(experts[int(number)], matrix).weight
            assert torch.equal(weight, state[part])
            assert weight.data_ptr() == stack[where].data_ptr()
    assert torch.equal(experts[-1].down_proj.weight, experts[len(experts) - 1].down_proj.weight)
    with pytest.raises(IndexError, match="expert 8 of 8"):
        experts[8]


def test_writing_to_a_matrix_changes_the_model_and_what_it_saves(
    saved: tuple[Any, Path], tmp_path: Path
) -> None:
    model, _ = saved
    before = model(torch.tensor([[5, 6]])).logits
    for expert in model.model.layers[1].mlp.experts:
        with torch.no_grad():
            expert.gate_proj.weight.zero_()
        expert.up_proj.weight = torch.full_like(expert.up_proj.weight, 2.0)
        expert.down_proj.weight.data.fill_(3.0)
    experts = model.model.layers[1].mlp.experts
    rows = model.config.moe_intermediate_size
    assert (experts.gate_up_proj[:, :rows] == 0).all()
    assert (experts.gate_up_proj[:, rows:] == 2).all()
    assert (experts.down_proj == 3).all()
    assert not torch.equal(model(torch.tensor([[5, 6]])).logits, before)
    model.save_pretrained(tmp_path / "changed")
    assert (official(tmp_path / "changed")[EXPERT] == 2).all()
