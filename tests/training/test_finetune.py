"""The script end to end: killed, stopped and repeated, what it leaves, says and refuses."""

import json
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accident_fixtures import (
    TUNER,
    before_call,
    die,
    die_after_training,
    die_before_renaming_to,
    die_in_file,
    die_in_step,
    limit_file_size,
    stop_in_step,
)
from finetune_fixtures import (
    assert_same,
    checkpoints,
    forbid_loading,
    history,
    logged,
    run,
    succeed,
    weights,
)
from finetune_options import parse_options
from peft import PeftModel
from transformers import AutoModelForCausalLM

from deepseek_moe.training.run import WRITTEN

MakeArgv = Callable[..., list[str]]
KILLED = -signal.SIGKILL
LORA = {"use_lora": True, "lora_dropout": 0.2, "lora_rank": 3}
MODES: dict[str, dict[str, Any]] = {"full": {}, "lora": LORA}


@pytest.fixture(scope="module")
def finished(place: Path, argv: MakeArgv) -> dict[str, Path]:
    """The output folders of uninterrupted runs."""
    for mode, settings in MODES.items():
        words = argv(place / mode, report_to="tensorboard", **settings)
        done = succeed(words, place / f"{mode}_log")
        assert done.out == f"{place / mode}\n"  # results only
    return {mode: place / mode for mode in MODES}


def files_of(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*"))


def assert_complete(output: Path, reference: Path) -> None:
    """Every folder that is called a checkpoint has all the files that it has to."""
    for step in checkpoints(output):
        found = files_of(output / f"checkpoint-{step}")
        assert found == files_of(reference / f"checkpoint-{checkpoints(reference)[0]}")
        json.loads((output / f"checkpoint-{step}" / "trainer_state.json").read_text())


# Accidents one after another, and the checkpoints that must be there after each.
KILLS = {
    "full": [
        (partial(die_in_file, 2), []),  # in the first save
        (partial(die_in_step, 8), [3, 6]),
        (partial(die_in_step, 5), [3, 6, 9]),  # resumed between two epochs
        (partial(die_in_file, 2), [3, 6, 9]),  # resumed inside of an epoch
        (partial(die_before_renaming_to, "out/checkpoint-12"), [3, 6, 9]),
        (die_after_training, [3, 6, 9, 12]),
        (partial(die_before_renaming_to, "out/tokenizer_config.json"), [3, 6, 9, 12]),
    ],
    "lora": [(partial(die_in_step, 5), [3]), (die_after_training, [3, 6, 9, 12])],
}


@pytest.mark.parametrize("mode", MODES)
def test_killed_at_any_moment_and_repeated_it_ends_the_same(mode, finished, argv, tmp_path):
    output, log = tmp_path / "out", tmp_path / "log"
    words = argv(output, **MODES[mode])
    for accident, there in KILLS[mode]:
        killed = run(words, log, accident)
        assert killed.code == KILLED, killed.err
        assert checkpoints(output) == there
        assert_complete(output, finished[mode])
        assert not json.loads((output / "run.json").read_text())["finished"]
    succeed(words, log)
    assert_same(output, finished[mode])
    wanted = [name for name in files_of(finished[mode]) if not name.startswith("runs")]
    assert files_of(output) == wanted
    for key in ("loss", "balance_loss", "grad_norm", "learning_rate"):
        assert logged(output, key) == logged(finished[mode], key)


def stop_and_die_after_it(step: int, number: int) -> None:
    """The process would die in an evaluation, and in a second save."""
    stop_in_step(step, number)
    before_call(TUNER, "evaluation_loop", 1, die)
    before_call(TUNER, "_save_checkpoint", 2, die)


def test_a_signal_saves_once_and_the_repeat_goes_on(argv, tmp_path):
    """Of ten steps, five an epoch, it comes in the third and in the fifth, which are evaluated."""
    whole, output, log = tmp_path / "whole", tmp_path / "out", tmp_path / "log"
    settings = LORA | {"save_strategy": "epoch", "eval_fraction": 0.25}
    by_step = settings | {"eval_strategy": "steps", "eval_steps": 3}
    by_epoch = settings | {"eval_strategy": "epoch"}
    succeed(argv(whole, **by_step), log)
    for number, evaluated, taken, there in (
        (signal.SIGTERM, by_step, 3, [3]),
        (signal.SIGINT, by_epoch, 2, [3, 5]),
    ):
        accident = partial(stop_and_die_after_it, taken, number)
        stopped = run(argv(output, **evaluated), log, accident)
        assert stopped.code == 128 + number, stopped.err
        assert "Traceback" not in stopped.err and stopped.out == ""
        assert checkpoints(output) == there
        assert_complete(output, whole)
    repeated = succeed(argv(output, **by_step), log)
    assert "step 6/10" in repeated.err and "step 5/10" not in repeated.err
    assert_same(output, whole)
    assert logged(output, "loss") == logged(whole, "loss")
    # The evaluations that would have come at the stops are left out.
    assert logged(output, "eval_loss") == logged(whole, "eval_loss")[1:]


def test_the_repeat_of_a_run_that_died_after_its_last_step_takes_no_other(argv, tmp_path):
    """Its last step is inside of an epoch, which has six. Only the newest checkpoint is kept."""
    output, log = tmp_path / "out", tmp_path / "log"
    five = {"max_steps": 5, "lr_scheduler_type": "constant", "save_total_limit": 1}
    assert run(argv(output, **five), log, die_after_training).code == KILLED
    assert checkpoints(output) == [5]
    repeated = succeed(argv(output, **five), log)
    assert "step 6" not in repeated.err
    assert checkpoints(output) == [5]
    result, last = weights(output), weights(output / "checkpoint-5")
    assert all(torch.equal(result[name], last[name].bfloat16()) for name in last)


def test_a_finished_run_says_so_and_touches_nothing(finished, argv, tmp_path):
    folder = finished["full"]
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    again = succeed(argv(folder), tmp_path / "log")
    assert "finished" in again.err
    assert again.out == f"{folder}\n"
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("config.json", {"scoring_func": "sigmoid"}),
        ("config.json", {"num_key_value_heads": 0}),
        ("config.json", {"num_hidden_layers": 10**9}),
        ("config.json", {"attention_bias": True}),  # its weights are not there
        ("generation_config.json", {"eos_token_id": "x"}),
    ],
)
def test_a_base_that_cannot_be_used_is_refused_before_a_file_is_written(
    name, change, argv, place, tmp_path
):
    base = shutil.copytree(place / "base", tmp_path / "base")
    file = base / name
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    command = argv(tmp_path / "out", model_name_or_path=base)
    assert str(base) in run(command, tmp_path / "log").refusal
    assert not (tmp_path / "out").exists()


def test_every_file_of_a_result_is_known_as_one_that_a_run_writes(finished, argv, tmp_path):
    """A new run refuses a folder where the user has a file of such a name."""
    quantised = tmp_path / "quantised"
    succeed(argv(quantised, **LORA, bits=4, max_steps=1), tmp_path / "log")
    for folder in (*finished.values(), quantised):
        names = {file.name for file in folder.iterdir()} - {"run.json", ".lock", "runs"}
        names.discard("README.md")  # one of the user's stays
        assert names == {file.name for pattern in WRITTEN for file in folder.glob(pattern)}


def test_a_full_disk_is_one_line_and_the_repeat_goes_on(finished, argv, tmp_path):
    """It is full in the weights of the first checkpoint, and then in the second one's optimizer."""
    output, log = tmp_path / "out", tmp_path / "log"
    for size, there, named in ((600_000, [], "none"), (1_500_000, [3], output / "checkpoint-3")):
        full_disk = partial(limit_file_size, size)
        in_save = partial(before_call, TUNER, "_save_checkpoint", 1 + len(there), full_disk)
        full = run(argv(output), log, in_save)
        assert full.code == 1
        assert f"{output} could not be written to" in full.error
        assert f"the last complete checkpoint is {named}" in full.error
        assert checkpoints(output) == there
        assert_complete(output, finished["full"])
        assert not (output / "incomplete").exists()
    succeed(argv(output), log)
    assert_same(output, finished["full"])


def test_the_result_is_a_model_that_learnt(finished, place):
    full = AutoModelForCausalLM.from_pretrained(finished["full"])
    base = AutoModelForCausalLM.from_pretrained(place / "base")
    assert full.dtype == torch.bfloat16
    assert not torch.equal(full.lm_head.weight, base.lm_head.weight)
    assert PeftModel.from_pretrained(base, finished["lora"]).peft_config["default"].r == 3
    for folder in finished.values():
        losses = logged(folder, "loss")
        assert len(losses) == 12
        assert sum(losses[6:]) < sum(losses[:6])


def test_an_adapter_that_cannot_be_merged_is_kept(argv, tmp_path):
    output = tmp_path / "out"
    words = argv(output, merge_on_save=True, use_lora=True, learning_rate=0, max_steps=1)
    done = run(words, tmp_path / "log")
    assert done.code == 2 and "changes nothing" in done.error
    assert (output / "adapter" / "adapter_model.safetensors").is_file()
    assert not (output / "config.json").exists()


def test_a_run_takes_the_steps_of_its_dry_run_and_logs_perplexity(argv, place, tmp_path):
    """Of 24 rows to train on, five at a time, the last four are dropped; all are evaluated."""
    output, log = tmp_path / "out", tmp_path / "log"
    whole = {"per_device_train_batch_size": 5, "dataloader_drop_last": True}
    whole |= {"eval_strategy": "epoch", "eval_data_path": place / "rows.jsonl"}
    whole |= {"per_device_eval_batch_size": 25}
    planned = succeed(argv(output, dry_run=True, show_examples=2, **whole), log)
    assert "8 of 5 rows" in planned.out
    shown = [line for line in planned.err.splitlines() if "⟦" in line]
    assert len(shown) == 2  # with the answer and its end marked
    assert all(line.startswith("Assistant:⟦ ") for line in shown)
    assert all(line.endswith("<｜end▁of▁sentence｜>⟧") for line in shown)
    done = succeed(argv(output, save_steps=8, **whole), log)
    assert "step 8/8" in done.err and "evaluation: loss" in done.err and "perplexity" in done.err
    evaluations = [line for line in history(output) if "eval_loss" in line]
    assert evaluations
    for line in evaluations:
        assert line["eval_perplexity"] == pytest.approx(torch.tensor(line["eval_loss"]).exp())
    again = succeed(argv(output, dry_run=True, save_steps=8, **whole), log)
    assert "this run is finished already" in again.err and "8 of 5 rows" in again.out
    assert "finished" not in planned.err


def test_wrong_use_is_found_before_the_model_is_loaded(argv, place, tmp_path):
    base = shutil.copytree(place / "base", tmp_path / "base")
    (tmp_path / "bad.json").write_text('[{"instruction": "a", "output": "b"}, {"output": "b"}]')
    (tmp_path / "file").write_text("")
    (tmp_path / "long.jsonl").write_text(json.dumps({"instruction": "a", "output": "b " * 300}))

    def wrong(**changes: Any) -> str:
        words = argv(tmp_path / "out", **({"model_name_or_path": base} | changes))
        return run(words, tmp_path / "log", forbid_loading).refusal

    assert "bad.json row 2: no instruction" in wrong(data_path=tmp_path / "bad.json")
    assert "file is no folder" in wrong(output_dir=tmp_path / "file")
    assert "cannot be written to" in wrong(output_dir=tmp_path / "file" / "below")
    long = {"model_max_length": 5000, "data_path": tmp_path / "long.jsonl"}
    assert "the model's context is" in wrong(**long) == wrong(**long, dry_run=True)
    dropped = {"dataloader_drop_last": True, "per_device_train_batch_size": 25}
    assert "24 rows are less than a batch of 25" in wrong(**dropped)
    assert "--modules_to_save mlp has in it" in wrong(use_lora=True, modules_to_save="mlp")
    fields = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(fields | {"vocab_size": 4000}))
    assert "shape [4096, 32], the config wants [4000, 32]" in wrong()
    assert not (tmp_path / "out").exists()


def test_a_mistaken_option_is_reported_by_the_first_process_only(monkeypatch, capsys):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    for rank, said in (
        ("0", "error: there is no option --x; --help lists the options\n"),
        ("1", ""),
    ):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit, match="2"):
            parse_options(["--x", "3"])
        assert capsys.readouterr() == ("", said)


def print_attention(*_: Any) -> None:
    deterministic = torch.are_deterministic_algorithms_enabled()
    print(f"deterministic {deterministic}, cudnn {torch.backends.cuda.cudnn_sdp_enabled()}")


def test_full_determinism_leaves_out_what_adds_in_no_fixed_order(argv, tmp_path):
    """cuDNN's attention does so on a GPU even when torch is asked for deterministic ways."""
    words = argv(tmp_path / "out", max_steps=2, full_determinism=True)
    in_step = partial(before_call, TUNER, "compute_loss", 1, print_attention)
    assert "deterministic True, cudnn False" in succeed(words, tmp_path / "log", in_step).out
