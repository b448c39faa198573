"""benchmarks/train.py: what it makes of logs, and its sums; stock_train.py runs on the CPU."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from deepseek_moe import DeepseekConfig, DeepseekForCausalLM
from deepseek_moe.cli import BUNDLED_MODEL
from deepseek_moe.errors import UserError

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.append(str(FOLDER))
random_model, train = import_module("random_model"), import_module("train")

LOG = "step 1/8  loss 11.5  {} tok/s  20.5 GB\nstep 2/8  loss 11.4  {} tok/s  {} GB\n"


def test_steps_are_read_and_the_first_do_not_count() -> None:
    later = [("2,000", 21.0), ("3,000", 22.5), ("20,000", 22.5), ("20,000", 22.5)]
    printed = "".join(LOG.format("1,000", rate, gb) for rate, gb in later)
    steps = train.steps_of(printed)
    assert steps[:2] == [(1000.0, 20.5), (2000.0, 21.0)] and len(steps) == 8
    config, setting = DeepseekConfig(), train.SETTINGS[0]
    line = train.trained(setting, steps, config, 1e15)
    assert line.tokens_s == pytest.approx(4 / (2 / 1000 + 2 / 20000))  # by time, not by step
    assert line.step_ms == pytest.approx(1000 * 16 * 1024 / line.tokens_s)
    assert line.mfu == pytest.approx(line.tokens_s * train.token_flops(config, 1024) / 1e15)
    assert line.gigabytes == 22.5
    assert line.cells()[-4:] == ["-", "-", "22.5", "-"]


def test_a_run_that_failed_has_an_empty_line() -> None:
    line = train.trained(train.SETTINGS[0], [(1000.0, 20.5)], DeepseekConfig(), 1e15)
    assert line.cells() == ["-"] * len(train.COLUMNS)


def test_operations_are_those_of_the_products(tiny_model) -> None:
    """Six for each number of a weight that a token passes: as many as the products of one pass
    have, times three, counted on a model in which every expert is chosen."""
    model: DeepseekForCausalLM = tiny_model(num_experts_per_tok=3)
    config, counted = model.config, 0
    for name, parameter in model.named_parameters():
        share = 3 / config.n_routed_experts if ".experts." in name else 1
        is_product = (parameter.dim() > 1 and "embed_tokens" not in name) or "norm" in name
        counted += share * parameter.numel() * is_product
    attended = config.num_hidden_layers * 2 * config.hidden_size * (33 + 1) / 2
    norm = config.hidden_size  # the last one, which limits.py leaves out
    assert train.token_flops(config, 33) == pytest.approx(6 * (counted - norm + attended))


def test_hot_experts_get_half_of_all_picks(tmp_path: Path) -> None:
    """Eight of 64, as in the benchmark."""
    config = DeepseekConfig(
        hidden_size=256, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, vocab_size=102400,
    )  # fmt: skip
    random_model.write_random_model(tmp_path / "even", config)
    for _ in range(2):  # one that was interrupted is completed
        random_model.write_skewed_model(tmp_path / "skewed", tmp_path / "even")
    assert sum(not file.is_symlink() for file in (tmp_path / "skewed").iterdir()) == 1
    model = DeepseekForCausalLM.from_pretrained(tmp_path / "skewed", dtype=torch.float32).eval()
    chosen: list[torch.Tensor] = []
    for layer in model.model.layers[1:]:
        layer.mlp.gate.register_forward_hook(lambda _m, _i, out: chosen.append(out[2]))
    model(torch.randint(102400, (4, 64), generator=torch.Generator().manual_seed(0)))
    assert 0.4 < (torch.cat(chosen) < random_model.HOT_EXPERTS).float().mean() < 0.6


@pytest.mark.parametrize("method", ["full", "lora"])
def test_stock_training_runs(method: str) -> None:
    command = [sys.executable, "stock_train.py", method, "--model", str(BUNDLED_MODEL)]
    command += ["--rows", "1", "--length", "8", "--device", "cpu"]
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.strip().split("\n")[-1])["tokens_s"] > 0


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as left:
        train.main()
    assert left.value.code == 2 and "no GPU" in capsys.readouterr().err


def test_every_setting_is_one_that_the_script_takes() -> None:
    from deepseek_moe.arguments import parse_arguments

    for setting in train.SETTINGS:
        command = train.command_of(Path("m"), Path("d"), setting.rows, setting.length,
                                   setting.options, train.STEPS)  # fmt: skip
        parse_arguments([*command.split(), "--output_dir", "out"])


def test_a_setting_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--only", "Lora"])
    with pytest.raises(UserError, match="no setting has 'Lora'"):
        train.main()
