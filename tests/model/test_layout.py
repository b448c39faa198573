"""From disk to model and back: the official names, every tensor exactly once, bit for bit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from deepseek_moe import DeepseekConfig, DeepseekForCausalLM, DeepseekModel
from deepseek_moe.decode.int_quantizer import IntConfig
from deepseek_moe.model.layout import official_tensors

MakeModel = Callable[..., DeepseekForCausalLM]
INDEX = "model.safetensors.index.json"
IDS = torch.tensor([[0, 17, 5, 44, 80]])
EXPERT_3 = "model.layers.1.mlp.experts.3.up_proj.weight"


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        new = load_file(file)
        assert not found.keys() & new.keys()
        found |= new
    return found


def rewrite(folder: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    """The folder's weights anew, in one file or in several with an index."""
    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names, places = sorted(tensors), {}
    for number in range(shards):
        part = {name: tensors[name] for name in names[number::shards]}
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def names_by_hand(config: DeepseekConfig) -> set[str]:
    """The official names, spelt out (no biases, untied, every layer after the first routed)."""
    names = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        names |= {f"{layer}.self_attn.{x}_proj.weight" for x in "qkvo"}
        names |= {f"{layer}.{x}_layernorm.weight" for x in ("input", "post_attention")}
        mlps = [f"{layer}.mlp"]
        if i >= config.first_k_dense_replace:
            names.add(f"{layer}.mlp.gate.weight")
            mlps = [f"{layer}.mlp.experts.{e}" for e in range(config.n_routed_experts)]
            mlps.append(f"{layer}.mlp.shared_experts")
        names |= {f"{mlp}.{x}_proj.weight" for mlp in mlps for x in ("gate", "up", "down")}
    return names


def test_the_official_config_wants_the_official_names(official_files: Path) -> None:
    config = DeepseekConfig.from_pretrained(official_files)
    index = json.loads((official_files / INDEX).read_text())
    with torch.device("meta"):
        wanted = official_tensors(DeepseekForCausalLM(config))
    assert wanted.keys() == index["weight_map"].keys() == names_by_hand(config)
    assert len(wanted) == 5466
    total = sum(torch.Size(shape).numel() for shape in wanted.values())
    assert 2 * total == index["metadata"]["total_size"]
    assert wanted["model.layers.27.mlp.experts.63.gate_proj.weight"] == (1408, 2048)
    assert wanted["model.layers.1.mlp.experts.0.down_proj.weight"] == (2048, 1408)
    assert wanted["model.layers.1.mlp.shared_experts.up_proj.weight"] == (2816, 2048)


@pytest.mark.parametrize("shard_size", ["20KB", "5GB"])
def test_saved_names_are_the_official_ones(
    shard_size: str, tiny_model: MakeModel, tmp_path: Path
) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    tensors = tensors_in(tmp_path)
    assert tensors.keys() == names_by_hand(model.config)
    assert {name: tuple(x.shape) for name, x in tensors.items()} == official_tensors(model)
    experts = model.model.layers[2].mlp.experts
    prefix = "model.layers.2.mlp.experts.5"
    assert torch.equal(tensors[f"{prefix}.gate_proj.weight"], experts.gate_up_proj[5, :8])
    assert torch.equal(tensors[f"{prefix}.up_proj.weight"], experts.gate_up_proj[5, 8:])
    assert torch.equal(tensors[f"{prefix}.down_proj.weight"], experts.down_proj[5])
    if shard_size == "20KB":
        places = json.loads((tmp_path / INDEX).read_text())["weight_map"]
        assert places.keys() == tensors.keys()
        assert len(set(places.values())) > 2
        for file in set(places.values()):
            held = load_file(tmp_path / file).keys()
            assert held == {name for name, place in places.items() if place == file}


@pytest.mark.parametrize(
    ("dtype", "shard_size"), [(torch.float32, "5GB"), (torch.bfloat16, "20KB")]
)
def test_load_save_load_is_bit_for_bit(
    dtype: torch.dtype, shard_size: str, tiny_model: MakeModel, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    tiny_model().to(dtype).save_pretrained(first, max_shard_size=shard_size)
    model = AutoModelForCausalLM.from_pretrained(first)
    assert model.dtype == dtype
    model.save_pretrained(second, max_shard_size=shard_size)
    before, after = tensors_in(first), tensors_in(second)
    assert before.keys() == after.keys()
    for name, x in before.items():
        assert x.dtype == after[name].dtype == dtype
        assert torch.equal(x, after[name]), name
    again = AutoModelForCausalLM.from_pretrained(second)
    for name, x in model.state_dict().items():
        assert torch.equal(x, again.state_dict()[name]), name
    assert json.loads((first / "config.json").read_text()) == json.loads(
        (second / "config.json").read_text()
    )


@pytest.mark.parametrize(
    "asked",
    [
        {"dtype": torch.bfloat16, "attn_implementation": "eager"},
        {"experts_implementation": "batched_mm"},
        {"device_map": "auto"},
    ],
    ids=str,
)
def test_from_pretrained_does_as_asked(
    asked: dict[str, Any], tiny_model: MakeModel, tmp_path: Path
) -> None:
    tiny_model().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, **asked)
    assert type(model) is DeepseekForCausalLM
    assert not model.training
    assert {x.dtype for x in model.parameters()} == {asked.get("dtype", torch.float32)}
    for name in asked.keys() & {"attn_implementation", "experts_implementation"}:
        assert getattr(model.config, f"_{name}") == asked[name]
    assert model(IDS.to(model.device)).logits.isfinite().all()
    with pytest.raises((ValueError, KeyError), match="psychic"):
        AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="psychic")


def without(*names: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: [tensors.pop(name) for name in names]


def with_(name: str, shape: tuple[int, ...]) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({name: torch.zeros(shape)})


def renumber(tensors: dict[str, torch.Tensor]) -> None:
    """Expert 3 becomes expert 8, which there is not: the number of experts stays right."""
    for name in list(tensors):
        if ".layers.1.mlp.experts.3." in name:
            tensors[name.replace(".experts.3.", ".experts.8.")] = tensors.pop(name)


WRONG: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "expert_matrix_missing": (without(EXPERT_3), EXPERT_3),
    "router_missing": (without("model.layers.2.mlp.gate.weight"), "layers.2.mlp.gate.weight"),
    "head_missing": (without("lm_head.weight"), "lm_head.weight"),
    "surplus_bias": (with_("lm_head.bias", (96,)), "lm_head.bias"),
    "surplus_expert": (
        with_("model.layers.1.mlp.experts.8.up_proj.weight", (8, 32)),
        "model.layers.1.mlp.experts.8.up_proj.weight",
    ),
    "expert_transposed": (with_(EXPERT_3, (32, 8)), EXPERT_3),
    "head_misshapen": (with_("lm_head.weight", (95, 32)), "lm_head.weight"),
    "expert_renumbered": (renumber, r"model.layers.1.mlp.experts.[38].(gate|up|down)_proj.weight"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_tensors_are_named(case: str, tiny_model: MakeModel, tmp_path: Path) -> None:
    change, named = WRONG[case]
    tiny_model().save_pretrained(tmp_path)
    tensors = tensors_in(tmp_path)
    rewrite(tmp_path, tensors, shards=3)
    AutoModelForCausalLM.from_pretrained(tmp_path)  # the way of writing is not what is wrong
    change(tensors)
    rewrite(tmp_path, tensors, shards=3)
    with pytest.raises(ValueError, match=named):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    if not case.startswith("head"):
        with pytest.raises(ValueError, match=named):
            AutoModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        (torch.int64, "I64"),
        (torch.bool, "BOOL"),
        (torch.float8_e4m3fn, "F8_E4M3"),
    ],
    ids=str,
)
def test_weights_that_are_no_floats_are_named(
    dtype: torch.dtype, stored: str, tiny_model: MakeModel, tmp_path: Path
) -> None:
    """transformers casts them: integers of trained weights are all zeros."""
    tiny_model().save_pretrained(tmp_path)
    tensors = tensors_in(tmp_path)
    tensors[EXPERT_3] = tensors[EXPERT_3].to(dtype)
    rewrite(tmp_path, tensors, shards=1)
    for options in ({}, {"quantization_config": IntConfig(4)}):
        for auto in (AutoModel, AutoModelForCausalLM)[bool(options) :]:
            with pytest.raises(ValueError, match=rf"{EXPERT_3} is stored as {stored}"):
                auto.from_pretrained(tmp_path, **options)


def test_floats_of_16_bits_and_more_load(tiny_model: MakeModel, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        rewrite(tmp_path, {n: x.to(dtype) for n, x in tensors_in(tmp_path).items()}, shards=1)
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("said_by_config", [True, False])
def test_an_fp8_checkpoint_is_said_to_be_one(
    said_by_config: bool, tiny_model: MakeModel, tmp_path: Path
) -> None:
    tiny_model().save_pretrained(tmp_path)
    tensors = tensors_in(tmp_path)
    for name in list(tensors):
        if "_proj" in name:
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
            tensors[f"{name}_scale"] = torch.ones(1)
    rewrite(tmp_path, tensors, shards=2)
    if said_by_config:
        fields = json.loads((tmp_path / "config.json").read_text())
        fields["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "static"}
        (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"is an FP8 checkpoint .*; get the original in bfloat16"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_wrong_tensors_of_a_hub_id_are_named(tiny_model: MakeModel, tmp_path: Path) -> None:
    """What was downloaded before is checked like a folder (a made-up cache, no network)."""
    folder = tmp_path / "models--some--model" / "snapshots" / "0123abc"
    (tmp_path / "models--some--model" / "refs").mkdir(parents=True)
    (tmp_path / "models--some--model" / "refs" / "main").write_text(folder.name)
    tiny_model().save_pretrained(folder)
    AutoModelForCausalLM.from_pretrained("some/model", cache_dir=tmp_path, local_files_only=True)
    tensors = tensors_in(folder)
    del tensors[EXPERT_3]
    rewrite(folder, tensors, shards=1)
    with pytest.raises(ValueError, match=EXPERT_3):
        AutoModelForCausalLM.from_pretrained(
            "some/model", cache_dir=tmp_path, local_files_only=True
        )


def test_a_config_of_another_size_is_an_error(tiny_model: MakeModel, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    for changes, named in [
        ({"n_routed_experts": 7}, "experts.7"),
        ({"n_routed_experts": 9}, "experts.8"),
        ({"n_shared_experts": None}, "shared_experts"),
        ({"num_key_value_heads": 2}, "k_proj"),
        ({"num_hidden_layers": 2}, "model.layers.2"),
    ]:
        config = DeepseekConfig.from_pretrained(tmp_path, **changes)
        with pytest.raises(ValueError, match=named):
            AutoModelForCausalLM.from_pretrained(tmp_path, config=config)


def test_the_bare_model_loads_from_either_kind(tiny_model: MakeModel, tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "causal")
    bare = AutoModel.from_pretrained(tmp_path / "causal")
    assert type(bare) is DeepseekModel
    want = model.model(IDS).last_hidden_state
    assert torch.equal(bare(IDS).last_hidden_state, want)
    bare.save_pretrained(tmp_path / "bare")
    again = AutoModel.from_pretrained(tmp_path / "bare")
    assert torch.equal(again(IDS).last_hidden_state, want)
    with pytest.raises(ValueError, match=r"lm_head\.weight is missing"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "bare")


def test_a_tied_head_may_be_stored_or_not(tiny_model: MakeModel, tmp_path: Path) -> None:
    model = tiny_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    tensors = tensors_in(tmp_path)
    want = model(IDS).logits
    for head in ({}, {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}):
        tensors.pop("lm_head.weight", None)
        rewrite(tmp_path, tensors | head, shards=1)
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, want)
