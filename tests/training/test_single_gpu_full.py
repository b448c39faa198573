"""When --single_gpu_full is chosen, and which options it refuses."""

from pathlib import Path

import pytest
import torch
from option_fixtures import parse_arguments
from transformers import TrainingArguments

from deepseek_moe.errors import UserError
from deepseek_moe.training.arguments import STEP_IN_BACKWARD, FineTuningArguments


def parse(words: str) -> FineTuningArguments:
    return parse_arguments(["--data_path", "x", "--output_dir", "out", *words.split()])[2]


def on_gpus(monkeypatch: pytest.MonkeyPatch, processes: int = 1) -> None:
    """Lets parsing find one GPU for each process."""
    found = {"device": torch.device("cuda"), "world_size": processes}
    for name, value in found.items():
        monkeypatch.setattr(FineTuningArguments, name, property(lambda self, value=value: value))


AGAINST = {
    "--use_lora True": "--use_lora True",
    "--gradient_accumulation_steps 2": "--gradient_accumulation_steps 2",
    "--optim sgd": "--optim sgd",
    "--max_grad_norm 1.0": "--max_grad_norm 1",
    "--max-grad-norm=0.5": "--max_grad_norm 0.5",
    "--bf16 False": "add --bf16 True",
}


@pytest.mark.parametrize("words", AGAINST)
def test_conflicting_options_are_refused_or_decide_against_it(
    words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    on_gpus(monkeypatch)
    with pytest.raises(UserError) as caught:
        parse(f"--bf16 True --single_gpu_full True {words}")
    assert AGAINST[words] in str(caught.value) and "\n" not in str(caught.value)
    usual = parse(f"--bf16 True {words}")
    assert usual.single_gpu_full is False and usual.optim != STEP_IN_BACKWARD
    assert capsys.readouterr().err == ""


def test_several_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpus(monkeypatch, processes=2)
    with pytest.raises(UserError, match="2 devices; start it with python"):
        parse("--bf16 True --single_gpu_full True")
    assert parse("--bf16 True").single_gpu_full is False


def test_a_process_uses_one_of_several_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would take torch's DataParallel for several."""
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    on_gpus(monkeypatch)
    training = parse("--bf16 True --per_device_train_batch_size 3")
    assert training.n_gpu == 1 and training.train_batch_size == 3
    assert training.single_gpu_full is True


def test_deepspeed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")  # as under its launcher
    config = Path(__file__).parents[2] / "configs/ds_config_zero3.json"
    with pytest.raises(UserError, match="--deepspeed"):
        parse(f"--bf16 True --single_gpu_full True --deepspeed {config}")


def test_it_is_chosen_if_all_weights_train_on_one_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert parse("--bf16 True").single_gpu_full is False  # on the CPU
    assert parse("--bf16 True").max_grad_norm == 1
    assert capsys.readouterr().err == ""
    for words in ("--single_gpu_full --bf16 True", "--single_gpu_full True --bf16 True"):
        assert parse(words).single_gpu_full is True
    capsys.readouterr()
    on_gpus(monkeypatch)
    assert parse("--bf16 True --trainable q_proj").single_gpu_full is False
    assert parse("--bf16 True --single_gpu_full False").single_gpu_full is False
    assert capsys.readouterr().err == ""
    for words in ("--bf16 True", "--bf16 True --max_grad_norm 0"):
        chosen = parse(words)
        assert chosen.single_gpu_full is True
        assert (chosen.optim, chosen.max_grad_norm) == (STEP_IN_BACKWARD, 0)
        said = capsys.readouterr()
        assert said.out == "" and said.err.count("\n") == 1
        assert "gradients are not clipped" in said.err
