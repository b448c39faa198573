"""The trainer: equal steps however they are cut up, honest evaluation, a fixed order."""

import json
import math
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from finetune_fixtures import write_base
from option_fixtures import parse_arguments
from text_fixtures import BUNDLED, tokenizer_of
from torch.nn import functional as F

from deepseek_moe import DeepseekConfig, DeepseekForCausalLM
from deepseek_moe.errors import CollectiveRunError, RunError, UserError, rank_zero_reports
from deepseek_moe.model.tokenization_deepseek import EOS
from deepseek_moe.training.callbacks import StopAtSignal
from deepseek_moe.training.epoch_sampler import EpochSampler
from deepseek_moe.training.examples import IGNORED, Collator, load_examples, pack
from deepseek_moe.training.run import RUN_FILE, WRITTEN, Run
from deepseek_moe.training.trainable import add_lora, weights_passed
from deepseek_moe.training.trainer import FineTuner

datasets.disable_progress_bars()
torch.set_num_threads(1)

TOKENIZER = tokenizer_of(BUNDLED)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("training") / "base")


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> datasets.Dataset:
    """24 examples, of very different lengths."""
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
def tuner(base: Path, tmp_path: Path) -> Callable[..., FineTuner]:
    """A trainer of the base with plain gradient descent (Adam would magnify rounding)."""

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
        words = [w for k, v in (plain | changes).items() for w in (f"--{k}", str(v))]
        _, data, args = parse_arguments(words)
        model = DeepseekForCausalLM.from_pretrained(base, dtype=torch.float32)
        model.config.use_cache = False
        return FineTuner(
            model=model,
            args=args,
            train_dataset=train,
            eval_dataset=evaluation,
            data_collator=Collator(TOKENIZER.pad_token_id, data.packing),
            processing_class=TOKENIZER,
        )

    tuner.output = tmp_path / "out"
    return tuner


def curve(trainer: FineTuner, key: str) -> list[float]:
    return [line[key] for line in trainer.state.log_history if key in line]


# --- The loss


def test_gradient_accumulation_equals_one_big_batch(
    tuner: Callable[..., FineTuner], examples: datasets.Dataset
) -> None:
    """Losses, balance losses, gradients and weights of 3 steps of 8, cut up in three ways."""
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
    assert moved.abs().max() > 1e-3  # so 1e-5 is close


def test_packed_equals_padded(tuner: Callable[..., FineTuner], examples: datasets.Dataset) -> None:
    """One step of the same 24 examples: loss, balance loss, gradients."""
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


def test_the_balance_loss_is_not_part_of_the_loss_and_both_are_means_of_steps(
    tuner: Callable[..., FineTuner], examples: datasets.Dataset
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


def test_the_end_of_an_answer_reaches_the_model_as_a_label(
    tuner: Callable[..., FineTuner], examples: datasets.Dataset
) -> None:
    trainer = tuner(examples, per_device_train_batch_size=8)
    eos = TOKENIZER.convert_tokens_to_ids(EOS)
    assert TOKENIZER.pad_token_id == eos  # so a mask made of ids would lose it
    batch = next(iter(trainer.get_train_dataloader()))
    for labels, sequences in zip(batch["labels"], batch["sequence_ids"], strict=True):
        length = int((sequences >= 0).sum())
        assert labels[length - 1] == eos
        assert (labels[length:] == IGNORED).all()
        assert labels[0] == IGNORED and (labels != IGNORED).sum() < length


@pytest.mark.parametrize("where", ["loss", "gradient norm"])
def test_what_is_not_a_number_stops_the_run(
    where: str, tuner: Callable[..., FineTuner], examples: datasets.Dataset
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


def test_the_process_with_the_broken_loss_names_its_rows_for_all(
    tuner: Callable[..., FineTuner], examples: datasets.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = tuner(examples, per_device_train_batch_size=4, max_steps=3)
    trainer.model.lm_head.weight.register_hook(lambda grad: grad * math.nan)
    others = [(math.nan, ["other.json row 7"]), (None, ["other.json row 8"])]
    monkeypatch.setattr("deepseek_moe.training.trainer.gather_object", lambda own: own + others)
    with pytest.raises(CollectiveRunError, match=r"the loss is nan, in rows other.json row 7;"):
        trainer.train()


# --- Evaluation


def test_evaluation_counts_every_token_once(
    tuner: Callable[..., FineTuner], examples: datasets.Dataset
) -> None:
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


def test_steps_are_of_like_lengths_the_longest_first_and_only_the_last_is_short() -> None:
    found = order()
    steps = [[LENGTHS[i] for i in found[at : at + 8]] for at in range(0, len(found), 8)]
    assert [len(step) for step in steps[:-1]] == [8] * 128 and len(steps[-1]) == 6
    assert max(steps[0]) == max(LENGTHS)
    spread = sum(max(step) - min(step) for step in steps[:-1]) / 128
    assert spread < 5  # of 91; by chance it would be 70
    firsts = [max(step) for step in steps[1:-1]]
    assert firsts != sorted(firsts, reverse=True)  # shuffled


def test_the_sampler_is_told_the_epoch_of_a_resumed_run(
    tuner: Callable[..., FineTuner], examples: datasets.Dataset
) -> None:
    sampler = tuner(examples)._get_train_sampler()
    for epoch, wanted in ((0.0, 0), (1.0, 1), (0.99999999, 1), (1.5, 1)):
        sampler.callback.on_epoch_begin(None, type("S", (), {"epoch": epoch}), None)
        assert sampler.epoch == wanted


# --- Reports


class FullDisk:
    """In the place of TensorBoard's writer; its file system is full from the event `full` on."""

    full = ""
    called: list[str] = []

    def __init__(self, **_: Any) -> None:
        self("begin")

    def __call__(self, event: str) -> None:
        self.called.append(event)
        if event == self.full:
            raise OSError(28, "No space left on device")

    def add_text(self, *_: Any) -> None: ...

    def add_scalar(self, *_: Any) -> None:
        self("log")

    def flush(self) -> None: ...

    def close(self) -> None:
        self("end")


@pytest.mark.parametrize("event", ["begin", "log", "end"])
def test_a_report_that_fails_is_warned_of_once_and_the_run_goes_on(
    event: str,
    tuner: Callable[..., FineTuner],
    examples: datasets.Dataset,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", FullDisk)
    monkeypatch.setattr(FullDisk, "full", event)
    monkeypatch.setattr(FullDisk, "called", [])
    trainer = tuner(examples, report_to="tensorboard", max_steps=3, save_strategy="steps")
    capsys.readouterr()
    trainer.train()
    said = [line for line in capsys.readouterr().err.splitlines() if "warning: " in line]
    assert len(said) == 1
    for words in ("tensorboard", str(tuner.output / "runs"), "No space left", "goes on without it"):
        assert words in said[0]
    assert FullDisk.called.count(event) == 1
    assert len(curve(trainer, "loss")) == 3
    assert (tuner.output / "checkpoint-3" / "trainer_state.json").is_file()


def test_an_error_in_tensorboards_thread_is_a_warning_too(
    tuner: Callable[..., FineTuner],
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


def test_a_full_disk_under_stderr_does_not_end_the_run(
    tuner: Callable[..., FineTuner], examples: datasets.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The progress bar and its lines go there, often into a file."""
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


def test_wrong_use_is_said_by_the_first_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepseek_moe.training.trainer.time.sleep", lambda seconds: None)

    def leave(error: UserError, rank: str) -> BaseException:
        monkeypatch.setenv("RANK", rank)
        with pytest.raises((UserError, SystemExit)) as caught, rank_zero_reports():
            raise error
        return caught.value

    assert isinstance(leave(UserError("x"), "0"), UserError)
    other = leave(UserError("x"), "1")
    assert isinstance(other, SystemExit) and other.code == 2
    assert isinstance(leave(RunError("x"), "1"), RunError)  # perhaps a disk of its own
    assert leave(CollectiveRunError("x"), "1").code == 1


def test_a_signal_in_the_last_step_does_not_lose_the_result() -> None:
    class Args:
        device, world_size = "cpu", 1

    class State:
        global_step, max_steps = 5, 5

    class Control:
        should_save = should_training_stop = False

    stopper, control, state = StopAtSignal(), Control(), State()
    stopper._note(15, None)
    stopper.on_step_end(Args, state, control)
    assert stopper.stopped == 0 and not control.should_training_stop
    state.global_step = 4
    stopper.on_step_end(Args, state, control)
    assert stopper.stopped == 15 and control.should_save and control.should_training_stop


def test_a_run_knows_whether_it_is_new_begun_or_finished(tmp_path: Path) -> None:
    settings = {"seed": 1, "data": "x"}
    run = Run(str(tmp_path / "a" / "b"), settings)
    assert run.checkpoint is None and not run.finished
    run.start()
    (run.folder / "incomplete" / "checkpoint-9").mkdir(parents=True)
    (run.folder / "checkpoint-5").mkdir()
    (run.folder / "checkpoint-10").mkdir()
    again = Run(str(run.folder), dict(reversed(settings.items())))
    assert again.checkpoint == str(run.folder / "checkpoint-10")
    again.start()
    assert not (run.folder / "incomplete").exists()
    with pytest.raises(UserError, match=r"other settings \(another data\)"):
        Run(str(run.folder), settings | {"data": "y"})
    with pytest.raises(UserError, match="extra: None there, 1 now"):
        Run(str(run.folder), settings | {"extra": 1})
    (run.folder / RUN_FILE).unlink()
    with pytest.raises(UserError, match=r"no run\.json"):
        Run(str(run.folder), settings)


@pytest.mark.parametrize("name", [*WRITTEN, "README.md", "runs", "notes.txt", ".lock"])
def test_files_of_the_user_are_in_the_way_of_a_new_run_if_it_would_write_them(
    name: str, tmp_path: Path
) -> None:
    mine = tmp_path / name.replace("*", "-1")
    mine.write_text("mine")
    if name in WRITTEN:
        with pytest.raises(UserError, match=f"holds {mine.name}.* no run.json"):
            Run(str(tmp_path), {})
    else:
        Run(str(tmp_path), {}).start()
    assert mine.read_text() == "mine"


def test_a_folder_where_another_process_runs_is_left_to_it(tmp_path: Path) -> None:
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); "
    hold += "print(flush=True); input()"
    lock = tmp_path / ".lock"
    with subprocess.Popen(
        [sys.executable, "-c", hold, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        other.stdout.readline()
        with pytest.raises(UserError, match="another process is running"):
            Run(str(tmp_path), {}).start()
        other.communicate(b"\n")
    Run(str(tmp_path), {}).start()


def test_a_broken_note_of_the_run_is_one_line(tmp_path: Path) -> None:
    for content in ("{", "[]", '{"finished": true}'):
        (tmp_path / RUN_FILE).write_text(content)
        with pytest.raises(UserError, match=RUN_FILE):
            Run(str(tmp_path), {})


def test_a_run_of_an_older_version_is_said_to_be_one(tmp_path: Path) -> None:
    """Its base model is known by a fingerprint of another kind."""
    Run(str(tmp_path), {"model": "0123456789abcdef"}).start()
    (tmp_path / "checkpoint-5").mkdir()
    with pytest.raises(UserError, match=r"of an older version of this code.*; finish it with"):
        Run(str(tmp_path), {"model": "tensors:0123"})
    (tmp_path / RUN_FILE).unlink()
    (tmp_path / "checkpoint-5").rmdir()
    Run(str(tmp_path), {"model": "tensors:0123"}).start()
    (tmp_path / "checkpoint-5").mkdir()
    with pytest.raises(UserError, match=r"other settings \(another model\)"):
        Run(str(tmp_path), {"model": "tensors:4567"})


def test_of_the_experts_only_those_picked_are_counted(tuner: Callable[..., FineTuner]) -> None:
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
