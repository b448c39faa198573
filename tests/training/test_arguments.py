"""The options of finetune.py: what is understood, what they become, and what is refused."""

import json
import os
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import torch
from finetune_fixtures import SCRIPT
from finetune_options import OPTIONS, REFUSED, UNUSED
from option_fixtures import parse, parse_arguments
from text_fixtures import BUNDLED, ROOT

from deepseek_moe.errors import UserError
from deepseek_moe.training.arguments import DataArguments, FineTuningArguments, ModelArguments
from deepseek_moe.training.deepspeed_file import zero_stage

CONFIGS = ROOT / "configs"
NEEDED = ["--data_path", "x", "--output_dir", "out"]


def without_packages(*words: str, modules: Path | None = None) -> subprocess.CompletedProcess:
    """finetune.py where Python finds its standard library only, and `modules`."""
    environment = {"PYTHONPATH": str(modules)} if modules else {}
    command = [sys.executable, "-S", str(SCRIPT), *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)


def test_help_and_a_mistake_need_no_package():
    done = without_packages("--help")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) <= 120 and max(map(len, lines)) <= 100
    assert str(ROOT) not in done.stdout
    assert not [name for name in OPTIONS if f"  --{name} " not in done.stdout]
    wrong = without_packages(*NEEDED, "--learnin_rate", "1")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    found = "error: there is no option --learnin_rate; did you mean --learning_rate?\n"
    assert wrong.stderr == found
    assert "error: --output_dir is missing; give a" in without_packages(*NEEDED[:2]).stderr
    assert "error: --data_path is missing; give a" in without_packages(*NEEDED[2:]).stderr


def test_ctrl_c_while_importing_leaves_without_a_traceback(tmp_path):
    interrupted = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n"
    (tmp_path / "torch.py").write_text(interrupted)
    done = without_packages(*NEEDED, modules=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_the_defaults_that_help_shows_are_those_that_count():
    for kind in (ModelArguments, DataArguments, FineTuningArguments):
        for one in fields(kind):
            if one.name in OPTIONS and one.default is not MISSING:
                shown = {str(BUNDLED): "models/tiny-base"}.get(one.default, one.default)
                assert OPTIONS[one.name].default == (shown or OPTIONS[one.name].default), one.name


def test_every_option_of_transformers_is_known_with_its_default():
    others = {name: value for value, names in UNUSED.items() for name in names.split()}
    others |= {name: value for name, (value, _) in REFUSED.items()}
    others["do_train"] = "False"  # It is taken with True, which it means to others.
    spelt_otherwise = {"activation_checkpointing", "local_rank"}
    for one in fields(FineTuningArguments):
        if one.name not in OPTIONS.keys() | spelt_otherwise:
            default = None if one.default is MISSING else one.default
            assert others.pop(one.name) == str(default), one.name
    assert not others


WITH_KWARGS = {
    "cosine_with_min_lr": {"min_lr": 1e-5},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-5},
    "warmup_stable_decay": {"num_decay_steps": 2},
}


@pytest.mark.parametrize("name", OPTIONS["lr_scheduler_type"].choices)
def test_every_schedule_can_be_made(name):
    words = [*NEEDED, "--lr_scheduler_type", name]
    if name in WITH_KWARGS:
        with pytest.raises(UserError, match=f"--lr_scheduler_type {name} cannot be made: "):
            parse_arguments(words)
        words += ["--lr_scheduler_kwargs", json.dumps(WITH_KWARGS[name])]
    kwargs = parse_arguments(words)[2].lr_scheduler_kwargs
    assert (kwargs or {}) == WITH_KWARGS.get(name, {})


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("inverse_sqrt", {"timescale": "x"}),
        ("cosine_with_restarts", {"num_cycles": "x"}),
        ("cosine", {"num_cycles": "x"}),
        ("polynomial", {"power": "x"}),
        ("cosine_with_min_lr", {"min_lr": "x"}),
        ("warmup_stable_decay", {"num_decay_steps": 2, "min_lr_ratio": "x"}),
    ],
)
def test_values_that_a_schedule_fails_at_later_are_refused(name, kwargs):
    words = [*NEEDED, "--lr_scheduler_type", name]
    with pytest.raises(UserError, match=f"--lr_scheduler_type {name} cannot be made: "):
        parse_arguments([*words, "--lr_scheduler_kwargs", json.dumps(kwargs)])


def test_old_names_are_understood(capsys):
    model, data, training = parse(
        "--evaluation_strategy no --gradient_checkpointing True --use_lora --lora_r 64 "
        "--max_length 9 --per_gpu_train_batch_size 3 --logging_dir x --warmup_ratio 0.1"
    )
    assert (model.lora_rank, data.model_max_length) == (64, 9)
    assert training.gradient_checkpointing and training.per_device_train_batch_size == 3
    assert training.eval_strategy == "no"
    said = capsys.readouterr()
    assert said.out == ""
    assert "--logging_dir has no effect" in said.err
    assert training.warmup_steps == 0.1  # a share of all steps
    assert parse("--activation_checkpointing")[2].gradient_checkpointing


@pytest.mark.parametrize(
    ("words", "order"),
    [
        ("", "group_by_length"),
        ("--group_by_length", "group_by_length"),
        ("--group_by_length True", "group_by_length"),
        ("--group_by_length False", "random"),
        ("--group_by_length=False", "random"),
        ("--group_by_length False --train_sampling_strategy sequential", "sequential"),
    ],
)
def test_the_old_option_of_grouping_has_its_meaning(words, order):
    assert parse(words)[2].train_sampling_strategy == order


def test_flags_and_dashes_are_understood():
    model, data, training = parse("--use_lora --bits 4 --bf16 1 --group_by_length --packing")
    assert model.double_quant and model.use_lora and training.bf16 and data.packing
    assert not parse("--use_lora --bits 4 --double_quant False")[0].double_quant
    words = ["--data-path", "x", "--output-dir", "out", "--logging-steps", "0.1"]
    assert parse_arguments(words)[2].logging_steps == 0.1


def test_other_options_of_transformers_are_taken_at_their_defaults():
    parse("--fp16 False --tf32 None --do_train --label_smoothing_factor 0 --debug --local_rank=0")


def test_parsing_starts_nothing(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    before = dict(os.environ)
    training = parse(f"--deepspeed {CONFIGS}/ds_config_zero3.json")[2]
    assert zero_stage(training) == 3 and zero_stage(parse()[2]) == 0
    assert not torch.distributed.is_initialized()
    assert os.environ.get("DS_ACCELERATOR") == before.get("DS_ACCELERATOR")


OFFLOADED = "--use_lora --bits 4 --offload_experts"


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("--lora_ranks 8", "no option --lora_ranks; did you mean --lora_rank?"),
        ("--zzzzzzzz 8", "no option --zzzzzzzz; --help lists"),
        ("--learning 1", "no option --learning;"),  # not an abbreviation
        ("stray", "no option stray"),
        ("--neftune_noise_alpha 5", "no option --neftune_noise_alpha; --help lists"),
        ("--use_liger_kernel", "--use_liger_kernel True is not supported; the kernels are used"),
        ("--do_train False", "this trains; for a look, --dry_run True"),
        ("--max_steps=--", "--max_steps=-- has no value"),
        ("--bits 3", "--bits is 3; use one of 16, 8, 4"),
        ("--bits 4", "--use_lora True"),
        (f"--bits 4 --use_lora True --deepspeed {CONFIGS}/ds_config_zero3.json", "ZeRO-3"),
        ("--merge_on_save True", "--merge_on_save has no effect without --use_lora True"),
        ("--save_strategy best", "--save_strategy is best; use one of steps, epoch, no"),
        ("--attn_implementation none", "--attn_implementation none"),
        ("--eval_fraction 0.1", "--eval_strategy epoch"),
        ("--eval_fraction 1.5 --eval_strategy epoch", "--eval_fraction is 1.5"),
        ("--eval_strategy steps", "nothing to evaluate"),
        ("--eval_fraction 0.1 --eval_data_path x", "are both given"),
        ("--model_max_length 1", "--model_max_length is 1; it must be 2 or more"),
        ("--learning_rate fast", "--learning_rate: invalid float value: 'fast'"),
        ("--learning_rate nan", "--learning_rate is nan"),
        ("--bf16 perhaps", "--bf16: invalid true_or_false value"),
        ("--lr_scheduler_type wavy", "--lr_scheduler_type is wavy; use one of linear, cosine"),
        ("--optim wavy", "wavy"),
        ("--optim galore_adamw", "--optim galore_adamw cannot be made: "),
        ('--lr_scheduler_type polynomial --lr_scheduler_kwargs {"lr_end":1}', "polynomial cannot"),
        ("--lr_scheduler_kwargs [1]", "--lr_scheduler_type linear cannot be made"),
        ('--gradient_checkpointing_kwargs {"nonsense":true}', "no option --gradient_check"),
        ("--deepspeed nowhere.json", "nowhere.json cannot be read"),
        ("--num_train_epochs nan", "--num_train_epochs is nan"),
        ("--num_train_epochs 0", "--num_train_epochs is 0"),
        ("--seed -1", "--seed is -1"),
        ("--seed 4294967296", "--seed is 4294967296"),
        ("--max_steps 0", "--max_steps is 0"),
        ("--recompute_experts True", "--recompute_experts has no effect without --bf16 True"),
        ("--report_to nowhere", "--report_to nowhere"),
        ("--lora_dropout 0", "--lora_dropout has no effect without --use_lora True"),
        ("--use_lora --quant_type fp4", "--quant_type has no effect without --bits 4"),
        ("--use_lora --offload_experts", "--offload_experts has no effect without --bits 4"),
        ("--offload_experts --bits 4 --train_experts x", "keeps all experts frozen"),
        (f"{OFFLOADED} --deepspeed {CONFIGS}/ds_config_zero2_no_offload.json", "is for one GPU"),
        (f"{OFFLOADED} --deepspeed {CONFIGS}/ds_config_zero3.json", "ZeRO-3"),
        ("--output_dir=", "--output_dir is empty"),
        ("--expert_share 0.5", "--expert_share has no effect without --train_experts FILE"),
        ("--expert_score gate", "--expert_score has no effect without --train_experts FILE"),
        ("--save_delta --use_lora", "--save_delta has no effect without --train_experts FILE"),
        ("--save_delta --use_lora --train_experts x", "--save_delta has no effect on LoRA"),
        ("--train_experts x --expert_score norm", "--expert_score is norm; use one of gate, token"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(words, found, monkeypatch, capsys):
    """By the parser or after it."""
    monkeypatch.setenv("RANK", "0")  # as under DeepSpeed's launcher
    with pytest.raises((UserError, SystemExit)) as caught:
        parse(words)
    said = str(caught.value)
    if isinstance(caught.value, SystemExit):
        assert said == "2"
        said = capsys.readouterr().err.removeprefix("error: ").removesuffix("\n")
    assert found in said and "\n" not in said and "; " in said
