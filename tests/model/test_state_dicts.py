"""Experts one by one: by their official names in a state dict, and as views of the stacks."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapter_fixtures import tensors_in
from safetensors.torch import save_file
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


@pytest.mark.parametrize("strict", [True, False])
def test_a_saved_state_dict_loads(saved, strict):
    model, folder = saved
    state = tensors_in(folder)
    other = zeroed(model)
    result = other.load_state_dict(state, strict=strict)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert_equal(model, other)
    assert EXPERT in state  # The caller's dict stays as it was.
    own = zeroed(model)
    own.load_state_dict(model.state_dict(), strict=strict)
    assert_equal(model, own)


def test_file_after_file_loads_though_a_stack_is_divided_among_them(saved, tmp_path):
    """The files of a published checkpoint begin and end in the middle of a layer's experts."""
    model, folder = saved
    state = tensors_in(folder)
    divided = tmp_path / "divided"
    divided.mkdir()
    files = {name: f"model-{number % 3}.safetensors" for number, name in enumerate(state)}
    for file in set(files.values()):
        save_file({name: state[name] for name in state if files[name] == file}, divided / file)
    index = json.dumps({"weight_map": files})
    (divided / "model.safetensors.index.json").write_text(index)
    other = zeroed(model)
    load_sharded_checkpoint(other, str(divided), strict=False, prefer_safe=True)
    assert_equal(model, other)


@pytest.mark.parametrize("assign", [True, False])
def test_a_load_that_leaves_an_expert_unfilled_says_so(saved, assign):
    model, folder = saved
    state = tensors_in(folder)
    del state[EXPERT]
    with pytest.raises(RuntimeError, match=rf"Missing key.*{EXPERT}"):
        zeroed(model).load_state_dict(state, assign=assign)
    other = zeroed(model)
    assert other.load_state_dict(state, strict=False, assign=assign).missing_keys == [EXPERT]
    assert (other.model.layers[1].mlp.experts[3].up_proj.weight == 0).all()
    whole = model.model.layers[1].mlp.experts[3].gate_proj.weight
    assert torch.equal(other.model.layers[1].mlp.experts[3].gate_proj.weight, whole)


def test_a_model_on_meta_is_assigned_file_after_file(saved):
    """An expert that no file had stays visible as NaN, where torch leaves meta."""
    model, folder = saved
    state = tensors_in(folder)
    names = list(state)
    with torch.device("meta"):
        other = DeepseekForCausalLM(model.config)
    first = other.load_state_dict({n: state[n] for n in names[::2]}, strict=False, assign=True)
    assert {n for n in names[1::2] if ".mlp.experts." in n} <= {*first.missing_keys}
    unfilled = [p for n, p in other.named_parameters() if ".experts." in n]
    assert all(p.isnan().any() for p in unfilled)
    other.load_state_dict({n: state[n] for n in names[1::2]}, strict=False, assign=True)
    assert_equal(model, other)


@pytest.mark.parametrize("meta", [True, False])
def test_assigned_tensors_keep_their_dtype(saved, meta):
    model, folder = saved
    state = {name: tensor.bfloat16() for name, tensor in tensors_in(folder).items()}
    with torch.device("meta" if meta else "cpu"):
        other = DeepseekForCausalLM(model.config)
    assert {p.dtype for p in other.parameters()} == {torch.float32}
    other.load_state_dict(state, assign=True)
    assert {p.dtype for p in other.parameters()} == {torch.bfloat16}
    assert all(isinstance(p, torch.nn.Parameter) for p in other.parameters())
    assert_equal(model.to(torch.bfloat16), other)
    copied = zeroed(model).float()
    copied.load_state_dict(state)
    assert {p.dtype for p in copied.parameters()} == {torch.float32}


@pytest.mark.parametrize("shape", [(1, 32), (8, 1), (16, 32), (8, 32, 1), ()])
def test_an_expert_of_another_shape_is_named(saved, shape):
    """Copying would repeat the first of them for each row."""
    model, folder = saved
    state = tensors_in(folder)
    assert state[EXPERT].shape == (8, 32)
    state[EXPERT] = torch.zeros(shape)
    with pytest.raises(RuntimeError, match=rf"size mismatch for {EXPERT}: .*wants \[8, 32\]"):
        zeroed(model).load_state_dict(state, strict=False)


@pytest.mark.parametrize("inside", ["model.layers.1.mlp", "model.layers.1.mlp.experts"])
def test_a_part_of_the_model_loads_by_its_own_official_names(inside, saved):
    (model, folder), prefix = saved, f"{inside}."
    state = tensors_in(folder).items()
    state = {name.removeprefix(prefix): x for name, x in state if name.startswith(prefix)}
    part = zeroed(model).get_submodule(inside)
    part.load_state_dict(state)
    for name, tensor in model.get_submodule(inside).state_dict().items():
        assert torch.equal(part.state_dict()[name], tensor), name


def test_the_matrices_of_an_expert_are_views(saved):
    model, folder = saved
    state = tensors_in(folder)
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


def test_writing_to_a_matrix_changes_the_model_and_what_it_saves(saved, tmp_path):
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
    assert (tensors_in(tmp_path / "changed")[EXPERT] == 2).all()
