"""A number that is not finite stops a run in the step in which it appears. Nothing of it is saved.

Infinite and missing numbers in the rows are refused before a run: tests/training/test_rows.py.
"""

import itertools
import math
import os
import re
from functools import partial
from typing import Any

import pytest
import torch
from accident_fixtures import TUNER, before_call
from finetune_fixtures import SCRIPT, checkpoints, run_ranks

from deepseek_moe.processes import CollectiveRunError
from deepseek_moe.training.trainer import FineTuner

NORM = "the gradient norm is (nan|inf|-1)"
LOSS = "the loss is (nan|inf)"
STATE = "NaN or inf in {} of (lm_head.weight|the divided weights)"
SAID = {
    "weight": LOSS,
    "weight without use": r"NaN or inf in model\.embed_tokens\.weight;",
    "activation": LOSS,
    "gradient": NORM,
    "exp_avg": STATE.format("exp_avg"),
    "exp_avg_sq": STATE.format("exp_avg_sq"),
}
UNUSED = 4001  # an id that is in no row


def inject(where: str, value: float, trainer: FineTuner, *_: Any) -> None:
    weight = trainer.model.lm_head.weight
    if where == "weight":
        getattr(weight, "ds_tensor", weight).detach().flatten()[0] = value
    elif where == "weight without use":
        trainer.model.model.embed_tokens.weight.data[UNUSED, 3] = value
    elif where == "activation":
        trainer.model.model.norm.register_forward_hook(lambda *found: found[2] * value)
    elif where == "gradient":
        weight.register_hook(lambda grad: grad * value)
    else:
        states = trainer.optimizer.state
        states.get(weight, next(iter(states.values())))[where].flatten()[0] = value


@pytest.mark.parametrize(
    ("where", "value"), list(zip(SAID, itertools.cycle([math.nan, math.inf]), strict=False))
)
def test_one_process(where, value, tuner, tmp_path, monkeypatch):
    """tests/gpu/test_training.py looks for both numbers in all places."""
    trainer = tuner(optim="adamw_torch", save_strategy="steps", save_steps=1, max_steps=3)
    original = trainer.compute_loss

    def compute_loss(*args: Any, **kwargs: Any) -> torch.Tensor:
        if trainer.state.global_step == 1:
            inject(where, value, trainer)
        return original(*args, **kwargs)

    monkeypatch.setattr(trainer, "compute_loss", compute_loss)
    with pytest.raises(CollectiveRunError, match=f"^step 2: {SAID[where]}.*/checkpoint-1:"):
        trainer.train()
    assert checkpoints(tmp_path / "out") == [1]


def test_a_division_by_zero_in_the_optimizer(tuner):
    """Rows of the embedding that no token has used yet have averages of 0."""
    trainer = tuner(optim="adamw_torch", adam_epsilon=0, save_strategy="steps", save_steps=1)
    with pytest.raises(CollectiveRunError, match=r"^step 1: NaN or inf in model\.embed_tok"):
        trainer.train()


def inject_in_second_process(where: str, value: float) -> None:
    torch.set_num_threads(1)
    if os.environ["RANK"] == "1":
        before_call(TUNER, "compute_loss", 2, partial(inject, where, value))


@pytest.mark.slow
@pytest.mark.usefixtures("deepspeed_extensions", "free_buffers")
@pytest.mark.parametrize(
    ("zero", "where", "value"),
    [
        ("zero2_no_offload", "weight", math.nan),
        ("zero2_no_offload", "exp_avg_sq", math.inf),
        ("zero3", "activation", math.inf),
        ("zero3", "exp_avg", math.nan),
    ],
)
def test_two_processes(zero, where, value, argv, tmp_path):
    """Both stop. Only one of them has met the number."""
    output, config = tmp_path / "out", SCRIPT.parent / "configs" / f"ds_config_{zero}.json"
    words = argv(output, deepspeed=config, per_device_train_batch_size=2, max_steps=3, save_steps=1)
    before = partial(inject_in_second_process, where, value)
    first, second = run_ranks(words, tmp_path / "log", 2, before)
    assert (first.code, second.code) == (1, 1), second.err
    assert "error" not in second.err
    assert re.match(f"step 2: {SAID[where]}.*/checkpoint-1:", first.error)
    assert checkpoints(output) == [1]
    assert {file.name for file in output.iterdir()} == {".lock", "run.json", "checkpoint-1"}
