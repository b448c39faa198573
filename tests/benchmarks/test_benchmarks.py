"""Each benchmark runs once, small and on a CPU, or says that it needs a GPU."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch
from finetune_fixtures import ROOT, write_base
from option_fixtures import parse_arguments

from deepseek_moe import DeepseekConfig, DeepseekForCausalLM
from deepseek_moe.errors import UserError
from deepseek_moe.files import BUNDLED_MODEL

FOLDER = ROOT / "benchmarks"
NUMBER = r"([\d,.]+)"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a benchmark as one of the others does."""
    monkeypatch.syspath_prepend(FOLDER)
    return import_module


def run(command: str, *words: object, code: int = 0) -> str:
    """What a script printed; `code` is the exit code that it must have."""
    argv = [sys.executable, *command.split(), *map(str, words)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_decode(tmp_path: Path) -> None:
    file = tmp_path / "decode.json"
    sizes = "--new_tokens 6 --prompt_tokens 8 --batch_sizes 1 2 --prefill 2x16"
    printed = run(f"benchmarks/decode.py --device cpu {sizes} --output_file {file}")
    report = json.loads(file.read_text())
    rows = [(row["weights"], row["batch_size"]) for row in report["decode"]]
    assert rows == [("float32", 1), ("float32", 2), ("int8", 1), ("int4", 1)]
    for row in report["decode"]:
        assert row["tokens_s"] > 0 and row["limit_tokens_s"] > 0
        assert (row["stock_tokens_s"] is None) == row["weights"].startswith("int")
    assert report["decode"][2]["unquantised_tokens_s"] == report["decode"][0]["tokens_s"]
    assert report["decode"][0]["experts"] == 6 < report["decode"][1]["experts"]
    assert report["prefill"][0]["tokens_s"] > 0
    assert len(re.findall(rf" (?:float32|int\d) +{NUMBER} +[12] +{NUMBER} ", printed)) == 4
    printed = run(f"benchmarks/decode.py --output_file {file}", code=2)
    assert "is there already" in printed


@pytest.mark.slow
def test_start() -> None:
    printed = run("benchmarks/start.py --device cpu")
    parts = "".join(rf"{part} {NUMBER} s .*" for part in ("imports", "load", "first token"))
    assert len(re.findall(f"Triton cache: {parts}host memory at most {NUMBER} GB", printed)) == 2


def test_random_model(module: Callable[[str], ModuleType], tmp_path: Path) -> None:
    """In the skewed model 8 of 64 experts get about half of all picks."""
    random_model = module("random_model")
    config = DeepseekConfig(
        hidden_size=256, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, vocab_size=4096, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    random_model.write_random_model(tmp_path / "even", config)
    random_model.write_skewed_model(tmp_path / "skewed", tmp_path / "even")
    model = DeepseekForCausalLM.from_pretrained(tmp_path / "skewed", dtype=torch.float32).eval()
    chosen: list[torch.Tensor] = []
    model.model.layers[1].mlp.gate.register_forward_hook(lambda _m, _i, out: chosen.append(out[2]))
    model(torch.randint(4096, (4, 64), generator=torch.Generator().manual_seed(0)))
    assert 0.4 < (torch.cat(chosen) < random_model.HOT_EXPERTS).float().mean() < 0.6


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("command", "said"),
    [
        *[(f"{name} --only r64", "no GPU was found") for name in ("train", "memory", "fits")],
        *[
            (f"{name} --only r65", "--only r65 names no setting")
            for name in ("train", "memory", "fits")
        ],
        ("multi_gpu --gpus 2", "0 GPU.* is 2"),
        (f"random_model --output {BUNDLED_MODEL}", "is there already"),
    ],
)
def test_what_cannot_be_run_is_refused(
    command: str,
    said: str,
    module: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    benchmark = module(command.split()[0])
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(UserError, match=said):
        benchmark.main()


def test_every_setting_is_one_that_finetune_takes(module: Callable[[str], ModuleType]) -> None:
    command_of = module("finetune_runs").command_of
    settings = [setting.options for setting in module("train").SETTINGS]
    settings += [setting.options for setting in module("fits").SETTINGS if setting.rows]
    settings += [options for *_, options in module("memory").SETTINGS.values()]
    settings += module("multi_gpu").SETTINGS.values()
    for options in set(settings):
        words = command_of(Path("m"), Path("d"), 16, 1024, options, 9).split()
        if "--deepspeed" in words:  # It wants its launcher.
            at = words.index("--deepspeed")
            assert (ROOT / "finetune" / words[at + 1]).is_file()
            del words[at : at + 2]
        parse_arguments([*words, "--output_dir", "out"])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_stock_train(method: str) -> None:
    options = f"{method} --model {BUNDLED_MODEL} --rows 1 --length 8 --device cpu"
    printed = run(f"benchmarks/stock_train.py {options}")
    assert json.loads(re.findall(r"^{.*}$", printed, re.MULTILINE)[-1])["tokens_s"] > 0


@pytest.mark.slow
def test_fits(module: Callable[[str], ModuleType], tmp_path: Path) -> None:
    """A setting is trained, killed, resumed and used; one that finetune.py refuses does not fit."""
    fits = module("fits")
    base = write_base(tmp_path / "base", max_position_embeddings=512)
    small = fits.Setting("small", 80, "", rows=2, length=32, whole=True)
    peak, became = fits.try_setting(small, base)
    assert peak is None and became.startswith("trained, saved, resumed, finished")
    assert "continued a text: 50 tokens" in became
    refused = small._replace(options="--lora_r 0 --use_lora True")
    assert fits.try_setting(refused, base) == (None, "not trained and saved")


@pytest.mark.slow
@pytest.mark.usefixtures("deepspeed_extensions")
def test_multi_gpu_on_two_cpus(tmp_path: Path) -> None:
    """Two processes talk, and generate the tokens of one."""
    options = f"--only full --timeout 240 --folder {tmp_path}"
    sizes = "--batch_sizes 1 3 --prompt_tokens 8 --new_tokens 8"
    printed = run(f"benchmarks/multi_gpu.py --device cpu {options} {sizes}")
    assert re.search(rf"link: {NUMBER} GB/s", printed)
    percents = r"(\d+) % +(\d+) % +(\d+ %|-)"
    found = re.findall(rf"full, ZeRO-3 +(\d) +2 +{NUMBER} +{NUMBER} +- +{percents}\n", printed)
    assert [line[0] for line in found] == ["1", "2"], printed
    assert int(found[1][3]) > 0 and found[0][5] == "-" != found[1][5]
    found = re.findall(rf"(one|tensor|expert) +(\d) +(\d) +{NUMBER} +- +(\d+) +(\d+)\n", printed)
    ways = [("one", "1"), ("tensor", "2"), ("expert", "2")]
    tokens = [(*way, size, n, n) for way in ways for size, n in (("1", "8"), ("3", "24"))]
    assert [(*line[:3], *line[4:]) for line in found] == tokens, printed


@pytest.mark.slow
@pytest.mark.usefixtures("deepspeed_extensions")
def test_a_rank_that_dies_in_a_save(tmp_path: Path) -> None:
    options = f"--only QLoRA --kill --timeout 240 --folder {tmp_path}"
    printed = run(f"benchmarks/multi_gpu.py --device cpu {options}")
    became = re.search(r"QLoRA, ZeRO-2 +2 exit code \d+; went on from step 2, .* (\S+) of", printed)
    assert became and float(became[1]) < 1e-4, printed


def test_plots(tmp_path: Path) -> None:
    """Every run draws the same bytes."""
    names = [f"{name}.{kind}" for name in ("decode", "train") for kind in ("png", "svg")]
    drawn = []
    for _ in range(2):
        run(f"images/plots.py --output {tmp_path}")
        drawn.append([(tmp_path / name).read_bytes() for name in names])
    assert drawn[0] == drawn[1] and drawn[0][0][:4] == b"\x89PNG"
