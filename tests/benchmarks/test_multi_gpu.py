"""benchmarks/multi_gpu.py: what it makes of logs, profiles and tokens; whole runs on two CPUs."""

import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from option_fixtures import parse_arguments
from transformers.distributed import DistributedConfig

from deepseek_moe.errors import UserError

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.append(str(FOLDER))
multi_gpu, one_rank = import_module("multi_gpu"), import_module("one_rank")
processes = import_module("processes")

LOG = "step {}/9  loss 8.2101  bal 0.0010  norm 4.69  lr 1.0e-06  {} tok/s{}\n"
SHARES = {"communication": 0.25, "exposed": 0.125}


def log(rates: list[str], size: str = "  20.5 GB") -> str:
    return "".join(LOG.format(i + 1, rate, size) for i, rate in enumerate(rates))


def test_rates_are_a_gpus_of_the_steps_that_count() -> None:
    printed = log(["100"] * 3 + ["40,000", "40,000", "20,000", "20,000", "40,000", "7"])
    line = multi_gpu.Trained("LoRA", gpus=4, rows=16)
    multi_gpu.trained(line, printed, SHARES, length=1024)
    assert line.tokens_s == pytest.approx(5 / (3 / 10_000 + 2 / 5_000))  # by time, not by step
    assert line.step_ms == pytest.approx(1000 * 16 * 1024 / line.tokens_s)
    assert line.cells()[3:] == ["20.5", "25 %", "12 %", "-"]


def test_a_log_of_cpus_has_no_memory() -> None:
    line = multi_gpu.Trained("LoRA", gpus=2, rows=2)
    multi_gpu.trained(line, log(["100"] * 9, ""), SHARES, length=64)
    assert (line.tokens_s, line.gigabytes) == (50, None)


@pytest.mark.parametrize(("steps", "shares"), [(9, {}), (7, SHARES)])
def test_a_run_that_failed_has_an_empty_line(steps: int, shares: dict[str, float]) -> None:
    line = multi_gpu.Trained("LoRA", gpus=2, rows=2)
    multi_gpu.trained(line, log(["100"] * steps), shares, length=64)
    assert line.cells() == ["2", *["-"] * 6]
    assert multi_gpu.Trained("full", gpus=1, rows=0).cells()[0] == "no fit"


def test_scaling_is_over_the_fewest_gpus_with_as_many_rows() -> None:
    def line(name: str, gpus: int, rows: int, rate: float | None) -> multi_gpu.Trained:
        return multi_gpu.Trained(name, gpus, rows, rate)

    before = [line("full", 1, 0, None), line("full", 2, 4, 100.0), line("LoRA", 1, 16, 500.0)]
    assert multi_gpu.scaling(line("full", 4, 4, 80.0), before) == 0.8
    assert multi_gpu.scaling(line("LoRA", 8, 16, 450.0), before) == 0.9
    assert multi_gpu.scaling(line("full", 8, 16, 90.0), before) is None  # other rows
    assert multi_gpu.scaling(line("LoRA", 8, 16, None), before) is None


def test_shares_of_a_step() -> None:
    spans = [
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 0.0, 4.0),
        ("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL", 3.0, 5.0),  # on another stream
        ("nvjet_tst_128x256", 1.0, 2.0),
        ("Memcpy DtoD (Device -> Device)", 4.5, 7.0),
    ]
    assert one_rank.shares(spans, 10.0) == pytest.approx({"communication": 0.5, "exposed": 0.35})
    assert one_rank.shares(spans[2:], 10.0) == {"communication": 0, "exposed": 0}


def test_tokens_are_common_up_to_the_first_other() -> None:
    wanted = [[1, 2, 3, 4], [5, 6, 7, 8], [9, 9, 9, 9]]
    assert multi_gpu.common(wanted, wanted) == 12
    assert multi_gpu.common([[1, 2, 0, 4], [0, 6, 7, 8], [9, 9, 9, 9]], wanted) == 2 + 0 + 4


def test_a_death_is_judged() -> None:
    again, found = list("3456"), [9.0, 8.0, 7.0, 6.0, 5.0, 4.0]
    judged = import_module("kill").judged
    good = judged(247, ["checkpoint-2"], again, [*found[:5], 4.4], found)
    assert good == "exit code 247; went on from step 2, losses within 1e-01 of a whole run's"
    for broken in (
        (0, ["checkpoint-2"], again, found, found),  # nobody died
        (1, ["checkpoint-2", "checkpoint-4"], again, found, found),  # after the save
        (1, ["checkpoint-2"], list("123456"), found, found),  # from the beginning
        (1, ["checkpoint-2"], again, [], found),  # it failed again
    ):
        assert judged(*broken).startswith("FAILED")


def test_the_plans_are_spelt_as_this_transformers_does() -> None:
    tensor, expert = (
        DistributedConfig(**one_rank.parallel_options(way, 4)) for way in ("tensor", "expert")
    )
    assert tensor.tp_size == expert.tp_size == 4
    assert not tensor.enable_expert_parallel and getattr(tensor, "ep_size", 1) in (None, 1)
    assert expert.enable_expert_parallel or expert.ep_size == 4


def test_every_setting_is_one_that_the_script_takes() -> None:
    for options in multi_gpu.SETTINGS.values():
        command = multi_gpu.command_of(Path("m"), Path("d"), 16, 1024, options, 9).split()
        at = command.index("--deepspeed")  # which wants its launcher; its files: test_configs.py
        file = command.pop(at + 1)
        assert file == multi_gpu.AUTOEP or (FOLDER.parent / "finetune" / file).is_file()
        parse_arguments([*command[:at], *command[at + 1 :], "--output_dir", "out"])


@pytest.mark.parametrize("there", [0, 1])
def test_without_enough_gpus_it_says_so(there: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    monkeypatch.setattr(sys, "argv", ["multi_gpu.py", "--gpus", "2"])
    with pytest.raises(UserError, match=rf"{there} GPU.*is 2") as caught:
        multi_gpu.parse_arguments()
    assert caught.value.exit_code == 2


def test_a_setting_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["multi_gpu.py", "--device", "cpu", "--only", "lora"])
    with pytest.raises(UserError, match=r"'lora'.*; LoRA, ZeRO-2"):
        multi_gpu.parse_arguments()


@pytest.mark.parametrize("way", ["done", "late", "file"])
def test_a_command_is_ended(way: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """When it is done, too late, or has written what was asked for."""
    file = tmp_path / "file"
    then = {
        "done": "",
        "late": "time.sleep(60)",
        "file": f"open({str(file)!r}, 'w'); time.sleep(60)",
    }
    code = f"import time; print('begun', flush=True); {then[way]}"
    limit = 3 if way == "late" else 30
    command = [sys.executable, "-c", code]
    printed, ended = processes.run(command, tmp_path / "log", limit, lambda _: file.exists())
    assert printed == "begun\n" and ended == (0 if way == "done" else -9)
    assert ("begun" in capfd.readouterr().err) == (way != "file")


def run(options: str, folder: Path) -> str:
    command = [sys.executable, str(FOLDER / "multi_gpu.py"), "--device", "cpu", *options.split()]
    command += ["--folder", str(folder), "--timeout", "240"]  # of each run in it, 30 s alone here
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.usefixtures("deepspeed_extensions")
def test_training_on_two_cpus(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    printed = run(f"--only full --parts train --output_file {file}", tmp_path)
    number = r"([\d,.]+)"
    found = re.findall(
        rf"full, ZeRO-3 +(\d) +2 +{number} +{number} +- +(\d+) % +(\d+) % +(\d+ %|-)\n", printed
    )
    assert [line[0] for line in found] == ["1", "2"], printed
    assert int(found[1][3]) > 0  # two processes talk
    assert found[0][5] == "-" and found[1][5] != "-"
    assert re.search(rf"link: {number} GB/s", printed)
    report = json.loads(file.read_text())
    assert [line["gpus"] for line in report["train"]] == [1, 2, 2] and report["bytes_s"] > 0
    # DeepSpeed's patterns still find this model's mixtures.
    assert re.search(rf"full, AutoEP +2 +2 +{number} ", printed), printed


@pytest.mark.slow
@pytest.mark.usefixtures("deepspeed_extensions")
def test_inference_on_two_cpus_finds_the_tokens_of_one(tmp_path: Path) -> None:
    sizes = "--batch_sizes 1 3 --prompt_tokens 8 --new_tokens 8"
    printed = run(f"--parts inference {sizes}", tmp_path)
    found = re.findall(r"(one|tensor|expert) +(\d) +(\d) +[\d,.]+ +- +(\d+) +(\d+)\n", printed)
    ways = [("one", "1"), ("tensor", "2"), ("expert", "2")]
    wanted = [(*way, size, n, n) for way in ways for size, n in (("1", "8"), ("3", "24"))]
    assert found == wanted, printed


@pytest.mark.slow
@pytest.mark.usefixtures("deepspeed_extensions")
def test_a_rank_that_dies_in_a_save_on_two_cpus(tmp_path: Path) -> None:
    printed = run("--only QLoRA --kill", tmp_path)
    within = re.search(
        r"QLoRA, ZeRO-2 +2 exit code \d+; went on from step 2, losses within (\S+)", printed
    )
    assert within and float(within[1]) < 1e-4, printed
