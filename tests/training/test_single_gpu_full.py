"""When --single_gpu_full is chosen, and which options it refuses."""

import pytest
import torch
from option_fixtures import parse
from text_fixtures import ROOT
from transformers import TrainingArguments

from deepseek_moe.errors import UserError
from deepseek_moe.training.arguments import STEP_IN_BACKWARD, FineTuningArguments

SAID = "gradients are not clipped"


def on_gpus(monkeypatch: pytest.MonkeyPatch, processes: int = 1) -> None:
    """Lets parsing find one GPU for each process, as its launcher would start it."""
    monkeypatch.setenv("RANK", "0")
    found = {"device": torch.device("cuda"), "world_size": processes}
    for name, value in found.items():
        monkeypatch.setattr(FineTuningArguments, name, property(lambda self, value=value: value))


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("--use_lora True", "--use_lora True"),
        ("--gradient_accumulation_steps 2", "--gradient_accumulation_steps 2"),
        ("--optim sgd", "--optim sgd"),
        ("--max-grad-norm=0.5", "--max_grad_norm 0.5"),
        ("--bf16 False", "add --bf16 True"),
        (f"--deepspeed {ROOT}/configs/ds_config_zero3.json", "--deepspeed"),
        ("", "2 devices; start it with python"),
    ],
)
def test_what_conflicts_is_refused_or_decides_against_it(words, found, monkeypatch, capsys):
    on_gpus(monkeypatch, processes=1 if words else 2)
    with pytest.raises(UserError) as caught:
        parse(f"--bf16 True --single_gpu_full True {words}")
    assert found in str(caught.value) and "\n" not in str(caught.value)
    usual = parse(f"--bf16 True {words}")[2]
    assert usual.single_gpu_full is False and usual.optim != STEP_IN_BACKWARD
    assert capsys.readouterr().err == ""


def test_it_is_chosen_if_all_weights_train_on_one_gpu(monkeypatch, capsys):
    on_a_cpu = parse("--bf16 True")[2]
    assert on_a_cpu.single_gpu_full is False and on_a_cpu.max_grad_norm == 1
    assert SAID not in capsys.readouterr().err
    assert parse("--bf16 True --single_gpu_full")[2].single_gpu_full is True
    on_gpus(monkeypatch)
    # A process uses one of several GPUs; transformers would take torch's DataParallel for them.
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    capsys.readouterr()
    for words in ("--trainable q_proj", "--single_gpu_full False"):
        assert parse(f"--bf16 True {words}")[2].single_gpu_full is False
    assert capsys.readouterr().err == ""
    for words in ("", "--max_grad_norm 0"):
        chosen = parse(f"--bf16 True --per_device_train_batch_size 3 {words}")[2]
        assert chosen.single_gpu_full is True and chosen.max_grad_norm == 0
        assert chosen.optim == STEP_IN_BACKWARD
        assert chosen.n_gpu == 1 and chosen.train_batch_size == 3
        said = capsys.readouterr()
        assert said.out == "" and said.err.count("\n") == said.err.count(SAID) == 1
