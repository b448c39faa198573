"""The benchmark of decoding: its arithmetic, what it times, prints and draws; whole runs."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from deepseek_moe import DeepseekConfig, DeepseekForCausalLM
from deepseek_moe.decode.generation import Generator
from deepseek_moe.decode.load import load
from deepseek_moe.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
BUNDLED = ROOT / "models" / "tiny-base"
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "images")]
limits, rates, start, decode = map(import_module, ("limits", "rates", "start", "decode"))
H200 = 4.24e12  # bytes/s
CPU = torch.device("cpu")


def numbers(config: DeepseekConfig) -> int:
    """Of all parameters."""
    with torch.device("meta"):
        return sum(p.numel() for p in DeepseekForCausalLM(config).parameters())


# limits.py


@pytest.mark.parametrize(
    "changes", [{}, {"n_shared_experts": None}, {"num_key_value_heads": 2}, {"moe_layer_freq": 2}]
)
def test_the_numbers_of_all_layers_are_the_models(
    changes: dict[str, Any], tiny_config: Callable[..., DeepseekConfig]
) -> None:
    config = tiny_config(**changes)
    layers = [limits.layer_numbers(config, i) for i in range(config.num_hidden_layers)]
    E, D = config.n_routed_experts, config.hidden_size
    found = sum(layer.kv + layer.dense + layer.small + E * layer.expert for layer in layers)
    assert found + D + 2 * config.vocab_size * D == numbers(config)


def test_the_official_model_reads_what_is_known() -> None:
    config = DeepseekConfig()
    assert limits.step_bytes(config, 1, 0) == pytest.approx(5.24e9, rel=1e-3)
    assert limits.distinct_experts(config, 1) == pytest.approx(6)
    assert limits.distinct_experts(config, 8) == pytest.approx(34.9, abs=0.05)
    for batch, known in ((1, 805), (8, 1790), (64, 7700), (256, 24000)):
        limit = batch * H200 / limits.step_bytes(config, batch, 220)
        assert limit == pytest.approx(known, rel=0.02), batch
    cache = limits.step_bytes(config, 3, 10) - limits.step_bytes(config, 3, 0)
    assert cache == 3 * 10 * 2 * 28 * 2048 * 2


@pytest.mark.parametrize(("quantization", "bits"), [(None, None), ("int8", 8), ("int4", 4)])
def test_a_step_of_many_reads_all_that_is_stored(quantization: str | None, bits: int) -> None:
    model, _ = load(str(BUNDLED), "float32", "cpu", quantization=quantization)
    embedding = model.model.embed_tokens.weight.nbytes
    stored = sum(parameter.nbytes for parameter in model.parameters()) - embedding
    assert limits.step_bytes(model.config, 10**6, 0, 4, bits) == pytest.approx(stored, rel=1e-3)


def test_the_operations_of_prompts(tiny_config: Callable[..., DeepseekConfig]) -> None:
    config = tiny_config()
    D, layers, head = config.hidden_size, config.num_hidden_layers, 96 * 32
    idle = 5 * 3 * D * config.moe_intermediate_size * 2  # experts not chosen, of two layers
    norms = (2 * layers + 1) * D
    active = numbers(config) - head - idle - norms  # less the embedding, as large as the head
    assert limits.prompt_flops(config, [1]) == 2 * active + 4 * D * layers
    two, one = limits.prompt_flops(config, [7, 7]), limits.prompt_flops(config, [7])
    assert two == 2 * one < limits.prompt_flops(config, [14]) + 2 * head + 2 * active
    # Attention of 4,096 tokens of the official model: less than all layers, all products.
    flops = limits.prompt_flops(DeepseekConfig(), [4096]) / 4096
    assert 0.85 * 5.7e9 < flops < 5.7e9


def test_the_median_leaves_the_first_call_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0, 100, 200, 201, 300, 303, 400, 402])
    monkeypatch.setattr(limits.time, "perf_counter", lambda: next(clock))
    calls: list[int] = []
    assert limits.median_seconds(lambda: calls.append(1), CPU, times=3) == 2
    assert len(calls) == 4


# rates.py


def test_the_first_tokens_are_not_in_the_time_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now, asked = [0.0], []

    def stream(prompts: list[list[int]], new: int) -> Iterator[list[int]]:
        asked.append(new)
        for n in range(new):
            now[0] += 50.0 if n <= rates.LEAD else 0.5
            yield [n]

    monkeypatch.setattr(rates.time, "perf_counter", lambda: now[0])
    assert rates.decode_seconds(SimpleNamespace(stream=stream), [[1]], 10) == 0.5
    assert set(asked) == {10}  # to warm up too: another length would have another cache


def test_stock_and_engine_are_timed(tiny_model: Callable[..., DeepseekForCausalLM]) -> None:
    model = tiny_model()
    prompts = rates.random_prompts(model, 2, 8)
    assert prompts == rates.random_prompts(model, 2, 8) and max(max(prompts)) < 96
    assert 0 < rates.stock_decode_seconds(model, prompts) < 10
    assert 0 < rates.stock_prefill_seconds(model, prompts) < 10
    assert 0 < rates.prefill_seconds(Generator(model), prompts) < 10


def test_experts_are_counted_over_the_last_tokens(
    tiny_model: Callable[..., DeepseekForCausalLM],
) -> None:
    model = tiny_model()
    texts = rates.random_prompts(model, 20, 6)
    assert rates.chosen_experts(model, texts[:1]) == 3
    assert rates.chosen_experts(model, [texts[0]] * 20) == 3
    # Which texts go with which changes nothing: count by a stack of texts and one by one.
    picks: dict[nn.Module, set[int]] = {}
    for text in texts:
        for layer in model.model.layers[1:]:
            mine = picks.setdefault(layer, set())
            layer.mlp.gate.register_forward_hook(
                lambda _, inputs, out, mine=mine: mine.update(out[2][-1].tolist())
            )
        model(torch.tensor([text]))
        for layer in model.model.layers[1:]:
            layer.mlp.gate._forward_hooks.clear()
    expected = sum(map(len, picks.values())) / len(picks)
    assert rates.chosen_experts(model, texts) == expected > 3


def test_too_little_memory_is_a_word_in_the_table() -> None:
    def fail() -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert rates.or_no_memory(fail, CPU) == rates.NO_MEMORY
    assert rates.or_no_memory(lambda: 2.0, CPU) == 2.0
    with pytest.raises(ZeroDivisionError):
        rates.or_no_memory(lambda: 1 / 0, CPU)


# decode.py


def decoded(**changes: Any) -> Any:
    fields = {"weights": "bfloat16", "weights_bytes": 32_760_000_000, "batch_size": 8}
    fields |= {"tokens_s": 1600.0, "stock_tokens_s": 100.0, "unpacked_tokens_s": None}
    fields |= {"limit_tokens_s": 2000.0, "experts": 34.0, "experts_expected": 34.9}
    return decode.Decoded(**(fields | changes))


def test_a_line_of_the_table() -> None:
    _, columns = decode.TABLES[decode.Decoded]
    cells = dict(zip(columns, decoded().cells(), strict=True))
    assert cells == {
        "weights": "bfloat16", "GB": "32.76", "batch": "8", "project": "1,600",
        "ms a step": "5.000", "stock": "100.0", "x stock": "16.00", "x unpacked": "-",
        "limit": "2,000", "of limit": "80 %", "experts": "34.0", "expected": "34.9",
    }  # fmt: skip
    assert len(decode.aligned(columns)) == len(decode.aligned(decoded().cells()))


def test_what_was_not_measured_in_a_line() -> None:
    full = decoded(tokens_s=rates.NO_MEMORY, experts=None).cells()
    assert full[3:8] == ["no memory", "-", "100.0", "-", "-"] and full[9:11] == ["-", "-"]
    packed = decoded(weights="int4", stock_tokens_s=None, unpacked_tokens_s=800.0).cells()
    assert packed[5:8] == ["-", "-", "2.00"]
    assert decode.Prefilled(16, 512, 100.0, rates.NO_MEMORY, 400.0).cells() == [
        "16 x 512", "100.0", "no memory", "-", "400.0", "25 %",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--skip stok", "stok.*stock"),
        ("--new_tokens 4", "new_tokens is 4"),
        ("--prefill 16", "16x512"),
        ("--prefill 1x2x3", "16x512"),
        ("--output_file /no/such/folder/file", "cannot be written"),
    ],
)
def test_options_that_cannot_be_measured(
    options: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["decode.py", *options.split()])
    with pytest.raises(UserError, match=said):
        decode.parse_arguments()


def test_an_output_file_that_is_there_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "report.json"
    file.write_text("mine")
    words = ["decode.py", "--output_file", str(file)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(UserError, match="is there already"):
        decode.parse_arguments()
    monkeypatch.setattr(sys, "argv", [*words, "--overwrite"])
    assert decode.parse_arguments().output_file == file
    assert file.read_text() == "mine"


def run_decode(options: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    options += " --device cpu --new_tokens 6 --prompt_tokens 8 --batch_sizes 1 2 --prefill 2x16"
    monkeypatch.setattr(sys, "argv", ["decode.py", *options.split(), "--output_file", str(file)])
    decode.main()
    return json.loads(file.read_text())


def test_a_whole_run_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def one_start(model: str, device: str) -> Iterator[Any]:
        yield start.Start("empty", {"imports": 1.0}, 10**9, 10**9)
        raise UserError("a start failed: of hunger; try it by itself")

    monkeypatch.setattr(decode, "starts", one_start)
    report = run_decode("", tmp_path / "report.json", monkeypatch)
    printed = capsys.readouterr().out
    assert len(report["start"]) == 1 and "of hunger" in printed  # and the rest goes on
    rows = report["decode"]
    assert [(row["weights"], row["batch_size"]) for row in rows] == [
        ("float32", 1), ("float32", 2), ("int8", 1), ("int4", 1),
    ]  # fmt: skip
    assert all(row["tokens_s"] > 0 for row in rows)
    assert [row["stock_tokens_s"] is None for row in rows] == [False, False, True, True]
    assert [row["unpacked_tokens_s"] for row in rows[2:]] == [rows[0]["tokens_s"]] * 2
    assert rows[0]["experts"] == 6 < rows[1]["experts"]
    assert rows[0]["weights_bytes"] > 2 * rows[2]["weights_bytes"] > 2 * rows[3]["weights_bytes"]
    assert report["prefill"][0]["tokens_s"] > 0
    for name in ("hardware", "torch", "triton", "transformers"):
        assert report["machine"][name] in printed
    assert report["command"] in printed
    lines = [line for line in printed.split("\n") if re.match(r" *(float32|int\d) ", line)]
    assert len(lines) == 4 and "2 x 16" in printed
    draw = import_module("draw")
    draw.plt.close(draw.draw_decode(report))


@pytest.mark.slow
def test_starts_are_timed_in_processes_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = run_decode("--skip quantization,stock", tmp_path / "report.json", monkeypatch)
    assert [part["triton_cache"] for part in report["start"]] == ["empty", "filled"]
    for part in report["start"]:
        assert list(part["seconds"]) == ["imports", "load", "first token", "token 9"]
        assert 0.1 < part["seconds"]["imports"] < part["seconds"]["token 9"] < 60
        assert 5e7 < part["anonymous_bytes"] < part["resident_bytes"] < 5e9
        assert part["largest_file"] == (BUNDLED / "model.safetensors").stat().st_size
    assert "empty Triton cache: imports" in capsys.readouterr().out


@pytest.mark.slow
def test_a_start_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist") as caught:
        start.one_start(str(tmp_path / "none"), "cpu", "empty", tmp_path)
    assert "\n" not in str(caught.value)


def test_a_line_of_a_start() -> None:
    one = start.Start("empty", {"imports": 2.0, "load": 10.5}, 1_500_000_000, 3_000_000_000)
    assert start.describe(one, 1_250_000_000) == (
        "imports 2.0 s (+2.0), load 10.5 s (+8.5); host memory at most 1.50 GB, 3.00 GB with files "
        "(largest file 1.25 GB)"
    )
