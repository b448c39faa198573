"""config.json in and out: the official fields, and a refusal of what the code cannot compute."""

import json

import pytest
from text_fixtures import OFFICIAL, needs_official
from transformers import AutoConfig

from deepseek_moe import DeepseekConfig


@needs_official
def test_the_official_config_is_read_and_written_whole(tmp_path):
    fields = json.loads((OFFICIAL / "config.json").read_text())
    config = AutoConfig.from_pretrained(OFFICIAL)
    assert type(config) is DeepseekConfig
    assert str(config.dtype) == f"torch.{fields['torch_dtype']}"
    assert [config.is_moe_layer(i) for i in range(28)] == [False] + [True] * 27
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    for name in fields.keys() - {"transformers_version", "torch_dtype", "auto_map"}:
        assert written.get(name, "absent") == fields[name], name
    assert written["dtype"] == fields["torch_dtype"]
    about_files = {"architectures", "auto_map", "dtype", "_name_or_path", "transformers_version"}
    for name in config.to_dict().keys() - about_files:
        assert getattr(config, name, None) == getattr(DeepseekConfig(), name, None), name


def test_defaults_of_fields_that_configs_may_lack():
    fields = {"model_type": "deepseek", "hidden_size": 64, "num_attention_heads": 4}
    config = DeepseekConfig.from_dict(fields)
    assert (config.aux_loss_alpha, config.seq_aux, config.n_routed_experts) == (0.001, True, 64)
    assert (config.num_key_value_heads, config.head_dim) == (4, 16)
    assert config.pad_token_id == config.eos_token_id == 100001
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("scoring_func", "sigmoid"),
        ("moe_router_dtype", "bfloat16"),
        ("hidden_act", "step"),
        ("hidden_size", 34),
        ("num_attention_heads", 0),
        ("num_key_value_heads", 3),
        ("moe_layer_freq", 0),
        ("num_experts_per_tok", 9),
        ("num_experts_per_tok", None),
        ("topk_method", "noaux_tc"),
        ("n_group", 8),
        ("routed_scaling_factor", 16.0),
        ("q_lora_rank", 1536),
        ("use_mla", True),
        ("kv_lora_rank", 512),
        ("v_head_dim", 128),
        ("head_dim", 16),
        ("mlp_bias", True),
        ("sliding_window", 4096),
        ("use_qk_norm", True),
        ("final_logit_softcapping", 30.0),
        ("clip_qkv", 8.0),
        ("logits_scaling", 8.0),
        ("partial_rotary_factor", 0.5),
    ],
)
def test_a_refused_field_is_named_with_its_value(field, value, tiny_config):
    with pytest.raises(ValueError, match=f"{field} is {value!r}"):
        tiny_config(**{field: value})


NULLABLE = {
    *("n_shared_experts", "n_routed_experts", "num_experts_per_tok"),  # null: there are none
    *("bos_token_id", "eos_token_id", "pad_token_id"),
}
FIELDS = {*DeepseekConfig.__annotations__, "head_dim", "rope_theta", "rope_scaling"}
FIELDS.add("partial_rotary_factor")


@pytest.mark.parametrize("way", ["constructor", "from_dict", "from_json_file", "from_pretrained"])
@pytest.mark.parametrize("field", sorted(FIELDS - NULLABLE))
def test_null_means_the_default(field, way, tmp_path):
    given = {"model_type": "deepseek", field: None}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(given))
    if way == "constructor":
        config = DeepseekConfig(**{field: None})
    elif way == "from_dict":
        config = DeepseekConfig.from_dict(given)
    else:
        config = getattr(DeepseekConfig, way)(file if way == "from_json_file" else tmp_path)
    about_files = {"_name_or_path", "transformers_version"}
    written, wanted = config.to_dict(), DeepseekConfig().to_dict()
    assert {k: v for k, v in written.items() if k not in about_files and v is not None} == {
        k: v for k, v in wanted.items() if k not in about_files and v is not None
    }


@pytest.mark.parametrize("inside", ["rope_parameters", "rope_scaling"])
def test_null_inside_of_a_rope_block_means_the_default(inside, tiny_config):
    block = {"type": "linear", "factor": 2.0, "rope_theta": None, "partial_rotary_factor": None}
    rope = tiny_config(**{inside: block}).rope_parameters
    assert (rope["rope_theta"], rope["factor"], rope["rope_type"]) == (10000, 2.0, "linear")
    with pytest.raises(ValueError, match=r"partial_rotary_factor is 0\.5"):
        tiny_config(**{inside: block | {"partial_rotary_factor": 0.5}})


@pytest.mark.parametrize("key", ["type", "rope_type"])
@pytest.mark.parametrize("kind", ["yarn", "made_up"])
def test_a_refused_rope_scaling_is_named(kind, key, tiny_config):
    rope = {key: kind, "factor": 4.0, "original_max_position_embeddings": 32}
    with pytest.raises(ValueError, match=f"rope_scaling.*{kind}"):
        tiny_config(rope_scaling=rope)


@pytest.mark.parametrize(
    "harmless",
    [
        {"topk_method": "greedy", "n_group": 1, "routed_scaling_factor": 1.0, "q_lora_rank": None},
        {"pretraining_tp": 4},
        {"use_mla": False, "use_qk_norm": False, "final_logit_softcapping": None},
        {"n_shared_experts": 0},
        {"aux_loss_alpha": 0},  # a whole number, as people write it in JSON
        {"n_routed_experts": None, "num_experts_per_tok": None},
        {"eos_token_id": [1, 2]},
        {"some_unknown_note": "kept"},
    ],
)
def test_accepted_fields_are_kept(harmless, tiny_config):
    assert harmless.items() <= tiny_config(**harmless).to_dict().items()


def test_rope_is_written_as_other_engines_read_it(tiny_config, tmp_path):
    scaling = {"type": "linear", "factor": 4.0}
    old = tiny_config(rope_scaling=dict(scaling), rope_theta=5000.0)
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}
    assert tiny_config(rope_parameters=rope).to_dict() == old.to_dict()
    for config, theta, wanted in ((old, 5000.0, scaling), (tiny_config(), 10000, None)):
        config.save_pretrained(tmp_path)
        written = json.loads((tmp_path / "config.json").read_text())
        assert "rope_parameters" not in written
        assert (written["rope_theta"], written["rope_scaling"]) == (theta, wanted)
        again = DeepseekConfig.from_pretrained(tmp_path)
        assert again.rope_parameters == config.rope_parameters


@pytest.mark.parametrize(
    ("changes", "routed"),
    [
        ({}, [1, 2, 3, 4, 5]),
        ({"first_k_dense_replace": 0}, [0, 1, 2, 3, 4, 5]),
        ({"first_k_dense_replace": 3, "moe_layer_freq": 2}, [4]),
        ({"n_routed_experts": None}, []),
    ],
)
def test_layers_are_routed_where_the_published_code_routes_them(changes, routed, tiny_config):
    config = tiny_config(num_hidden_layers=6, **changes)
    assert config.moe_layers == routed
