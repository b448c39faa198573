"""Public checkpoints of this architecture, as small twins: their fields and shapes in ratio."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_fixtures import IDS, options, run, succeed, write_base, write_rows
from text_fixtures import OFFICIAL

from deepseek_moe import DeepseekConfig, Generator, export, load
from deepseek_moe.chat import end_ids
from deepseek_moe.checkpoint import find_checkpoint
from deepseek_moe.decode.engine import Engine
from deepseek_moe.errors import UserError
from deepseek_moe.kernels.decode import torch_ops

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


def continuation(folder: Path, **how: Any) -> list[list[int]]:
    model, tokenizer = load(str(folder), dtype="float32", device="cpu")
    if how.pop("engine", False):
        how["engine"] = Engine(model, ops=torch_ops)
    prompts = tokenizer(["The old king", "Gold"]).input_ids
    return Generator(model, **how).generate(prompts, 12)


def run_export(model: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["export", *options(model=model, output=output)])
    export.main()


@pytest.mark.parametrize("name", TWINS)
def test_it_loads_generates_trains_and_is_exported(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = twin(name, tmp_path / "twin")
    assert continuation(folder, engine=True) == continuation(folder, fast=False)

    rows, trained = write_rows(tmp_path / "rows.jsonl", 4), tmp_path / "trained"
    words = options(model_name_or_path=folder, data_path=rows, output_dir=trained, max_steps=1)
    succeed([*words, *options(use_cpu=True, report_to="none")], tmp_path / "log")
    assert continuation(trained, fast=False)

    run_export(folder, tmp_path / "exported", monkeypatch)
    assert continuation(tmp_path / "exported", fast=False) == continuation(folder, fast=False)


REFUSED = [
    ({"kv_lora_rank": 512}, "kv_lora_rank is 512, .* no latent attention"),
    ({"use_mla": True}, "use_mla is True, .* no latent attention"),
    ({"v_head_dim": 128}, "v_head_dim is 128, .* no latent attention"),
    ({"quantization_config": {"quant_method": "fp8"}}, "stored as fp8"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "stored as gptq"),
    ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "stored as awq"),
    ({"quantization_config": {"quant_method": "bitsandbytes"}}, "stored as bitsandbytes"),
    ({"head_dim": 16}, "head_dim is 16, .* hidden_size / num_attention_heads .8."),
    ({"mlp_bias": True}, "mlp_bias is True"),
    ({"sliding_window": 4096}, "sliding_window is 4096"),
    ({"n_group": 8, "topk_group": 3}, "n_group is 8"),
    ({"routed_scaling_factor": 16.0}, "routed_scaling_factor is 16.0"),
    ({"topk_method": "noaux_tc"}, "topk_method is 'noaux_tc'"),
    ({"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
    ({"n_routed_experts": 2.5}, "n_routed_experts"),
]


@pytest.mark.parametrize(("fields", "said"), REFUSED)
def test_what_would_be_another_model_is_refused_in_one_line(
    fields: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the first that every program does with a checkpoint."""
    folder = change_config(write_base(tmp_path / "base"), **fields)
    for program in (
        lambda: load(str(folder)),
        lambda: run_export(folder, tmp_path / "exported", monkeypatch),
    ):
        with pytest.raises(UserError, match=said) as caught:
            program()
        assert "config.json cannot be used" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize(
    ("fields", "said"),
    [one for one in REFUSED if one[0].keys() & {"kv_lora_rank", "rms_norm_eps", "head_dim"}]
    + [one for one in REFUSED if "fp8" in one[1]],
)
def test_fine_tuning_refuses_it_in_one_line_too(
    fields: dict[str, Any], said: str, tmp_path: Path
) -> None:
    folder = change_config(write_base(tmp_path / "base"), **fields)
    rows, trained = write_rows(tmp_path / "rows.jsonl", 4), tmp_path / "trained"
    words = options(model_name_or_path=folder, data_path=rows, output_dir=trained, use_cpu=True)
    assert re.search(said, run(words, tmp_path / "log").refusal)
    assert not trained.exists()


@pytest.mark.parametrize(
    "fields", [{"model_type": "bailing_moe"}, {"architectures": ["DeepseekV2ForCausalLM"]}]
)
def test_another_type_of_model_is_named(fields: dict[str, Any], tmp_path: Path) -> None:
    folder = write_base(tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    del config["model_type"]
    (folder / "config.json").write_text(json.dumps(config | fields))
    named = "bailing_moe|DeepseekV2ForCausalLM"
    with pytest.raises(UserError, match=f"holds a ({named}) model; give one of type deepseek"):
        find_checkpoint(str(folder))


# --- The published files themselves

SHARED = OFFICIAL.parent
PUBLISHED = sorted(SHARED.glob("strangers/*.json")) + sorted(OFFICIAL.glob("config.json"))
SMALL = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3}
SMALL |= {"intermediate_size": 32, "moe_intermediate_size": 8, "head_dim": 8, **IDS}
SMALL |= {"max_position_embeddings": 256}
MADE_BY = ("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "first_k_dense_replace")
REASONS = {  # of a file that is refused, by what its name has
    "MUST-REFUSE": "kv_lora_rank is 512, .* no latent attention",
    "FP8": "stored as fp8",
    "DeepSeek-OCR-2": "holds a DeepseekV2ForCausalLM model; give one of type deepseek",
    "Ling-Coder": "holds a bailing_moe model; give one of type deepseek",
}


def published_twin(file: Path, folder: Path) -> Path:
    """A checkpoint with every field of `file`, but for sizes and ids."""
    fields = json.loads(file.read_text())
    small = {name: value for name, value in SMALL.items() if name in fields}
    ratio = fields["num_attention_heads"] // fields["num_key_value_heads"]
    small["num_key_value_heads"] = max(1, SMALL["num_attention_heads"] // ratio)
    made = {name: fields[name] for name in MADE_BY if name in fields}
    if any(reason in file.name for reason in REASONS):
        made = {}  # its weights are not read
    write_base(folder, **{name: x for name, x in (small | made).items() if name != "head_dim"})
    (folder / "config.json").write_text(json.dumps(fields | small))
    return folder


@pytest.mark.skipif(not PUBLISHED, reason="the published files are not in ../shared")
@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.stem)
def test_a_published_config_loads_or_is_refused(file: Path, tmp_path: Path) -> None:
    if "generation_config" in file.name:
        folder = write_base(tmp_path / "twin")
        (folder / "generation_config.json").write_bytes(file.read_bytes())
        model, tokenizer = load(str(folder))
        assert end_ids(tokenizer, model) == {4095, json.loads(file.read_text())["eos_token_id"]}
        return
    folder = published_twin(file, tmp_path / "twin")
    if said := [said for part, said in REASONS.items() if part in file.name]:
        with pytest.raises(UserError, match=said[0]) as caught:
            find_checkpoint(str(folder))
        assert "\n" not in str(caught.value)
        return
    assert continuation(folder, engine=True) == continuation(folder, fast=False)
    config, fields = load(str(folder))[0].config, json.loads((folder / "config.json").read_text())
    assert config.rope_parameters["rope_theta"] == fields["rope_theta"]
    for name in DeepseekConfig.__annotations__.keys() & fields.keys():
        if fields[name] is not None:
            assert getattr(config, name) == fields[name], name


def test_a_field_that_the_model_computes_is_not_written_again(tmp_path: Path) -> None:
    folder = twin("GigaChat-20B-A3B", tmp_path / "twin")
    config = DeepseekConfig.from_pretrained(folder)
    assert config.head_dim == 8
    assert config.auto_map == {}  # TRL asks for it
    assert {"head_dim", "auto_map"}.isdisjoint(config.to_dict())


def test_every_id_that_ends_a_text_counts(tmp_path: Path) -> None:
    folder = change_config(write_base(tmp_path / "base"), eos_token_id=[7, 8])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 9}))
    model, tokenizer = load(str(folder))
    assert end_ids(tokenizer, model) == {7, 8, 9, tokenizer.eos_token_id}
    model.generation_config.eos_token_id = [7]
    model.config.eos_token_id = None
    assert end_ids(tokenizer, model) == {7, tokenizer.eos_token_id}


def test_a_quantiser_that_leaves_the_experts_is_refused(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = write_base(tmp_path / "base")
    with pytest.raises(ValueError, match=r"leave the experts.*quantization='int4'.*--bits 4"):
        AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True)
        )


def test_the_pad_token_of_a_config_may_be_bos(tmp_path: Path) -> None:
    """GigaChat's config pads with the id of BOS."""
    folder = change_config(write_base(tmp_path / "base"), pad_token_id=4094)
    model, tokenizer = load(str(folder), dtype="float32", device="cpu")
    alone = Generator(model, fast=False).generate([tokenizer("Gold").input_ids], 4)
    together = Generator(model, fast=False).generate(tokenizer(["Gold", "A b c"]).input_ids, 4)
    assert together[0] == alone[0]
    assert torch.isfinite(model(torch.tensor([[4094, 5]])).logits).all()
