"""benchmarks/train.py: what it makes of logs, and its sums; stock_train.py runs on the CPU."""

import json
import shutil
import subprocess
import sys
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
from option_fixtures import parse_arguments

from deepseek_moe import DeepseekConfig, DeepseekForCausalLM
from deepseek_moe.errors import RunError, UserError
from deepseek_moe.files import BUNDLED_MODEL

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
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
    random_model.write_skewed_model(tmp_path / "skewed", tmp_path / "even")
    assert sum(not file.is_symlink() for file in (tmp_path / "skewed").iterdir()) == 1
    model = DeepseekForCausalLM.from_pretrained(tmp_path / "skewed", dtype=torch.float32).eval()
    chosen: list[torch.Tensor] = []
    for layer in model.model.layers[1:]:
        layer.mlp.gate.register_forward_hook(lambda _m, _i, out: chosen.append(out[2]))
    model(torch.randint(102400, (4, 64), generator=torch.Generator().manual_seed(0)))
    assert 0.4 < (torch.cat(chosen) < random_model.HOT_EXPERTS).float().mean() < 0.6


def small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """What random_model.py writes is small, whatever its options say."""
    small = partial(
        DeepseekConfig, hidden_size=32, intermediate_size=32, moe_intermediate_size=8,
        n_routed_experts=8, num_attention_heads=4, num_key_value_heads=4, vocab_size=96,
    )  # fmt: skip
    monkeypatch.setattr(random_model, "DeepseekConfig", small)


def write_model(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["random_model.py", *map(str, words)])
    random_model.main()


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("skew", [False, True], ids=["even", "skewed"])
def test_a_random_model_replaces_nothing_unless_told_to(
    skew: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_model(monkeypatch)
    even, output = tmp_path / "even", tmp_path / "model"
    write_model(monkeypatch, "--output", even, "--num_hidden_layers", 2)
    options = ["--output", output, "--num_hidden_layers", 2, *(["--skew", even] if skew else [])]
    shutil.copytree(BUNDLED_MODEL, output)
    before = contents(output)
    with pytest.raises(UserError, match="is there already"):
        write_model(monkeypatch, *options)
    assert contents(output) == before
    write_model(monkeypatch, *options, "--overwrite")
    assert contents(output).keys() == contents(even).keys()
    assert (contents(output) == contents(even)) == (not skew)
    (output / "config.json").unlink()  # whatever it is now, it is no model
    with pytest.raises(UserError, match="is there already"):
        write_model(monkeypatch, *options, "--overwrite")
    assert sorted(tmp_path.iterdir()) == [even, output]


def test_a_random_model_that_breaks_off_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_model(monkeypatch)
    output = tmp_path / "model"
    shutil.copytree(BUNDLED_MODEL, output)
    before, save = contents(output), random_model.save_file

    def full(tensors: object, file: Path, **options: object) -> None:
        if file.name == random_model.ROUTERS:
            raise OSError(28, "No space left on device")
        save(tensors, file, **options)

    monkeypatch.setattr(random_model, "save_file", full)
    for name, options in (("new", []), ("model", ["--overwrite"])):
        with pytest.raises(RunError, match="No space left"):
            write_model(monkeypatch, "--output", tmp_path / name, *options)
    assert list(tmp_path.iterdir()) == [output] and contents(output) == before


def test_only_another_model_of_the_script_can_be_skewed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_model(monkeypatch)
    with pytest.raises(UserError, match="has no model-routers"):
        write_model(monkeypatch, "--output", tmp_path / "new", "--skew", BUNDLED_MODEL)
    even = tmp_path / "even"
    write_model(monkeypatch, "--output", even, "--num_hidden_layers", 2)
    before = contents(even)
    with pytest.raises(UserError, match="over itself"):
        write_model(monkeypatch, "--output", even, "--skew", even, "--overwrite")
    assert contents(even) == before


def test_an_output_file_that_is_there_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "train.json"
    file.write_text("mine")
    monkeypatch.setattr(sys, "argv", ["train.py", "--output_file", str(file)])
    with pytest.raises(UserError, match="is there already"):
        train.main()
    assert file.read_text() == "mine"


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
    for setting in train.SETTINGS:
        command = train.command_of(Path("m"), Path("d"), setting.rows, setting.length,
                                   setting.options, train.STEPS)  # fmt: skip
        parse_arguments([*command.split(), "--output_dir", "out"])


def test_a_setting_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--only", "Lora"])
    with pytest.raises(UserError, match="no setting has 'Lora'"):
        train.main()
