"""The options of finetune.py: what is understood, what they become, and what is refused."""

from typing import Any

import pytest
import torch
from text_fixtures import ROOT

from deepseek_moe.errors import UserError
from deepseek_moe.training.arguments import (
    ModelArguments,
    parse_arguments,
    split_commas,
    zero_stage,
)

CONFIGS = ROOT / "configs"


def parse(*words: str) -> tuple[Any, Any, Any]:
    return parse_arguments(["--data_path", "x", "--output_dir", "out", *words])


def wrong(*words: str) -> str:
    with pytest.raises(UserError) as caught:
        parse(*words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_unknown_options_name_the_nearest() -> None:
    assert "no option --lora_ranks; did you mean --lora_rank?" in wrong("--lora_ranks", "8")
    assert "did you mean --bits?" in wrong("--bit=4")
    assert "--help lists" in wrong("--zzzzzzzz", "8")
    assert "no option --learning" in wrong("--learning", "1")  # not an abbreviation


def test_old_names_are_understood(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--evaluation_strategy", "no", "--gradient_checkpointing", "True", "--lora_r", "64"]
    words.append("--use_lora")
    model, _, training = parse(*words, "--logging_dir", "x", "--group_by_length=True")
    assert model.lora_rank == 64
    assert training.gradient_checkpointing
    assert training.eval_strategy == "no"
    said = capsys.readouterr()
    assert said.out == ""
    assert "--logging_dir has no effect" in said.err and "--group_by_length has" in said.err


def test_a_dropped_option_takes_its_own_value_only() -> None:
    for words in (["--group_by_length"], ["--group_by_length", "True"]):
        _, data, _ = parse(*words, "--packing")
        assert data.packing


def test_output_dir_is_asked_for() -> None:
    with pytest.raises(UserError, match="--output_dir is missing"):
        parse_arguments(["--data_path", "x"])


def test_a_flag_without_a_value_is_true() -> None:
    model, _, _ = parse("--double_quant", "--use_lora", "--bits", "4")
    assert model.double_quant and model.use_lora
    words = ("--use_lora", "--bits", "4", "--double_quant", "False")
    assert not parse(*words)[0].double_quant


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("--bits 3", "--bits is 3"),
        ("--bits 4", "--use_lora True"),
        ("--bits 8", "--use_lora True"),
        (f"--bits 4 --use_lora True --deepspeed {CONFIGS}/ds_config_zero3.json", "ZeRO-3"),
        ("--merge_on_save True", "--merge_on_save"),
        ("--fp16 True", "--fp16"),
        ("--logging_nan_inf_filter True", "--logging_nan_inf_filter"),
        ("--load_best_model_at_end True --eval_strategy no", "--load_best_model_at_end"),
        ("--label_smoothing_factor 0.1", "--label_smoothing_factor"),
        ("--save_only_model True", "--save_only_model"),
        ("--resume_from_checkpoint x", "--resume_from_checkpoint"),
        ("--ignore_data_skip True", "--ignore_data_skip"),
        ("--save_strategy best", "--save_strategy best"),
        ("--attn_implementation none", "--attn_implementation none"),
        ("--eval_fraction 0.1", "--eval_strategy epoch"),
        ("--eval_fraction 1.5 --eval_strategy epoch", "--eval_fraction is 1.5"),
        ("--model_max_length 1", "--model_max_length is 1"),
        ("--eval_strategy steps", "nothing to evaluate"),
        ("--eval_fraction 0.1 --eval_data_path x", "not both"),
        ("--learning_rate fast", "--learning_rate"),
        ("--lr_scheduler_type wavy", "wavy"),
        ("--deepspeed nowhere.json", "nowhere.json"),
        ("--bits 4 --use_lora True --quant_type nf5", "nf5"),
        ("--use_lora True --lora_rank 0", "--lora_rank is 0"),
        ("--per_device_train_batch_size 0", "--per_device_train_batch_size is 0"),
        ("--gradient_accumulation_steps 0", "--gradient_accumulation_steps"),
        ("--num_train_epochs 0", "--num_train_epochs"),
        ("--num_train_epochs nan", "--num_train_epochs is nan"),
        ("--seed -1", "--seed is -1"),
        ("--seed 4294967296", "--seed is 4294967296"),
        ("--max_steps 0", "--max_steps is 0"),
        (f"--deepspeed {ROOT}/README.md", "README.md is not JSON"),
        (f"--deepspeed {ROOT}/models/tiny-base/config.json", "no number as the stage"),
        ("--show_examples -1", "--show_examples"),
        ("--output_dir=", "--output_dir is empty"),
        ("--train_sampling_strategy sequental", "--train_sampling_strategy"),
        ("--train_sampling_strategy batch_rebalance", "--train_sampling_strategy"),
        ("--recompute_experts True", "--recompute_experts has no effect in fp32"),
        ("--report_to nowhere", "--report_to nowhere"),
        ("--logging_steps -1", "--logging_steps is -1"),
        ("--lora_dropout 0.2", "--lora_dropout has no effect without --use_lora True"),
        ("stray", "stray"),
    ],
)
def test_what_cannot_work_is_refused(
    words: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")  # as under DeepSpeed's launcher
    assert found in wrong(*words.split())


def test_options_are_understood_with_dashes() -> None:
    words = ["--data-path", "x", "--output-dir", "out", "--logging-steps", "0.1"]
    assert parse_arguments(words)[2].logging_steps == 0.1


def test_data_is_asked_for() -> None:
    with pytest.raises(UserError, match="--data_path is missing"):
        parse_arguments(["--output_dir", "out"])


def test_attention_and_lists_of_names() -> None:
    assert ModelArguments().attention(torch.float32) == "sdpa"
    assert ModelArguments(attn_implementation="eager").attention(torch.bfloat16) == "eager"
    assert split_commas(" q_proj, v_proj,, ") == ["q_proj", "v_proj"]
    assert split_commas(None) == []
    assert zero_stage(parse()[2]) == 0
