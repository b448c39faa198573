"""From disk to model and back: the official names, every tensor exactly once, bit for bit."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapter_fixtures import tensors_in
from safetensors.torch import save_file
from text_fixtures import OFFICIAL, needs_official
from transformers import AutoModel, AutoModelForCausalLM

from deepseek_moe import DeepseekConfig, DeepseekForCausalLM, DeepseekModel
from deepseek_moe.decode.int_quantizer import IntConfig
from deepseek_moe.model.layout import official_tensors, refuse_wrong_tensors, weight_files

MakeModel = Callable[..., DeepseekForCausalLM]
Tensors = dict[str, torch.Tensor]
INDEX = "model.safetensors.index.json"
IDS = torch.tensor([[0, 17, 5, 44, 80]])
EXPERT_3 = "model.layers.1.mlp.experts.3.up_proj.weight"
ROUTER, HEAD = "model.layers.2.mlp.gate.weight", "lm_head.weight"
EXPERT_8 = EXPERT_3.replace("3", "8")  # one more than there are


def rewrite(folder: Path, tensors: Tensors, shards: int = 1) -> None:
    """Replaces the folder's weights, in one file or in several with an index."""
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


@pytest.fixture
def saved(tiny_model: MakeModel, tmp_path: Path) -> Path:
    """The folder of a small checkpoint in one file."""
    tiny_model().save_pretrained(tmp_path)
    return tmp_path


@needs_official
def test_the_official_config_wants_the_official_names():
    config = DeepseekConfig.from_pretrained(OFFICIAL)
    index = json.loads((OFFICIAL / INDEX).read_text())
    wanted = dict(official_tensors(config))
    assert wanted.keys() == index["weight_map"].keys()
    total = sum(torch.Size(shape).numel() for shape in wanted.values())
    assert 2 * total == index["metadata"]["total_size"]
    assert wanted["model.layers.27.mlp.experts.63.gate_proj.weight"] == (1408, 2048)
    assert wanted["model.layers.1.mlp.experts.0.down_proj.weight"] == (2048, 1408)
    assert wanted["model.layers.1.mlp.shared_experts.up_proj.weight"] == (2816, 2048)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 1, "n_shared_experts": None},
        {"moe_layer_freq": 2, "first_k_dense_replace": 0, "attention_bias": True},
        {"n_routed_experts": None, "tie_word_embeddings": True},
    ],
)
@pytest.mark.parametrize("bare", [False, True])
def test_sizes_of_a_config_are_compared_without_a_model(bare, changes, tiny_model, tmp_path):
    """The oracle is the model itself: it fits, and not with any other size."""
    model = tiny_model(**changes)
    (model.model if bare else model).save_pretrained(tmp_path)
    config = model.config
    refuse_wrong_tensors(tmp_path, config)
    sizes = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"]
    if config.moe_layers:
        sizes += ["n_routed_experts", "moe_intermediate_size"]
    for name in sizes:
        for size in (getattr(config, name) * 2, 10**9):
            changed = copy.deepcopy(config)
            setattr(changed, name, size)
            with pytest.raises(ValueError, match=r"does not hold this model: .*, the config wants"):
                refuse_wrong_tensors(tmp_path, changed)


@pytest.mark.parametrize(
    "name",
    [
        *("../elsewhere.safetensors", "/etc/passwd", "/a.safetensors", "a/../../b.safetensors"),
        *("..\\b.safetensors", "C:\\b.safetensors", "model.bin", "", "..", "a\0b.safetensors"),
        *("\ud800.safetensors", "x" * 5000 + ".safetensors", 5, None, ["a.safetensors"]),
    ],
    ids=lambda name: ascii(name)[:30],
)
def test_an_index_names_only_weight_files_in_its_folder(name, tmp_path):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match=rf"{INDEX} (names|is no index)"):
        weight_files(tmp_path)


def test_a_weight_file_may_be_a_link_out_of_its_folder(saved, tmp_path):
    """The hub's cache has such links."""
    files = tmp_path / "snapshot"
    files.mkdir()
    (files / "a.safetensors").symlink_to(saved / "model.safetensors")
    (files / INDEX).write_text(json.dumps({"weight_map": {"x": "a.safetensors"}}))
    assert weight_files(files) == [files / "a.safetensors"]
    refuse_wrong_tensors(files, DeepseekConfig.from_pretrained(saved))


@pytest.mark.parametrize(
    ("dtype", "shard_size"), [(torch.float32, "5GB"), (torch.bfloat16, "20KB")]
)
def test_load_save_load_is_bit_for_bit(dtype, shard_size, tiny_model, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    tiny_model().to(dtype).save_pretrained(first, max_shard_size=shard_size)
    model = AutoModelForCausalLM.from_pretrained(first)
    assert type(model) is DeepseekForCausalLM and not model.training
    model.save_pretrained(second, max_shard_size=shard_size)
    assert (first / INDEX).exists() == (second / INDEX).exists() == (shard_size == "20KB")
    before, after = tensors_in(first), tensors_in(second)
    wanted = dict(official_tensors(model.config))
    assert {name: tuple(x.shape) for name, x in before.items()} == wanted
    assert before.keys() == after.keys()
    for name, x in before.items():
        assert x.dtype == after[name].dtype == dtype
        assert torch.equal(x, after[name]), name
    assert (first / "config.json").read_text() == (second / "config.json").read_text()


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


def renumber(tensors: Tensors) -> None:
    """Makes expert 3 the missing expert 8, so that the number of experts stays right."""
    for name in list(tensors):
        if ".layers.1.mlp.experts.3." in name:
            tensors[name.replace(".experts.3.", ".experts.8.")] = tensors.pop(name)


WRONG: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "expert_matrix_missing": (lambda x: x.pop(EXPERT_3), f"{EXPERT_3} is missing"),
    "router_missing": (lambda x: x.pop(ROUTER), f"{ROUTER} is missing"),
    "head_missing": (lambda x: x.pop(HEAD), f"{HEAD} is missing"),
    "surplus_bias": (lambda x: x.update({"lm_head.bias": zeros(96)}), "lm_head.bias is not of"),
    "surplus_expert": (lambda x: x.update({EXPERT_8: zeros(8, 32)}), f"{EXPERT_8} is not of this"),
    "expert_transposed": (lambda x: x.update({EXPERT_3: zeros(32, 8)}), f"{EXPERT_3} has shape"),
    "head_misshapen": (lambda x: x.update({HEAD: zeros(9, 32)}), f"{HEAD} has shape"),
    "expert_renumbered": (renumber, "mlp.experts.[38].(gate|up|down)_proj.weight"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_tensors_are_named(case, saved):
    change, named = WRONG[case]
    tensors = tensors_in(saved)
    rewrite(saved, tensors, shards=3)
    AutoModelForCausalLM.from_pretrained(saved)  # the way of writing is not what is wrong
    change(tensors)
    rewrite(saved, tensors, shards=3)
    for auto in (AutoModel, AutoModelForCausalLM)[case.startswith("head") :]:
        with pytest.raises(ValueError, match=named):
            auto.from_pretrained(saved)


def test_a_config_that_is_given_decides_what_is_wanted(saved):
    for field, value, named in (
        ("n_routed_experts", 9, "experts.8.gate_proj.weight is missing"),
        ("num_key_value_heads", 2, "k_proj.weight has shape"),
    ):
        config = DeepseekConfig.from_pretrained(saved, **{field: value})
        with pytest.raises(ValueError, match=named):
            AutoModelForCausalLM.from_pretrained(saved, config=config)


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [(torch.int64, "I64"), (torch.bool, "BOOL"), (torch.float8_e4m3fn, "F8_E4M3")],
    ids=str,
)
def test_weights_that_are_no_floats_are_named(dtype, stored, saved):
    """transformers casts them: integers of trained weights are all zeros."""
    tensors = tensors_in(saved)
    rewrite(saved, tensors | {EXPERT_3: tensors[EXPERT_3].to(dtype)})
    for options in ({}, {"quantization_config": IntConfig(4)}):
        with pytest.raises(ValueError, match=rf"{EXPERT_3} is stored as {stored}"):
            AutoModelForCausalLM.from_pretrained(saved, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_floats_of_16_bits_and_more_load(dtype, saved):
    rewrite(saved, {name: x.to(dtype) for name, x in tensors_in(saved).items()})
    AutoModelForCausalLM.from_pretrained(saved)


@pytest.mark.parametrize("said_by_config", [True, False])
def test_an_fp8_checkpoint_is_said_to_be_one(said_by_config, saved):
    tensors = tensors_in(saved)
    scales = {f"{EXPERT_3}_scale": torch.ones(1)}
    rewrite(saved, tensors | scales | {EXPERT_3: tensors[EXPERT_3].to(torch.float8_e4m3fn)})
    if said_by_config:
        fields = json.loads((saved / "config.json").read_text())
        fields["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "static"}
        (saved / "config.json").write_text(json.dumps(fields))
    said = (
        r"stored as fp8" if said_by_config else r"is an FP8 checkpoint .*; get the original in bf"
    )
    with pytest.raises(ValueError, match=said):
        AutoModelForCausalLM.from_pretrained(saved)


def test_wrong_tensors_of_a_hub_id_are_named(tiny_model, tmp_path):
    """What was downloaded before is checked like a folder (a made-up cache, no network)."""
    folder = tmp_path / "models--some--model" / "snapshots" / "0123abc"
    tiny_model().save_pretrained(folder)
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text(folder.name)
    offline = {"cache_dir": tmp_path, "local_files_only": True}
    AutoModelForCausalLM.from_pretrained("some/model", **offline)
    tensors = tensors_in(folder)
    del tensors[EXPERT_3]
    rewrite(folder, tensors)
    with pytest.raises(ValueError, match=EXPERT_3):
        AutoModelForCausalLM.from_pretrained("some/model", **offline)


def test_the_bare_model_loads_from_either_kind(saved, tmp_path):
    want = AutoModelForCausalLM.from_pretrained(saved).model(IDS).last_hidden_state
    bare = AutoModel.from_pretrained(saved)
    assert type(bare) is DeepseekModel
    bare.save_pretrained(tmp_path / "bare")
    for model in (bare, AutoModel.from_pretrained(tmp_path / "bare")):
        assert torch.equal(model(IDS).last_hidden_state, want)
    with pytest.raises(ValueError, match=r"lm_head\.weight is missing"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "bare")


def test_a_tied_head_may_be_stored_or_not(tiny_model, tmp_path):
    model = tiny_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    tensors = tensors_in(tmp_path)
    want = model(IDS).logits
    for head in ({}, {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}):
        rewrite(tmp_path, tensors | head)
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, want)
    rewrite(tmp_path, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] * 2})
    with pytest.raises(ValueError, match=r"is not the embedding, though config\.json ties them"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
