"""config.json in and out: the official fields, and a refusal of what the code cannot compute."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from deepseek_moe import DeepseekConfig

MakeConfig = Callable[..., DeepseekConfig]


def test_official_config(official_files: Path) -> None:
    config = AutoConfig.from_pretrained(official_files)
    assert type(config) is DeepseekConfig
    wanted = {
        "vocab_size": 102400,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "n_shared_experts": 2,
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
        "moe_layer_freq": 1,
        "first_k_dense_replace": 1,
        "norm_topk_prob": False,
        "scoring_func": "softmax",
        "aux_loss_alpha": 0.001,
        "seq_aux": True,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "use_cache": True,
        "bos_token_id": 100000,
        "eos_token_id": 100001,
        "pad_token_id": 100001,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "attention_dropout": 0.0,
    }
    assert {name: getattr(config, name) for name in wanted} == wanted
    assert config.rope_parameters["rope_theta"] == 10000
    assert config.rope_parameters["rope_type"] == "default"
    assert str(config.dtype) == "torch.bfloat16"
    assert [config.is_moe_layer(i) for i in range(28)] == [False] + [True] * 27


def test_official_fields_are_written_back(official_files: Path, tmp_path: Path) -> None:
    before = json.loads((official_files / "config.json").read_text())
    DeepseekConfig.from_pretrained(official_files).save_pretrained(tmp_path)
    after = json.loads((tmp_path / "config.json").read_text())
    for name in before.keys() - {"transformers_version", "torch_dtype", "auto_map"}:
        assert after.get(name, "absent") == before[name], name
    assert after["dtype"] == before["torch_dtype"]


def test_the_defaults_are_the_official_ones(official_files: Path) -> None:
    official, default = DeepseekConfig.from_pretrained(official_files), DeepseekConfig()
    about_files = {"architectures", "auto_map", "dtype", "_name_or_path", "transformers_version"}
    for name in official.to_dict().keys() - about_files:
        assert getattr(official, name, None) == getattr(default, name, None), name


def test_defaults_of_fields_that_older_configs_lack() -> None:
    fields = {"model_type": "deepseek", "hidden_size": 64, "num_attention_heads": 4}
    config = DeepseekConfig.from_dict(fields)
    assert (config.aux_loss_alpha, config.seq_aux) == (0.001, True)
    assert config.num_key_value_heads == 4
    assert config.pad_token_id == config.eos_token_id
    assert config.to_dict()["rope_theta"] == 10000


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("scoring_func", "sigmoid"),
        ("hidden_act", "step"),
        ("hidden_size", 34),
        ("num_key_value_heads", 3),
        ("moe_layer_freq", 0),
        ("num_experts_per_tok", 9),
        ("num_experts_per_tok", None),
        ("topk_method", "noaux_tc"),
        ("n_group", 8),
        ("routed_scaling_factor", 16.0),
        ("q_lora_rank", 1536),
    ],
)
def test_refused_field_is_named_with_its_value(
    field: str, value: object, tiny_config: MakeConfig
) -> None:
    with pytest.raises(ValueError, match=f"{field} is {value!r}"):
        tiny_config(**{field: value})


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_refused_rope_scaling(key: str, tiny_config: MakeConfig) -> None:
    yarn = {key: "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    for rope in (yarn, {key: "made_up", "factor": 4.0}):
        with pytest.raises(ValueError, match=f"rope_scaling.*{rope[key]}"):
            tiny_config(rope_scaling=rope)


@pytest.mark.parametrize(
    "harmless",
    [
        {"topk_method": "greedy", "n_group": 1, "routed_scaling_factor": 1.0, "q_lora_rank": None},
        {"pretraining_tp": 4},
        {"n_shared_experts": 0},
        {"aux_loss_alpha": 0},  # a whole number, as people write it in JSON
        {"n_routed_experts": None, "num_experts_per_tok": None},
        {"eos_token_id": [1, 2]},
        {"some_unknown_note": "kept"},
    ],
)
def test_accepted_fields(harmless: dict[str, Any], tiny_config: MakeConfig) -> None:
    assert harmless.items() <= tiny_config(**harmless).to_dict().items()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 2, "norm_topk_prob": True, "seq_aux": False, "aux_loss_alpha": 0.0},
        {"n_routed_experts": None, "n_shared_experts": None, "num_experts_per_tok": None},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_theta": 5000.0},
        {"tie_word_embeddings": True, "pad_token_id": 2, "moe_layer_freq": 2, "dtype": "bfloat16"},
    ],
    ids=["usual", "other_moe", "dense", "rope", "rest"],
)
def test_round_trip(changes: dict[str, Any], tiny_config: MakeConfig, tmp_path: Path) -> None:
    config = tiny_config(**deepcopy(changes))  # transformers writes into the rope dict
    fields = config.to_dict()
    assert DeepseekConfig.from_dict(config.to_dict()).to_dict() == fields
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" not in written  # other engines read these two instead
    assert written["rope_theta"] == changes.get("rope_theta", 10000)
    assert written["rope_scaling"] == changes.get("rope_scaling")
    again = DeepseekConfig.from_pretrained(tmp_path)
    place = {"_name_or_path": "", "transformers_version": ""}
    assert again.to_dict() | place == fields | place
    assert again.rope_parameters == config.rope_parameters


def test_both_rope_spellings_give_the_same_config(tiny_config: MakeConfig) -> None:
    old = tiny_config(rope_scaling={"type": "linear", "factor": 4.0}, rope_theta=5000.0)
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}
    assert tiny_config(rope_parameters=rope).to_dict() == old.to_dict()


def test_layers_are_routed_where_the_published_code_routes_them(tiny_config: MakeConfig) -> None:
    def routed(**changes: Any) -> list[int]:
        config = tiny_config(num_hidden_layers=6, **changes)
        return [i for i in range(6) if config.is_moe_layer(i)]

    assert routed() == [1, 2, 3, 4, 5]
    assert routed(first_k_dense_replace=0) == [0, 1, 2, 3, 4, 5]
    assert routed(first_k_dense_replace=3, moe_layer_freq=2) == [4]
    assert routed(first_k_dense_replace=6) == []
    assert routed(n_routed_experts=None) == []
