"""The script end to end, in one run each: what it says and does, and how it refuses wrong use."""

import json
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accident_fixtures import TUNER, before_call
from finetune_fixtures import history, run, succeed
from finetune_options import parse_options
from safetensors.torch import save_file

MakeArgv = Callable[..., list[str]]


def test_a_run_takes_the_steps_of_its_dry_run_and_logs_perplexity(
    argv: MakeArgv, place: Path, tmp_path: Path
) -> None:
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


def test_wrong_use_is_found_before_the_model_is_loaded(
    argv: MakeArgv, place: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(place / "base", tmp_path / "base")
    save_file({"other": torch.zeros(1)}, base / "model.safetensors")  # not such a model's weights
    (tmp_path / "bad.json").write_text('[{"instruction": "a", "output": "b"}, {"output": "b"}]')
    (tmp_path / "file").write_text("")
    (tmp_path / "long.jsonl").write_text(json.dumps({"instruction": "a", "output": "b " * 300}))

    def wrong(**changes: Any) -> str:
        words = argv(tmp_path / "out", **({"model_name_or_path": base} | changes))
        return run(words, tmp_path / "log").refusal

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
    assert "ids up to 4095" in wrong()  # The tokenizer is of another model.
    assert not (tmp_path / "out").exists()


def test_a_mistaken_option_is_reported_by_the_first_process_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
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


def test_full_determinism_leaves_out_what_adds_in_no_fixed_order(
    argv: MakeArgv, tmp_path: Path
) -> None:
    """cuDNN's attention does so on a GPU even when torch is asked for deterministic ways."""
    words = argv(tmp_path / "out", max_steps=2, full_determinism=True)
    in_step = partial(before_call, TUNER, "compute_loss", 1, print_attention)
    assert "deterministic True, cudnn False" in succeed(words, tmp_path / "log", in_step).out
