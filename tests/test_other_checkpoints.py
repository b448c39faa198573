"""Public checkpoints of this architecture, as small twins: their fields and shapes in ratio."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_fixtures import options, succeed, write_base, write_rows
from gpu_fixtures import with_engine

from deepseek_moe import DeepseekConfig, Generator, export, load
from deepseek_moe.decode.texts import end_ids

NO_EFFECT = {"attention_bias": False, "pretraining_tp": 1, "rope_scaling": None}

# What differs from our small model, and fields of the file that the code must see through.
TWINS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "GigaChat-20B-A3B": (
        {
            "num_key_value_heads": 2,
            "n_routed_experts": 64,
            "num_experts_per_tok": 6,
            "rope_theta": 1_400_000,
            "rms_norm_eps": 1e-5,
            "vocab_size": 4200,
        },
        {"head_dim": 8, "mlp_bias": False, "moe_implementation": "eager"},
    ),
    "JINIAC-5B": (
        {"n_routed_experts": 64, "num_experts_per_tok": 4},
        {"auto_map": {"AutoModelForCausalLM": "other/repository--modeling_deepseek.X"}},
    ),
    "dummy-3.6b": ({"n_routed_experts": 16, "num_experts_per_tok": 2}, {}),
    "DeepMixtral-8x7b": (
        {
            "n_shared_experts": None,
            "first_k_dense_replace": 0,
            "norm_topk_prob": True,
            "num_experts_per_tok": 2,
            "num_key_value_heads": 1,
        },
        {"num_local_experts": 8, "sliding_window": None, "router_aux_loss_coef": 0.02},
    ),
    "DeepSeek-Prover-V1.5": (
        {"n_routed_experts": None, "n_shared_experts": None, "num_experts_per_tok": None},
        {
            **dict.fromkeys(("first_k_dense_replace", "moe_layer_freq", "norm_topk_prob")),
            **dict.fromkeys(("scoring_func", "kv_lora_rank", "q_lora_rank", "v_head_dim")),
            **{"n_group": 1, "topk_group": 1, "topk_method": "group_limited_greedy"},
            **{"qk_nope_head_dim": 0, "qk_rope_head_dim": None, "routed_scaling_factor": 1.0},
        },
    ),
    "deepseek-moe-16b-chat": ({"aux_loss_alpha": 0.001}, {"seq_aux": True}),
}


def change_config(folder: Path, **fields: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return folder


def twin(name: str, folder: Path) -> Path:
    changes, seen_through = TWINS[name]
    return change_config(write_base(folder, **changes), **NO_EFFECT, **seen_through)


def continuation(folder: Path, engine: bool = False) -> list[list[int]]:
    model, tokenizer = load(str(folder), dtype="float32", device="cpu")
    generator = with_engine(model) if engine else Generator(model, fast=False)
    return generator.generate(tokenizer(["The old king", "Gold"]).input_ids, 12)


@pytest.mark.parametrize("name", TWINS)
def test_it_loads_generates_trains_and_is_exported(name, tmp_path, run_module):
    folder = twin(name, tmp_path / "twin")
    assert continuation(folder, engine=True) == continuation(folder)

    rows, trained = write_rows(tmp_path / "rows.jsonl", 4), tmp_path / "trained"
    words = options(model_name_or_path=folder, data_path=rows, output_dir=trained, max_steps=1)
    succeed([*words, *options(use_cpu=True, report_to="none")], tmp_path / "log")
    assert continuation(trained)

    run_module(export, *options(model=folder, output=tmp_path / "exported"))
    assert continuation(tmp_path / "exported") == continuation(folder)


def test_a_field_that_the_model_computes_is_not_written_again(tmp_path):
    folder = twin("GigaChat-20B-A3B", tmp_path / "twin")
    config = DeepseekConfig.from_pretrained(folder)
    assert config.head_dim == 8
    assert config.auto_map == {}  # TRL asks for it
    assert {"head_dim", "auto_map"}.isdisjoint(config.to_dict())


def test_every_id_that_ends_a_text_counts(tmp_path):
    folder = change_config(write_base(tmp_path / "base"), eos_token_id=[7, 8])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 9}))
    model, tokenizer = load(str(folder))
    assert end_ids(tokenizer, model) == {7, 8, 9, tokenizer.eos_token_id}
    model.generation_config.eos_token_id = [7]
    model.config.eos_token_id = None
    assert end_ids(tokenizer, model) == {7, tokenizer.eos_token_id}


def test_a_quantiser_that_leaves_the_experts_is_refused(tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = write_base(tmp_path / "base")
    with pytest.raises(ValueError, match=r"leave the experts.*quantization='int4'.*--bits 4"):
        AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True)
        )


def test_the_pad_token_of_a_config_may_be_bos(tmp_path):
    """GigaChat's config pads with the id of BOS."""
    folder = change_config(write_base(tmp_path / "base"), pad_token_id=4094)
    model, tokenizer = load(str(folder), dtype="float32", device="cpu")
    alone = Generator(model, fast=False).generate([tokenizer("Gold").input_ids], 4)
    together = Generator(model, fast=False).generate(tokenizer(["Gold", "A b c"]).input_ids, 4)
    assert together[0] == alone[0]
    assert torch.isfinite(model(torch.tensor([[4094, 5]])).logits).all()
