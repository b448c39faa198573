"""The script end to end, in one run each: what it says and does, and how it refuses wrong use."""

import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_fixtures import (
    SCRIPT,
    Ended,
    be_process,
    checkpoints,
    command,
    history,
    logged,
    run,
    weights,
)
from safetensors.torch import load_file, save_file
from text_fixtures import BUNDLED, tokenizer_of


def refused(done: Ended) -> str:
    assert done.code == 2, done.err
    assert done.out == ""
    return done.error


def test_the_dry_run_counts_the_steps_of_whole_batches(
    argv: Callable[..., list[str]], place: Path, tmp_path: Path
) -> None:
    """Of 24 rows, five at a time, the last four are dropped."""
    whole = {"per_device_train_batch_size": 5, "dataloader_drop_last": True}
    whole |= {"eval_strategy": "epoch", "eval_data_path": place / "rows.jsonl"}
    whole |= {"per_device_eval_batch_size": 25}
    planned = run(argv(tmp_path / "out", dry_run=True, **whole), tmp_path / "log")
    assert "8 of 5 rows" in planned.out
    done = run(argv(tmp_path / "out", **whole), tmp_path / "log")
    assert done.code == 0 and "step 8/8" in done.err
    assert "evaluation: loss" in done.err and "nan" not in done.err  # of all rows


def test_without_bars_the_lines_of_steps_are_on_stderr(
    argv: Callable[..., list[str]], tmp_path: Path
) -> None:
    done = run(argv(tmp_path / "out", max_steps=2, disable_tqdm=True), tmp_path / "log")
    assert done.code == 0, done.err
    assert done.out == f"{tmp_path / 'out'}\n"
    assert "step 2/2  loss" in done.err and "it/s" not in done.err


def test_an_output_folder_on_a_read_only_disk_is_one_line(
    argv: Callable[..., list[str]], tmp_path: Path
) -> None:
    (tmp_path / "out" / ".lock").mkdir(parents=True)  # root may write anywhere else
    done = run(argv(tmp_path / "out"), tmp_path / "log")
    assert done.code == 2 and "cannot be written to" in done.error


def test_no_limit_keeps_all_checkpoints(argv: Callable[..., list[str]], tmp_path: Path) -> None:
    done = run(argv(tmp_path / "out", max_steps=6, save_total_limit=-1), tmp_path / "log")
    assert done.code == 0, done.err
    assert checkpoints(tmp_path / "out") == [3, 6]


def test_an_optimizer_of_a_missing_package_is_one_line(
    argv: Callable[..., list[str]], tmp_path: Path
) -> None:
    done = run(argv(tmp_path / "out", optim="lomo"), tmp_path / "log")
    assert "--optim lomo cannot be made: " in refused(done)


def test_perplexity_is_logged_while_training(
    argv: Callable[..., list[str]], tmp_path: Path
) -> None:
    held = {"eval_fraction": 0.25, "evaluation_strategy": "steps", "eval_steps": 5}
    done = run(argv(tmp_path / "out", **held), tmp_path / "log")
    assert done.code == 0, done.err
    lines = [line for line in history(tmp_path / "out") if "eval_loss" in line]
    assert [line["step"] for line in lines] == [5, 10]
    for line in lines:
        assert line["eval_perplexity"] == pytest.approx(torch.tensor(line["eval_loss"]).exp())
    assert "perplexity" in done.err


def test_wrong_use_is_found_before_the_model_is_loaded(
    argv: Callable[..., list[str]], place: Path, tmp_path: Path
) -> None:
    shutil.copytree(place / "base", tmp_path / "base")
    save_file({"other": torch.zeros(1)}, tmp_path / "base" / "model.safetensors")  # no such model
    (tmp_path / "bad.json").write_text('[{"instruction": "a", "output": "b"}, {"output": "b"}]')
    (tmp_path / "file").write_text("")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "long.jsonl").write_text(json.dumps({"instruction": "a", "output": "b " * 300}))

    def wrong(**changes: Any) -> str:
        base = {"model_name_or_path": tmp_path / "base"}
        return refused(run(argv(tmp_path / "out", **(base | changes)), tmp_path / "log"))

    assert "bad.json row 2: no instruction" in wrong(data_path=tmp_path / "bad.json")
    assert "has no rows" in wrong(data_path=tmp_path / "empty.jsonl")
    assert "does not exist" in wrong(data_path=tmp_path / "none.json")
    assert "file is no folder" in wrong(output_dir=tmp_path / "file")
    assert "cannot be made" in wrong(output_dir=tmp_path / "file" / "below")
    long = {"model_max_length": 5000, "data_path": tmp_path / "long.jsonl"}
    assert "the model's context is" in wrong(**long) == wrong(**long, dry_run=True)
    dropped = {"dataloader_drop_last": True, "per_device_train_batch_size": 25}
    assert "24 rows are less than a batch of 25" in wrong(**dropped)
    assert "--modules_to_save mlp has in it" in wrong(use_lora=True, modules_to_save="mlp")
    assert "does not exist" in wrong(model_name_or_path=tmp_path / "none")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_another_model_is_refused(
    argv: Callable[..., list[str]], place: Path, tmp_path: Path
) -> None:
    shutil.copytree(place / "base", tmp_path / "base")
    fields = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(fields | {"vocab_size": 4000}))
    again = argv(tmp_path / "out", model_name_or_path=tmp_path / "base")
    assert "ids up to 4095" in refused(run(again, tmp_path / "log"))


def test_wrong_use_is_said_by_the_first_process_only(
    argv: Callable[..., list[str]], tmp_path: Path
) -> None:
    words = argv(tmp_path / "out", bits=3)
    first, second = (run(words, tmp_path / "log", partial(be_process, rank)) for rank in ("0", "1"))
    assert "--bits is 3" in refused(first)
    assert (second.code, second.out) == (2, "") and "error" not in second.err


def test_shown_examples_have_their_answers_and_their_end_marked(
    argv: Callable[..., list[str]], tmp_path: Path
) -> None:
    done = run(argv(tmp_path / "out", max_steps=1, show_examples=2), tmp_path / "log")
    shown = [line for line in done.err.splitlines() if "⟦" in line]
    assert len(shown) == 2
    assert all(line.startswith("Assistant:⟦ ") for line in shown)
    assert all(line.endswith("<｜end▁of▁sentence｜>⟧") for line in shown)


def test_a_folder_with_another_model_in_it_is_refused(
    argv: Callable[..., list[str]], place: Path, tmp_path: Path
) -> None:
    before = sorted((place / "base").iterdir())
    done = run(argv(place / "base"), tmp_path / "log")
    assert done.code == 2 and "holds config.json" in done.error
    assert sorted((place / "base").iterdir()) == before


def note_attention(file: str) -> None:
    """Writes into `file`, at each batch, whether torch is deterministic and may use cuDNN's
    attention."""
    from deepseek_moe.training.trainer import FineTuner

    original = FineTuner.compute_loss

    def compute_loss(*args: Any, **kwargs: Any) -> Any:
        deterministic = torch.are_deterministic_algorithms_enabled()
        Path(file).write_text(f"{deterministic} {torch.backends.cuda.cudnn_sdp_enabled()}")
        return original(*args, **kwargs)

    FineTuner.compute_loss = compute_loss


def test_full_determinism_leaves_out_what_adds_in_no_fixed_order(
    argv: Callable[..., list[str]], tmp_path: Path
) -> None:
    """cuDNN's attention does so on a GPU even when torch is asked for deterministic ways."""
    command = argv(tmp_path / "out", max_steps=2, full_determinism=True)
    done = run(command, tmp_path / "log", partial(note_attention, str(tmp_path / "note")))
    assert done.code == 0, done.err
    assert (tmp_path / "note").read_text() == "True False"


def test_an_evaluation_loss_that_is_nan_stops_the_run(
    argv: Callable[..., list[str]], place: Path, tmp_path: Path
) -> None:
    """Only the rows to evaluate on have a token whose embedding is broken."""
    shutil.copytree(place / "base", tmp_path / "base")
    token = tokenizer_of(BUNDLED).encode("!", add_special_tokens=False)
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors["model.embed_tokens.weight"][token] = float("nan")
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "held.jsonl").write_text('{"instruction": "Well!!", "output": "A bird!!"}')
    held = {"eval_data_path": tmp_path / "held.jsonl", "eval_strategy": "steps", "eval_steps": 4}
    base = {"model_name_or_path": tmp_path / "base"}
    done = run(argv(tmp_path / "out", **base, **held), tmp_path / "log")
    assert done.code == 1
    assert "step 4: the evaluation loss is nan" in done.error
    assert str(tmp_path / "out" / "checkpoint-3") in done.error


def test_an_absurd_learning_rate_stops_at_the_first_number_that_is_none(
    argv: Callable[..., list[str]], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    done = run(argv(output, learning_rate=1e20, save_steps=1), tmp_path / "log")
    assert done.code == 1
    last = checkpoints(output)[-1]
    assert f"step {last + 1}: the " in done.error
    assert f"the last good checkpoint is {output / f'checkpoint-{last}'}" in done.error
    for step in checkpoints(output):
        found = weights(output / f"checkpoint-{step}")
        assert all(tensor.isfinite().all() for tensor in found.values())
    assert all(0 < loss < float("inf") for loss in logged(output, "loss"))
    assert "loss 0.0" not in done.err and "nan" not in done.err.replace(done.error, "")


def test_an_adapter_that_cannot_be_merged_is_kept(
    argv: Callable[..., list[str]], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    words = argv(output, merge_on_save=True, use_lora=True, learning_rate=0)
    done = run(words, tmp_path / "log")
    assert done.code == 2 and "changes nothing" in done.error
    assert (output / "adapter" / "adapter_model.safetensors").is_file()
    assert not (output / "config.json").exists()


@pytest.mark.slow
def test_main_takes_options_and_callbacks(argv: Callable[..., list[str]], tmp_path: Path) -> None:
    """A benchmark gives them."""
    script = tmp_path / "benchmark.py"
    script.write_text(f"""
import sys
sys.path.append({str(SCRIPT.parent)!r})
from finetune import main
from transformers import TrainerCallback

class PrintSteps(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        print("step", state.global_step)

main({argv(tmp_path / "out", max_steps=2)!r}, [PrintSteps()])
""")
    done = command([sys.executable, str(script)])
    assert done.code == 0, done.err
    assert done.out == f"step 1\nstep 2\n{tmp_path / 'out'}\n"
