"""The trainer: equal steps however they are cut up, evaluation by the token, a fixed order."""

import inspect
import math
import signal
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.nn import functional as F
from transformers import Trainer

from deepseek_moe import DeepseekConfig, DeepseekForCausalLM
from deepseek_moe.errors import RunError, UserError
from deepseek_moe.processes import CollectiveRunError, rank_zero_reports
from deepseek_moe.training.callbacks import StopTogether
from deepseek_moe.training.compute.bitsandbytes_adamw import UnwaitingAdamW
from deepseek_moe.training.epoch_sampler import EpochSampler, SetEpoch
from deepseek_moe.training.packed_rows import pack
from deepseek_moe.training.parameter_counts import weights_passed
from deepseek_moe.training.trainable import add_lora
from deepseek_moe.training.trainer import FineTuner

datasets.disable_progress_bars()
torch.set_num_threads(1)


def curve(trainer: FineTuner, key: str) -> list[float]:
    return [line[key] for line in trainer.state.log_history if key in line]


def assert_equal_training(one: FineTuner, other: FineTuner, steps: int) -> None:
    for trainer in (one, other):
        trainer.train()
    for key in ("loss", "balance_loss", "grad_norm"):
        assert len(curve(one, key)) == steps and min(curve(one, key)) > 0
        assert curve(one, key) == pytest.approx(curve(other, key), rel=1e-5)
    for name, weight in one.model.state_dict().items():
        torch.testing.assert_close(
            other.model.state_dict()[name], weight, rtol=1e-5, atol=1e-5, msg=name
        )
    start = DeepseekForCausalLM.from_pretrained(one.model.name_or_path)
    moved = one.model.model.layers[1].mlp.gate.weight - start.model.layers[1].mlp.gate.weight
    assert moved.abs().max() > 1e-3 / 3  # in each step, so 1e-5 is close


@pytest.mark.parametrize(("batch", "accumulation"), [(2, 4), (1, 8)])
def test_gradient_accumulation_equals_one_big_batch(batch, accumulation, tuner, examples):
    assert max(examples["length"]) > 6 * min(examples["length"])
    cut = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    assert_equal_training(tuner(per_device_train_batch_size=8), tuner(**cut), steps=3)


def test_packed_equals_padded(tuner, examples):
    rows = pack(examples, 256)
    assert len(rows) < 12
    packed = tuner(rows, per_device_train_batch_size=len(rows), packing=True)
    assert_equal_training(tuner(per_device_train_batch_size=24), packed, steps=1)
    flat = tuner(per_device_train_batch_size=24)
    flat.data_collator = partial(flat.data_collator, flat=7)
    assert_equal_training(tuner(per_device_train_batch_size=24), flat, steps=1)


def test_loss_and_balance_loss_are_logged_apart_as_means_of_steps(tuner):
    each, means = (tuner(max_steps=4, logging_steps=every) for every in (1, 2))
    batch = next(iter(each.get_train_dataloader()))
    del batch["sources"], batch["num_tokens"]
    with torch.no_grad():
        expected = each.model.train()(**batch)
    each.train()
    means.train()
    assert curve(each, "loss")[0] == pytest.approx(expected.loss.item(), rel=1e-5)
    assert curve(each, "balance_loss")[0] == pytest.approx(expected.aux_loss.item(), rel=1e-5)
    for key in ("loss", "balance_loss"):
        a, b, c, d = curve(each, key)
        assert min(a, b, c, d) > 0.1
        assert curve(means, key) == pytest.approx([(a + b) / 2, (c + d) / 2], rel=1e-6)


def test_adamw_of_8_bits_does_not_wait_and_keeps_32_bits_for_embeddings(tuner):
    trainer = tuner(optim="adamw_bnb_8bit", max_steps=1, learning_rate=1e-4)
    trainer.train()
    assert type(trainer.own_optimizer) is UnwaitingAdamW
    model, states = trainer.model, trainer.own_optimizer.state
    assert states[model.model.embed_tokens.weight]["state1"].dtype == torch.float32
    assert states[model.lm_head.weight]["state1"].dtype == torch.uint8  # of the same size


@pytest.mark.parametrize("where", ["loss", "gradient norm", "evaluation loss"])
def test_a_number_that_is_not_finite_stops_the_run(where, tuner, examples):
    trainer = tuner(held=examples)
    weight = trainer.model.lm_head.weight
    with torch.no_grad():
        if where == "gradient norm":
            weight.register_hook(lambda grad: grad * math.inf)
        else:
            weight[5, 0] = math.nan
    found = rf"step 1: the {where} is (nan|inf), in rows .*json row .*; the last .* none yet"
    if where == "evaluation loss":
        found = "step 0: the evaluation loss is nan; the last"
    with pytest.raises(RunError, match=found):
        trainer.evaluate() if where == "evaluation loss" else trainer.train()
    assert curve(trainer, "loss") == []
    assert where != "gradient norm" or weight.isfinite().all()  # not stepped


def test_rows_are_named_of_the_process_that_has_the_broken_loss(tuner, monkeypatch):
    trainer = tuner()
    trainer.model.lm_head.weight.register_hook(lambda grad: grad * math.nan)
    others = [(math.nan, ["other.json row 7"]), (None, ["other.json row 8"])]
    monkeypatch.setattr("deepseek_moe.training.trainer.gather_object", lambda own: own + others)
    with pytest.raises(CollectiveRunError, match=r"the loss is nan, in rows other.json row 7;"):
        trainer.train()


def test_evaluation_counts_every_token_once(tuner, examples):
    held = examples.select(range(7))
    trainer = tuner(held=held, per_device_eval_batch_size=3)
    nats, tokens = 0.0, 0
    for row in held:
        with torch.no_grad():
            logits = trainer.model.eval()(torch.tensor([row["input_ids"]])).logits[0]
        for at in range(1, row["length"]):
            if row["trained"][at]:
                nats += F.cross_entropy(logits[at - 1], torch.tensor(row["input_ids"][at])).item()
                tokens += 1
    for _ in range(2):
        found = trainer.evaluate()
        assert found["eval_loss"] == pytest.approx(nats / tokens, rel=1e-5)
        assert found["eval_perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)


LENGTHS = [3 + (i * 37) % 91 for i in range(1030)]


def order(seed: int = 0, epoch: float = 0.0, step: int = 8) -> list[int]:
    sampler = EpochSampler(LENGTHS, seed, step)
    SetEpoch(sampler).on_epoch_begin(None, SimpleNamespace(epoch=epoch), None)
    assert len(sampler) == len(LENGTHS)
    return list(sampler)


def test_seed_and_epoch_decide_the_order():
    different = [order(), order(seed=1), order(epoch=1.0), order(step=1), order(step=2000)]
    assert len({tuple(one) for one in different}) == 5
    assert all(sorted(one) == list(range(len(LENGTHS))) for one in different)
    assert order() == order()
    # A resumed run may count its epochs with rounding, or begin inside of one.
    assert order(epoch=1.0) == order(epoch=0.99999999) == order(epoch=1.5)


def test_a_step_has_similar_lengths_and_the_longest_comes_first():
    found = order()
    steps = [[LENGTHS[i] for i in found[at : at + 8]] for at in range(0, len(found), 8)]
    assert [len(step) for step in steps[:-1]] == [8] * 128 and len(steps[-1]) == 6
    assert max(steps[0]) == max(LENGTHS)
    spread = sum(max(step) - min(step) for step in steps[:-1]) / 128
    assert spread < 5  # of 91; by chance it would be 70
    firsts = [max(step) for step in steps[1:-1]]
    assert firsts != sorted(firsts, reverse=True)  # shuffled


@pytest.mark.parametrize("fault", ["no folder", "an error in its thread"])
def test_tensorboard_fails_with_one_warning(fault, tuner, tmp_path, monkeypatch, capfd):
    def write(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    if fault == "no folder":
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "runs").write_text("a file")
    else:
        monkeypatch.setattr(RecordWriter, "write", write)
    trainer = tuner(report_to="tensorboard", max_steps=3)
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)  # not pytest's
    trainer.train()
    assert threading.excepthook is threading.__excepthook__  # as before
    printed, said = capfd.readouterr()
    assert printed == ""
    warning = f"warning: tensorboard cannot report any more to {tmp_path / 'out' / 'runs'}"
    assert said.count("warning: ") == said.count(warning) == 1
    assert "the run goes on without it" in said and "step 3/3  loss" in said
    assert "Traceback" not in said and "Exception" not in said


def test_a_run_goes_on_when_stderr_is_on_a_full_disk(tuner, monkeypatch):
    """Progress bars and lines go to stderr, which is often a file."""
    trainer = tuner(max_steps=3, disable_tqdm=False)
    with open("/dev/full", "w", buffering=1) as full:
        monkeypatch.setattr(sys, "stderr", full)
        trainer.train()
        monkeypatch.undo()
        with pytest.raises(OSError):
            full.flush()
        with suppress(OSError):
            full.close()
    assert len(curve(trainer, "loss")) == 3


def test_an_optimizer_of_a_missing_package_is_one_line(tuner):
    with pytest.raises(UserError, match="--optim lomo cannot be made: "):
        tuner(optim="lomo").train()


def test_only_the_first_process_reports_what_all_find(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    for error, rank, raised in (
        (UserError("x"), "0", UserError),
        (UserError("x"), "1", SystemExit),
        (CollectiveRunError("x"), "1", SystemExit),
        (RunError("x"), "1", RunError),  # Its disk may be its own.
    ):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(raised) as caught, rank_zero_reports():
            raise error
        assert getattr(caught.value, "code", error.exit_code) == error.exit_code


def test_a_signal_in_the_last_step_does_not_lose_the_result():
    args = SimpleNamespace(device="cpu", world_size=1, single_gpu_full=False)
    stopper, model = StopTogether(), torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    stopper.signal = signal.SIGTERM
    for step, stops in ((5, False), (4, True)):
        control = SimpleNamespace(should_save=False, should_training_stop=False)
        state = SimpleNamespace(global_step=step, max_steps=5)
        stopper.on_step_end(args, state, control, optimizer=optimizer)
        assert control.should_save == control.should_training_stop == stops
        assert bool(stopper.stopped) == stops


OVERRIDDEN = {  # private methods of Trainer: their parameters, and how Trainer calls them
    "_get_grad_norm": (["model", "grad_norm"], "model, grad_norm=grad_norm"),
    "_save_checkpoint": (["model", "trial"], "model, trial"),
    "_save_optimizer_and_scheduler": (["output_dir"], "output_dir"),
    "_load_from_checkpoint": (["resume_from_checkpoint", "model"], "resume_from_checkpoint"),
}


def test_the_overridden_private_methods_of_trainer_are_as_in_transformers_5_17_to_5_24():
    """If this fails, compare the last section of FineTuner with the new version of Trainer."""
    private = {name for name in vars(FineTuner) if name.startswith("_") and name[:2] != "__"}
    assert {name for name in private if hasattr(Trainer, name)} == set(OVERRIDDEN)
    source = inspect.getsource(Trainer)
    for name, (parameters, call) in OVERRIDDEN.items():
        found = list(inspect.signature(getattr(Trainer, name)).parameters)
        assert (name, found) == (name, ["self", *parameters])
        assert f"self.{name}({call})" in source


def test_only_the_experts_that_a_token_picks_are_counted(tuner):
    def make_model(**changes: Any) -> DeepseekForCausalLM:
        with torch.device("meta"):
            return DeepseekForCausalLM(DeepseekConfig(**changes))

    layers = 27 * (4 * 2048**2 + 64 * 2048 + (2 + 6) * 3 * 2048 * 1408 + 2 * 2048)
    layers += 4 * 2048**2 + 3 * 2048 * 10944 + 2 * 2048
    bare = layers + 2048 + 102_400 * 2048  # 2.6 of 16.4 billion
    assert weights_passed(make_model()) == bare
    assert weights_passed(make_model(tie_word_embeddings=True)) == bare
    adapted = add_lora(make_model(), ["gate_proj", "up_proj"], 8, 8.0, 0.0, ["lm_head"])
    extra = 8 * (27 * 6 * (2048 + 2816) + 27 * 2 * (2048 + 2816) + 2 * (2048 + 10944))
    assert weights_passed(adapted) == bare + extra  # the head once
    one = tuner()
    operations = one.floating_point_ops({"input_ids": torch.zeros(3, 5)})
    assert operations == 6 * 15 * weights_passed(one.model) < 6 * 15 * one.model.num_parameters()
