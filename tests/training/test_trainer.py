"""The trainer: equal steps however they are cut up, evaluation by the token, a fixed order."""

import inspect
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from finetune_fixtures import options
from option_fixtures import parse_arguments
from text_fixtures import BUNDLED, tokenizer_of
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback

from deepseek_moe import DeepseekConfig, DeepseekForCausalLM
from deepseek_moe.errors import CollectiveRunError, RunError, UserError, rank_zero_reports
from deepseek_moe.training.callbacks import GuardedReporters, StopAtSignal
from deepseek_moe.training.epoch_sampler import EpochSampler, SetEpoch
from deepseek_moe.training.examples import Collator, load_examples, pack
from deepseek_moe.training.trainable import add_lora, weights_passed
from deepseek_moe.training.trainer import FineTuner

datasets.disable_progress_bars()
torch.set_num_threads(1)

MakeTuner = Callable[..., FineTuner]
TOKENIZER = tokenizer_of(BUNDLED)


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> datasets.Dataset:
    """24 examples of very different lengths."""
    folder = tmp_path_factory.mktemp("rows")
    rows = [
        {"instruction": f"Say {i}.", "output": " ".join(["bird", "wood"] * (1 + 3 * (i * i % 23)))}
        for i in range(24)
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    return load_examples(
        [str(folder / "rows.json")], TOKENIZER, 256, cache_dir=str(folder / "cache")
    )[0]


@pytest.fixture
def tuner(place: Path, tmp_path: Path) -> MakeTuner:
    """Makes a trainer with plain gradient descent, since Adam would magnify rounding."""

    def tuner(train: datasets.Dataset | None, evaluation: Any = None, **changes: Any) -> FineTuner:
        plain = {
            "output_dir": tmp_path / "out",
            "data_path": "-",
            "optim": "sgd",
            "learning_rate": 0.1,
            "max_grad_norm": 0,
            "lr_scheduler_type": "constant",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }
        _, data, args = parse_arguments(options(**(plain | changes)))
        model = DeepseekForCausalLM.from_pretrained(place / "base", dtype=torch.float32)
        model.config.use_cache = False
        return FineTuner(
            model=model,
            args=args,
            train_dataset=train,
            eval_dataset=evaluation,
            data_collator=Collator(TOKENIZER.pad_token_id, data.packing),
            processing_class=TOKENIZER,
        )

    return tuner


def curve(trainer: FineTuner, key: str) -> list[float]:
    return [line[key] for line in trainer.state.log_history if key in line]


# --- The loss


def test_gradient_accumulation_equals_one_big_batch(
    tuner: MakeTuner, examples: datasets.Dataset
) -> None:
    """Compares 3 steps of 8 examples, cut up in three ways."""
    lengths = examples["length"]
    assert max(lengths) > 6 * min(lengths)
    found = []
    for batch, accumulation in ((8, 1), (2, 4), (1, 8)):
        trainer = tuner(
            examples,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            num_train_epochs=1,
        )
        trainer.train()
        found.append(trainer)
    for other in found[1:]:
        for key in ("loss", "balance_loss", "grad_norm"):
            curves = curve(found[0], key), curve(other, key)
            assert len(curves[0]) == 3 and min(curves[0]) > 0
            assert curves[0] == pytest.approx(curves[1], rel=1e-5)
        for name, weight in found[0].model.state_dict().items():
            torch.testing.assert_close(
                other.model.state_dict()[name], weight, rtol=1e-5, atol=1e-5, msg=name
            )
    start = DeepseekForCausalLM.from_pretrained(found[0].model.name_or_path)
    moved = found[0].model.model.layers[1].mlp.gate.weight - start.model.layers[1].mlp.gate.weight
    assert moved.abs().max() > 1e-3  # So 1e-5 is close.


def test_packed_equals_padded(tuner: MakeTuner, examples: datasets.Dataset) -> None:
    """Compares one step of the same 24 examples."""
    rows = pack(examples, 256)
    assert len(rows) < 12
    common = {"num_train_epochs": 1, "gradient_accumulation_steps": 1}
    padded = tuner(examples, per_device_train_batch_size=24, **common)
    packed = tuner(rows, per_device_train_batch_size=len(rows), packing=True, **common)
    for trainer in (padded, packed):
        trainer.train()
    for key in ("loss", "balance_loss", "grad_norm"):
        assert len(curve(packed, key)) == 1
        assert curve(packed, key) == pytest.approx(curve(padded, key), rel=1e-5)
    for name, weight in padded.model.state_dict().items():
        torch.testing.assert_close(packed.model.state_dict()[name], weight, rtol=1e-4, atol=1e-6)


def test_loss_and_balance_loss_are_logged_apart_as_means_of_steps(
    tuner: MakeTuner, examples: datasets.Dataset
) -> None:
    def curves(**changes: Any) -> tuple[list[float], list[float]]:
        trainer = tuner(examples, per_device_train_batch_size=8, max_steps=4, **changes)
        batch = next(iter(trainer.get_train_dataloader()))
        del batch["sources"]
        with torch.no_grad():
            expected.append(trainer.model.train()(**batch))
        trainer.train()
        return curve(trainer, "loss"), curve(trainer, "balance_loss")

    expected: list[Any] = []
    losses, balances = curves()
    assert losses[0] == pytest.approx(expected[0].loss.item(), rel=1e-5)
    assert balances[0] == pytest.approx(expected[0].aux_loss.item(), rel=1e-5)
    assert balances[0] > 0.1
    for one, two in zip((losses, balances), curves(logging_steps=2), strict=True):
        assert [(one[0] + one[1]) / 2, (one[2] + one[3]) / 2] == pytest.approx(two, rel=1e-6)


@pytest.mark.parametrize("where", ["loss", "gradient norm"])
def test_a_number_that_is_not_finite_stops_the_run(
    where: str, tuner: MakeTuner, examples: datasets.Dataset
) -> None:
    trainer = tuner(examples, per_device_train_batch_size=4, max_steps=3)
    weight = trainer.model.lm_head.weight
    with torch.no_grad():
        if where == "loss":
            weight[5, 0] = math.nan
        else:
            weight.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(RunError, match=rf"step 1: the {where} is (nan|inf), in rows .*json row"):
        trainer.train()
    assert curve(trainer, "loss") == []


def test_rows_are_named_of_the_process_that_has_the_broken_loss(
    tuner: MakeTuner, examples: datasets.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = tuner(examples, per_device_train_batch_size=4, max_steps=3)
    trainer.model.lm_head.weight.register_hook(lambda grad: grad * math.nan)
    others = [(math.nan, ["other.json row 7"]), (None, ["other.json row 8"])]
    monkeypatch.setattr("deepseek_moe.training.trainer.gather_object", lambda own: own + others)
    with pytest.raises(CollectiveRunError, match=r"the loss is nan, in rows other.json row 7;"):
        trainer.train()


# --- Evaluation


def test_evaluation_counts_every_token_once(tuner: MakeTuner, examples: datasets.Dataset) -> None:
    held = examples.select(range(7))
    trainer = tuner(examples, held, per_device_eval_batch_size=3)
    nats, tokens = 0.0, 0
    for row in held:
        with torch.no_grad():
            logits = trainer.model.eval()(torch.tensor([row["input_ids"]])).logits[0]
        for at in range(1, row["length"]):
            if row["trained"][at]:
                nats += F.cross_entropy(logits[at - 1], torch.tensor(row["input_ids"][at])).item()
                tokens += 1
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert found["eval_perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    again = trainer.evaluate()
    assert again["eval_loss"] == found["eval_loss"]


# --- The order of examples

LENGTHS = [3 + (i * 37) % 91 for i in range(1030)]


def order(seed: int = 0, epoch: int = 0, step: int = 8) -> list[int]:
    sampler = EpochSampler(LENGTHS, seed, step)
    sampler.epoch = epoch
    assert len(sampler) == len(LENGTHS)
    return list(sampler)


@pytest.mark.parametrize("step", [1, 8, 2000])
def test_an_epoch_has_every_example_once(step: int) -> None:
    assert sorted(order(step=step)) == list(range(len(LENGTHS)))


def test_seed_and_epoch_decide_the_order() -> None:
    assert order() == order()
    different = [order(), order(seed=1), order(epoch=1), order(step=1)]
    assert len({tuple(one) for one in different}) == 4


def test_a_step_has_similar_lengths_and_the_longest_comes_first() -> None:
    found = order()
    steps = [[LENGTHS[i] for i in found[at : at + 8]] for at in range(0, len(found), 8)]
    assert [len(step) for step in steps[:-1]] == [8] * 128 and len(steps[-1]) == 6
    assert max(steps[0]) == max(LENGTHS)
    spread = sum(max(step) - min(step) for step in steps[:-1]) / 128
    assert spread < 5  # of 91; by chance it would be 70
    firsts = [max(step) for step in steps[1:-1]]
    assert firsts != sorted(firsts, reverse=True)  # shuffled


def test_the_sampler_is_told_the_epoch_of_a_resumed_run() -> None:
    sampler = EpochSampler(LENGTHS, seed=0, step=8)
    for epoch, wanted in ((0.0, 0), (1.0, 1), (0.99999999, 1), (1.5, 1)):
        SetEpoch(sampler).on_epoch_begin(None, SimpleNamespace(epoch=epoch), None)
        assert sampler.epoch == wanted


# --- Reports


class FullDisk(TrainerCallback):
    """Stands for TensorBoard on a full disk."""

    logging_dir = "out/runs"

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")


def test_a_reporter_that_fails_is_dropped_with_one_warning(
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen: list[dict[str, float]] = []
    other = TrainerCallback()
    other.on_log = lambda *args, logs, **kwargs: seen.append(logs)
    guarded = GuardedReporters({"tensorboard": FullDisk(), "other": other})
    for event in ("on_train_begin", "on_log", "on_log", "on_train_end"):
        getattr(guarded, event)(None, None, None, logs={"loss": 1.0})
    assert len(seen) == 2
    assert capsys.readouterr().err == (
        "warning: tensorboard cannot report any more to out/runs "
        "([Errno 28] No space left on device); the run goes on without it\n"
    )


def test_an_error_in_the_thread_of_tensorboard_is_a_warning_too(
    tuner: MakeTuner,
    examples: datasets.Dataset,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    def write(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RecordWriter, "write", write)
    trainer = tuner(examples, report_to="tensorboard", max_steps=3)
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)  # not pytest's
    trainer.train()
    assert threading.excepthook is threading.__excepthook__  # as before
    said = capfd.readouterr().err
    assert said.count("warning: tensorboard cannot report any more") == 1
    assert "Traceback" not in said and "Exception" not in said
    assert len(curve(trainer, "loss")) == 3


def test_a_run_goes_on_when_stderr_is_on_a_full_disk(
    tuner: MakeTuner, examples: datasets.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Progress bars and lines go to stderr, which is often a file."""
    trainer = tuner(examples, max_steps=3, disable_tqdm=False)
    with open("/dev/full", "w", buffering=1) as full:
        monkeypatch.setattr(sys, "stderr", full)
        trainer.train()
        monkeypatch.undo()
        with pytest.raises(OSError):
            full.flush()
        with suppress(OSError):
            full.close()
    assert len(curve(trainer, "loss")) == 3


# --- Small parts


def test_only_the_first_process_reports_wrong_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)

    def leave(error: UserError, rank: str) -> BaseException:
        monkeypatch.setenv("RANK", rank)
        with pytest.raises((UserError, SystemExit)) as caught, rank_zero_reports():
            raise error
        return caught.value

    assert isinstance(leave(UserError("x"), "0"), UserError)
    other = leave(UserError("x"), "1")
    assert isinstance(other, SystemExit) and other.code == 2
    assert isinstance(leave(RunError("x"), "1"), RunError)  # Its disk may be its own.
    assert leave(CollectiveRunError("x"), "1").code == 1


def test_a_signal_in_the_last_step_does_not_lose_the_result() -> None:
    args = SimpleNamespace(device="cpu", world_size=1)
    control = SimpleNamespace(should_save=False, should_training_stop=False)
    stopper, state = StopAtSignal(), SimpleNamespace(global_step=5, max_steps=5)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        stopper.on_train_begin(args, state, control)
        signal.raise_signal(signal.SIGTERM)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    stopper.on_step_end(args, state, control)
    assert stopper.stopped == 0 and not control.should_training_stop
    state.global_step = 4
    stopper.on_step_end(args, state, control)
    assert stopper.stopped == signal.SIGTERM
    assert control.should_save and control.should_training_stop


OVERRIDDEN = {  # private methods of Trainer: their parameters, and how Trainer calls them
    "_get_grad_norm": (["model", "grad_norm"], "model, grad_norm=grad_norm"),
    "_save_checkpoint": (["model", "trial"], "model, trial"),
    "_load_from_checkpoint": (["resume_from_checkpoint", "model"], "resume_from_checkpoint"),
}


def test_the_overridden_private_methods_of_trainer_are_as_in_transformers_5_17_to_5_23() -> None:
    """If this fails, compare the last section of FineTuner with the new version of Trainer."""
    private = {name for name in vars(FineTuner) if name.startswith("_") and name[:2] != "__"}
    assert {name for name in private if hasattr(Trainer, name)} == set(OVERRIDDEN)
    source = inspect.getsource(Trainer)
    for name, (parameters, call) in OVERRIDDEN.items():
        found = list(inspect.signature(getattr(Trainer, name)).parameters)
        assert (name, found) == (name, ["self", *parameters])
        assert f"self.{name}({call})" in source


def test_only_the_experts_that_a_token_picks_are_counted(tuner: MakeTuner) -> None:
    def make_model(**changes: Any) -> DeepseekForCausalLM:
        with torch.device("meta"):
            return DeepseekForCausalLM(DeepseekConfig(**changes))

    model = make_model()
    layers = 27 * (4 * 2048**2 + 64 * 2048 + (2 + 6) * 3 * 2048 * 1408 + 2 * 2048)
    layers += 4 * 2048**2 + 3 * 2048 * 10944 + 2 * 2048
    bare = layers + 2048 + 102_400 * 2048  # 2.6 of 16.4 billion
    assert weights_passed(model) == bare
    adapted = add_lora(model, ["gate_proj", "up_proj"], 8, 8.0, 0.0)
    extra = 8 * (27 * 6 * (2048 + 2816) + 27 * 2 * (2048 + 2816) + 2 * (2048 + 10944))
    assert weights_passed(adapted) == bare + extra
    wrapped = add_lora(make_model(), ["q_proj"], 8, 8.0, 0.0, ["lm_head"])
    assert weights_passed(wrapped) == bare + 28 * 8 * 2 * 2048  # the head once
    assert weights_passed(make_model(tie_word_embeddings=True)) == bare
    one = tuner(None)
    operations = one.floating_point_ops({"input_ids": torch.zeros(3, 5)})
    assert operations == 6 * 15 * weights_passed(one.model) < 6 * 15 * one.model.num_parameters()
