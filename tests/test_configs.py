"""The DeepSpeed files: what is in them, and that nothing in one overrules an option silently."""

import json
from pathlib import Path

import pytest
from option_fixtures import parse
from text_fixtures import ROOT

from deepseek_moe.errors import UserError
from deepseek_moe.model.modeling_deepseek import DeepseekMoE

CONFIGS = sorted((ROOT / "configs").glob("*.json"))
BATCHES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def refused(file: Path, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        parse(f"--deepspeed {file}")
    assert "\n" not in str(caught.value)


def test_the_published_names_are_there():
    names = {file.name for file in CONFIGS}
    wanted = ["zero2_no_offload", "zero3", "zero3_offload"]
    assert names >= {f"ds_config_{name}.json" for name in wanted}
    assert (ROOT / "finetune" / "configs").resolve() == ROOT / "configs"


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_options_decide_all_but_what_the_name_says(file):
    config = json.loads(file.read_text())
    assert not config.keys() & {"optimizer", "scheduler", "fp16"}
    assert config["bf16"] == {"enabled": "auto"}
    assert {config[key] for key in (*BATCHES, "gradient_clipping")} == {"auto"}
    zero = config["zero_optimization"]
    assert f"zero{zero['stage']}" in file.name
    assert ("offload_param" in zero) == ("_offload" in file.name and "no_offload" not in file.name)
    if zero["stage"] == 3:  # it takes a MoE block whole
        assert zero["leaf_module"] == {"classes": [DeepseekMoE.__name__]}
        assert zero["stage3_gather_16bit_weights_on_model_save"] is True


@pytest.mark.parametrize(
    ("block", "option"), [("scheduler", "--lr_scheduler_type"), ("optimizer", "--optim")]
)
def test_a_block_that_would_overrule_an_option_is_refused(block, option, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    config = json.loads(CONFIGS[0].read_text()) | {block: {"type": "WarmupLR", "params": {}}}
    (tmp_path / "own.json").write_text(json.dumps(config))
    refused(tmp_path / "own.json", f"own.json has a block '{block}'.*{option}")


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "{}", '{"zero_optimization": 3}', '{"zero_optimization": {"stage": "3"}}'],
)
def test_a_broken_file_is_one_line(content, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    (tmp_path / "own.json").write_text(content)
    refused(tmp_path / "own.json", r"own\.json")


def test_the_launcher_is_asked_for(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    refused(CONFIGS[0], "deepspeed --num_gpus 1")
