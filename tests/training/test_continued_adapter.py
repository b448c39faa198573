"""Training goes on from a LoRA adapter that was made elsewhere."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_fixtures import EXPERTS, make_adapter, tensors_in
from finetune_fixtures import options, run, succeed, write_base, write_rows
from safetensors.torch import save_file

from deepseek_moe import DeepseekForCausalLM
from deepseek_moe.training.merge_lora import merged_tensors

SOME = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj"], "target_parameters": EXPERTS[1:]}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, rows, and an adapter by PEFT on two kinds of modules."""
    folder = tmp_path_factory.mktemp("continued")
    base = write_base(folder / "base")
    write_rows(folder / "rows.jsonl", 8)
    make_adapter(DeepseekForCausalLM.from_pretrained(base), folder / "adapter", **SOME)
    return folder


def words(place: Path, output: Path, **more: Any) -> list[str]:
    given = {"model_name_or_path": place / "base", "data_path": place / "rows.jsonl"}
    given |= {"output_dir": output, "use_lora": True, "adapter": place / "adapter"}
    given |= {"max_steps": 2, "use_cpu": True, "report_to": "none", "lora_dropout": 0}
    return options(**(given | more))


def test_it_starts_with_the_weights_of_the_adapter_and_trains_them(place, tmp_path):
    before = tensors_in(place / "adapter")
    succeed(words(place, tmp_path / "still", learning_rate=0), tmp_path / "log")
    still = tensors_in(tmp_path / "still")
    assert before.keys() == still.keys()
    for name, tensor in before.items():
        assert torch.equal(still[name].float(), tensor.float()), name
    succeed(words(place, tmp_path / "moved", learning_rate=1e-3), tmp_path / "log")
    moved = tensors_in(tmp_path / "moved")
    assert all(not torch.equal(moved[name], still[name]) for name in still)
    config = json.loads((tmp_path / "moved" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (3, 5, ["q_proj"])


def test_a_repeated_run_over_another_adapter_is_refused(place, tmp_path):
    succeed(words(place, tmp_path / "out"), tmp_path / "log")
    other = shutil.copytree(place / "adapter", tmp_path / "other")
    tensors = tensors_in(other)
    save_file({k: x + 1 for k, x in tensors.items()}, other / "adapter_model.safetensors")
    refused = run(words(place, tmp_path / "out", adapter=other), tmp_path / "log").refusal
    assert "other adapter" in refused


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"lora_rank": 4}, "--lora_rank is that of --adapter"),
        ({"trainable": "q_proj"}, "--trainable is that of --adapter"),
        ({"use_lora": False}, "--adapter has no effect without --use_lora True"),
        ({"adapter": "nowhere"}, "nowhere/adapter_config.json cannot be read"),
    ],
)
def test_options_against_it_are_refused(more, said, place, tmp_path):
    assert said in run(words(place, tmp_path / "out", **more), tmp_path / "log").refusal


def test_an_adapter_that_lacks_tensors_is_refused(place, tmp_path):
    broken = shutil.copytree(place / "adapter", tmp_path / "broken")
    tensors = tensors_in(broken)
    lost = next(name for name in tensors if "q_proj.lora_B" in name)
    del tensors[lost]
    save_file(tensors, broken / "adapter_model.safetensors")
    done = run(words(place, tmp_path / "out", adapter=broken), tmp_path / "log")
    assert done.code == 2
    assert "is missing; give the base that the adapter was trained on" in done.error


# test_merge_lora.py has all that no merge could handle.
@pytest.mark.parametrize(
    ("changes", "fields", "said"),
    [
        ({}, {"target_modules": ["embed_tokens", "q_proj"]}, "has LoRA on model.embed_tokens"),
        (
            {"tie_word_embeddings": True},
            {"target_modules": ["lm_head"]},
            "which this base ties to each other",
        ),
    ],
)
def test_what_no_merge_could_handle_is_refused_at_once(changes, fields, said, place, tmp_path):
    base = write_base(tmp_path / "base", **changes)
    loaded = DeepseekForCausalLM.from_pretrained(base)
    adapter = make_adapter(loaded, tmp_path / "adapter", r=2, **fields)
    given = {"adapter": adapter, "model_name_or_path": base}
    assert said in run(words(place, tmp_path / "out", **given), tmp_path / "log").refusal


def test_dropout_is_refused_where_peft_has_none(place, tmp_path):
    """Without dropout such an adapter trains on, and is merged."""
    base = DeepseekForCausalLM.from_pretrained(place / "base")
    fields = {"r": 2, "target_modules": ["q_proj"], "target_parameters": ["mlp.gate.weight"]}
    adapter = make_adapter(base, tmp_path / "adapter", **fields)
    given = words(place, tmp_path / "out", adapter=adapter)
    default = [*given[: given.index("--lora_dropout")], *given[given.index("--lora_dropout") + 2 :]]
    refused = run(default, tmp_path / "log").refusal
    assert "adapts mlp.gate.weight, for which PEFT has no dropout; add --lora_dropout 0" in refused
    succeed(given, tmp_path / "log")
    trained = dict(merged_tensors(place / "base", tmp_path / "out"))
    gate = "model.layers.1.mlp.gate.weight"
    assert not torch.equal(trained[gate], tensors_in(place / "base")[gate].float())
