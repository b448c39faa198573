"""Each benchmark runs once on a CPU with a tiny model, or says that it needs a GPU."""

import json
import math
import shutil
import sys
from collections.abc import Callable
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from finetune_fixtures import ROOT, write_base, write_rows
from option_fixtures import parse_arguments
from transformers import AutoTokenizer

from deepseek_moe import DeepseekConfig, DeepseekForCausalLM
from deepseek_moe.bundled import BUNDLED_MODEL
from deepseek_moe.errors import RunError, UserError
from deepseek_moe.experts.choose import read_choice

slow = pytest.mark.slow
Run = Callable[..., dict[str, Any]]
STEP = "step {0}/8  loss 8.0  {0},000 tok/s  {0}.5 GB\n"
PRINTED = "in all    2.0 GB\n" + "".join(map(STEP.format, range(1, 9)))
"""What finetune.py prints in a dry run, and of eight steps on a GPU."""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs a benchmark after some of its names were `changed`, and returns its report."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")

    def run(command: str, **changed: object) -> dict[str, Any]:
        file = tmp_path / "report.json"
        name, *options = command.split()
        module = import_module(name)
        for key, value in changed.items():
            monkeypatch.setattr(f"{name}.{key}", value)
        monkeypatch.setattr(sys, "argv", [name, *options, "--output_file", str(file)])
        module.main()
        return json.loads(file.read_text())

    return run


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model in place of the random ones, on a machine that seems to have two GPUs."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    base = write_base(tmp_path / "base", num_hidden_layers=2)
    for module in ("finetune_runs", "multi_gpu"):
        monkeypatch.setattr(import_module(module), "model_of_layers", lambda *_: base)
        monkeypatch.setattr(import_module(module), "require_gpus", lambda *_: None)
    return base


def test_decode(run, base):
    sizes = {"PREFILLS": [(2, 16)], "BATCHES": (1, 2), "PROMPT": 8, "NEW": 6}
    report = run(f"decode --model {base}", **sizes)
    rows = [(row["weights"], row["batch_size"]) for row in report["decode"]]
    assert rows == [("float32", 1), ("float32", 2), ("int8", 1), ("int4", 1)]
    for row in [*report["decode"], *report["prefill"]]:
        assert 0 < row["of_limit"] == row["tokens_s"] / row["limit_tokens_s"]
        assert (row["stock_tokens_s"] is None) == row.get("weights", "").startswith("int")
    with pytest.raises(UserError, match="is there already"):
        run(f"decode --model {base}", **sizes)


def test_experts_profile(run, base):
    changed = {"SHAPES": [(2, 16), (3, 9000)], "BATCHES": 2, "REPEATS": 3}
    rows = run("experts_profile", model_of_layers=lambda *_: base, **changed)["profile"]
    assert [row["shape"] for row in rows] == ["2 x 16", "3 x 256"]  # the context
    for row in rows:
        assert 0 < row["least"] <= row["x_seconds"] <= row["most"]
        assert row["plain_tokens_s"] > 0 < row["measured_tokens_s"]


@slow
def test_multiple_choice(run):
    pytest.importorskip("lm_eval", reason="lm_eval is not here: pip install lm_eval")
    changed = {"QUESTIONS": 5, "WARM": 2, "TOKENS": {"short": 9, "long": 30}, "ANSWER": 3}
    rows = run("multiple_choice", model_of_layers=lambda *_: BUNDLED_MODEL, **changed)[
        "multiple_choice"
    ]
    assert [row["name"] for row in rows] == ["short", "long"]
    for row in rows:
        assert 0 < row["ratio"] == pytest.approx(row["items_s"] / row["harness_items_s"])
        assert row["apart"] < 1e-5
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL)
    one, other = [
        request.args for request in import_module("multiple_choice").questions(9, tokenizer)
    ][:2]
    assert one[0] == other[0] and one[1] != other[1]
    lengths = [len(tokenizer(text).input_ids) for text in (one[0], "".join(one))]
    assert lengths[0] in (9, 10) and lengths[1] == lengths[0] + 3  # the first word has no space


def test_random_model(run, tmp_path):
    """In the skewed model 8 of 64 experts get about half of all picks."""
    random_model = import_module("random_model")
    config = DeepseekConfig(
        hidden_size=256, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, vocab_size=4096, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    random_model.write_random_model(tmp_path / "2-layers", config)
    skewed = random_model.model_of_layers(tmp_path, 2, skewed=True)
    model = DeepseekForCausalLM.from_pretrained(skewed, dtype=torch.float32).eval()
    chosen: list[torch.Tensor] = []
    model.model.layers[1].mlp.gate.register_forward_hook(lambda _m, _i, out: chosen.append(out[2]))
    model(torch.randint(4096, (4, 64), generator=torch.Generator().manual_seed(0)))
    assert 0.4 < (torch.cat(chosen) < random_model.HOT_EXPERTS).float().mean() < 0.6
    with pytest.raises(UserError, match="is there already"):
        random_model.write_random_model(BUNDLED_MODEL, config)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["train", "memory", "fits", "multi_gpu"])
def test_what_cannot_be_run_is_refused(name, run):
    with pytest.raises(UserError, match=r"--only r65 names no setting; there are: .*LoRA"):
        run(f"{name} --only r65")
    with pytest.raises(UserError, match="0 GPUs were found"):
        run(f"{name} --only QLoRA")


def test_every_setting_is_one_that_finetune_takes(run):
    runs = import_module("finetune_runs")
    settings = set(import_module("multi_gpu").SETTINGS.values())
    for one in import_module("memory").SETTINGS.values():
        settings.add(f"{one.options} --train_experts file" if one.share else one.options)
    settings |= {one.options for one in import_module("fits").SETTINGS.values() if one.rows}
    places = {"profile": "profile.json", "random": "expert_cfg.json", "share": 0.25}
    settings |= {way.options.format(**places) for way in import_module("experts").WAYS.values()}
    for options in settings:
        words = runs.command_of(Path("m"), Path("d"), 16, 1024, options, 9).split()
        if "--deepspeed" in words:  # It wants its launcher.
            at = words.index("--deepspeed")
            assert (ROOT / "finetune" / words[at + 1]).is_file()
            del words[at : at + 2]
        parse_arguments([*words, "--output_dir", "out"])


def test_memory(run, base, monkeypatch):
    monkeypatch.setattr("finetune_runs.finetune", lambda *_, **__: PRINTED)
    [row] = run("memory --only QLoRA", SETTINGS=import_module("memory").SETTINGS)["memory"][-1:]
    assert row == {"name": "QLoRA r64, ZeRO-2", "estimated": 2.0, "measured": 8.5, "ratio": 2 / 8.5}


def test_train(run, base, monkeypatch, capsys):
    """Rates are those of steps 5 to 8; stock transformers really trains."""
    train = import_module("train")

    def measured_stock(*words: object) -> dict[str, float]:
        monkeypatch.setattr(sys, "argv", ["train", "--stock", *map(str, words)])
        train.main()
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    def finetune(command: str, *_: object) -> str:
        given = dict(pairwise(command.split()))
        if "--train_experts" in given:
            chosen = read_choice(given["--train_experts"], base).experts
            assert {len(experts) for experts in chosen.values()} == {2}  # of 8
        return PRINTED

    settings = {"LoRA": train.Setting(1, 8, "", "lora")}
    step = {"device_ms": 4.0, "launches": 30}
    settings["chosen experts"] = train.Setting(1, 8, "", share=0.25)
    monkeypatch.setattr("finetune_runs.profiled", lambda command: (step, finetune(command)))
    report = run("train", SETTINGS=settings, measured_stock=measured_stock)
    row, chosen = report["lines"]
    assert chosen["gigabytes"] == 8.5 and chosen["stock_tokens_s"] is None
    assert step.items() <= row.items()
    assert row["tokens_s"] == pytest.approx(4 / (1 / 5000 + 1 / 6000 + 1 / 7000 + 1 / 8000))
    assert row["gigabytes"] == 8.5 and row["x_stock"] == row["tokens_s"] / row["stock_tokens_s"]
    config = DeepseekConfig.from_pretrained(base)
    flops = row["mfu"] * report["operations_s"] / row["tokens_s"]
    weights = sum(weight.numel() for weight in DeepseekForCausalLM(config).parameters())
    assert weights < flops < 6 * weights  # A token passes neither all experts nor the embeddings.


@slow
def test_fits(run, base):
    """A setting is trained, killed, resumed and used."""
    settings = {"small": import_module("fits").Setting(80, "--use_cpu True", rows=2, whole=True)}
    [row] = run("fits", SETTINGS=settings, LENGTH=32)["fits"]
    became = "trained, saved, resumed, finished, continued a text: 50 tokens"
    assert row["became"].startswith(became)


@pytest.fixture
def experts(
    run: Run, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    """Runs the benchmark of chosen experts on a tiny model, with `changed` names and options."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    rows, text = write_rows(tmp_path / "rows.jsonl", 8), tmp_path / "text.txt"
    text.write_text("The old king had three sons and a bird of gold. " * 5)
    module = import_module("experts")
    names = ("all weights", "random experts")
    sizes = {"MODELS": {"tiny-base": base}, "LENGTH": 64, "ROWS": 2, "RECOVERY_STEPS": 1}
    sizes["WAYS"] = {name: module.WAYS[name]._replace(rates=(1e-3, 2e-3)) for name in names}

    def experts(options: str = "", **changed: object) -> dict[str, Any]:
        command = f"experts --data_path {rows} --eval_data_path {rows} --text {text} --steps 1 "
        command += f"--folder {tmp_path / 'kept'} --overwrite {options}"
        return run(command, **(sizes | changed))

    return experts


def test_experts(experts, base, monkeypatch):
    """The best rate of the first seed counts; means and spreads are over all seeds."""
    ran: list[str] = []

    def pretend(words: list[str], **_: Any) -> tuple[str, int]:
        ran.append(words[0])
        given = dict(pairwise(words))
        if "--keep" in given:
            assert given["--keep"] == "4"
            shutil.copytree(base, given["--output"])
        elif "--output" in given:
            Path(given["--output"]).mkdir(parents=True)
            Path(given["--output"], "profile.json").touch()
        else:
            parse_arguments(words[1:])
            shutil.copytree(base, given["--output_dir"])
            loss = 4.0 - 500 * float(given["--learning_rate"]) + int(given["--seed"])
            return f"{PRINTED}all   1,000   200\nstep 8/8  evaluation: loss {loss}  \n", 0
        return "", 0

    monkeypatch.setattr("finetune_runs.run", pretend)
    report = experts("--seeds 2 --jobs 2", TIMED_STEPS=8, UNTIMED_STEPS=4)
    assert report["base"][0]["task_loss"] == 4
    best = [(row["name"], row["rate"]) for row in report["rates"] if row["best"] == "yes"]
    assert best == [("all weights", 2e-3), ("random experts", 2e-3)]
    for row in report["train"]:
        assert (row["task_loss"], row["task_loss spread"], row["x_all"]) == (3.5, 1, 1)
        assert (row["trained"], row["forgotten"], row["text_loss spread"]) == (200, 0, 0)
    before, after, recovered = report["prune"]
    assert before["x_before"] == recovered["x_before"] == 1
    assert after["x_before"] == pytest.approx((math.exp(4 - 3) + math.exp(4 - 4)) / 2)
    assert [row["gigabytes"] for row in report["cost"]] == [8.5, 8.5]
    ran.clear()
    again = experts("--seeds 2 --parts train prune")
    assert again["train"] == report["train"] and again["prune"] == report["prune"]
    assert ran == []
    with pytest.raises(UserError, match="results of other settings"):
        experts("--share 0.5")
    with pytest.raises(RunError, match="the time is over; repeat"):
        experts("--seeds 3 --minutes 0")


@slow
def test_experts_for_real(experts: Callable[..., dict[str, Any]]) -> None:
    """Trains, measures the experts, prunes to half and trains again."""
    whole = import_module("experts").WAYS["all weights"]._replace(rates=(1e-3,))
    report = experts("--parts prune --seeds 1", WAYS={"all weights": whole})
    before, after, recovered = report["prune"]
    assert before["perplexity"] == pytest.approx(math.exp(report["rates"][0]["task_loss"]), 1e-3)
    assert after["perplexity"] != before["perplexity"] != recovered["perplexity"]
    assert after["text_loss"] != before["text_loss"] != recovered["text_loss"]


def test_multi_gpu_trains_what_fits_and_compares_rates(run, base, monkeypatch):
    """The dry run says 2 GB, and a GPU has as much, but the whole of it cannot be used."""
    monkeypatch.setattr("finetune_runs.finetune", lambda *_, **__: PRINTED)
    gpu = SimpleNamespace(total_memory=2.1e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    shares = {"communication": 0.2, "exposed": 0.1}
    command = "multi_gpu --gpus 4 1 2 --parts train"
    monkeypatch.setattr("finetune_runs.profiled", lambda *_: (shares, PRINTED))
    rows = run(command, measured=lambda *_: {})["train"]
    found = [(row["name"], row["gpus"], row["rows"], row["scaling"]) for row in rows]
    scaling = {1: 1, 2: 1 / 2, 4: 1 / 4}
    assert found[:3] == [("full, ZeRO-3", gpus, 0, None) for gpus in scaling]
    assert found[3:6] == [("QLoRA, ZeRO-2", gpus, 16, scaling[gpus]) for gpus in scaling]


@slow
@pytest.mark.usefixtures("deepspeed_extensions")
def test_multi_gpu(run, base):
    """Two processes talk, train, and generate the tokens of one."""
    changed = {"ROWS": (2,), "LENGTH": 32, "BATCHES": (1, 3), "PROMPT": 8, "NEW": 8}
    changed["SETTINGS"] = {"ZeRO-3": "--use_cpu True --deepspeed configs/ds_config_zero3.json"}
    changed["WAYS"] = ("one", "tensor")
    report = run("multi_gpu --gpus 2 --dtype float32", **changed)
    assert report["bytes_s"] > 0
    [row] = report["train"]
    assert row["rows"] == 2 and row["tokens_s"] == pytest.approx(2 * 32 * 1000 / row["step_ms"])
    assert 0 < row["communication"] < 1 and 0 <= row["exposed"] < 1
    found = [(row["way"], row["gpus"], row["same"], row["tokens"]) for row in report["inference"]]
    ways = [("one", 1), ("tensor", 2)]
    assert found == [(*way, tokens, tokens) for way in ways for tokens in (8, 24)]


@slow
@pytest.mark.usefixtures("deepspeed_extensions")
def test_a_rank_that_dies_in_a_save(run, base):
    options = "--use_cpu True --use_lora True --deepspeed configs/ds_config_zero2_no_offload.json"
    changed = {"SETTINGS": {"LoRA": options}, "ROWS": (2,), "LENGTH": 32}
    [row] = run(f"multi_gpu --kill --gpus 2 --folder {base.parent}", **changed)["kill"]
    assert (row["exit_code"], row["kept"], row["steps_then"]) == (-9, "checkpoint-2", "3, 4")
    assert row["apart"] < 1e-4


def test_plots(run, monkeypatch, tmp_path):
    """Every run draws the same bytes."""
    monkeypatch.syspath_prepend(ROOT / "images")
    monkeypatch.setattr(sys, "argv", ["plots", "--output", str(tmp_path)])
    drawn = []
    for _ in range(2):
        import_module("plots").main()
        names = ("decode.png", "train.png", "decode.svg", "train.svg")
        drawn.append([(tmp_path / name).read_bytes() for name in names])
    assert drawn[0] == drawn[1] and drawn[0][0][:4] == b"\x89PNG"
