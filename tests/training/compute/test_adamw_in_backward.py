"""AdamW in the backward pass: what it learns beside fp32, and how a run with it stops and resumes.

It runs on the CPU, by the plain twin of the kernel.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from finetune_fixtures import checkpoints
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from deepseek_moe.errors import RunError
from deepseek_moe.kernels.optimizer.torch_ops import read_averages
from deepseek_moe.training.compute.adamw_in_backward import StepInBackward


@pytest.mark.parametrize("start", [1.0, -1.0])
def test_rounding_is_right_on_average(start):
    """A step of 1e-4 from 1, where bf16 has nothing between 1 and 1 - 1/256."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.full((256, 256), start, dtype=torch.bfloat16))
    StepInBackward([weight], lr=1e-4)
    (weight * math.copysign(1, start)).sum().backward()
    moved = 1 - weight.detach().double().abs()
    assert moved.unique().tolist() == [0, 1 / 256]
    error = (1e-4 / 256 / weight.numel()) ** 0.5  # standard, of the mean
    assert abs(moved.mean() - 1e-4) < 4 * error < 1e-5


def test_what_needs_no_rounding_stays_and_nan_stays_nan():
    start = torch.tensor([0.0, 1.0, -1.0, 1.0]).repeat(100).bfloat16()
    weight = nn.Parameter(start.clone())
    StepInBackward([weight], lr=0.0)
    factor = torch.ones(400)
    factor[0] = math.nan
    (weight * factor).sum().backward()
    assert weight[0].isnan() and torch.equal(weight[1:], start[1:])


def test_steps_are_those_of_adamw_with_its_groups_and_schedule():
    """Apart from what averages of 8 bits and weights of 16 bits cost."""
    torch.manual_seed(0)
    start = [torch.randn(64, 256) * 0.01, torch.randn(100) * 0.01]
    inputs = [torch.randn(4, 64), torch.randn(4, 100)]

    def steps(make: Callable[..., torch.optim.Optimizer], dtype: torch.dtype) -> list[Any]:
        own = [nn.Parameter(one.to(dtype, copy=True)) for one in start]
        groups = [{"params": own[:1], "weight_decay": 50.0}, {"params": own[1:], "weight_decay": 0}]
        optimizer = make(groups, lr=1e-2, betas=(0.8, 0.9), eps=1e-6)
        schedule = LambdaLR(optimizer, lambda step: (step + 1) / 4)
        for step in range(4):
            x, y = (one * (1 + step) for one in inputs)
            near, far = (x @ own[0].float() - 1).square().sum(), (y * own[1].float() - 1).square()
            (near + far.sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        return [one.detach().float() for one in own]

    ours = steps(StepInBackward, torch.bfloat16)
    exact = steps(torch.optim.AdamW, torch.float32)
    for one, other, before in zip(ours, exact, start, strict=True):
        moved = (other - before).norm()
        assert moved > 0.5 * before.norm()
        assert (one - other).norm() < 0.08 * moved
        assert abs((one - other).mean()) < 0.005 * moved / moved.numel() ** 0.5


def test_a_backward_pass_is_a_step_and_frees_each_gradient():
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(5))).to(torch.bfloat16)
    parameters, x = list(model.parameters()), torch.randn(3, 16, dtype=torch.bfloat16)
    model(x).square().sum().backward()
    norm = torch.cat([one.grad.float().flatten() for one in parameters]).norm().item()
    model.zero_grad()
    there: list[int] = []

    def count() -> None:
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(
                lambda _: there.append(sum(one.grad is not None for one in parameters))
            )

    count()
    optimizer = StepInBackward(parameters, lr=1e-3)
    count()
    before = [one.detach().clone() for one in parameters]
    model(x).square().sum().backward()
    assert there == [1, 0] * 10
    assert optimizer.grad_norm().dtype == torch.float32
    assert optimizer.grad_norm().item() == pytest.approx(norm, rel=1e-5)
    stepped = [one.detach().clone() for one in parameters]
    assert not any(map(torch.equal, before, stepped))
    optimizer.step()
    assert all(map(torch.equal, parameters, stepped))
    model(x * 0).sum().backward()  # whose norm is of this step alone
    assert optimizer.grad_norm().item() != pytest.approx(norm, rel=1e-2)


def test_a_weight_that_is_still_needed_must_not_be_stepped():
    """autograd raises an error, as for any other change in place."""
    weight = nn.Parameter(torch.randn(8, 8, dtype=torch.bfloat16))
    StepInBackward([weight], lr=1e-3)
    x = torch.randn(3, 8, dtype=torch.bfloat16, requires_grad=True)
    first, second = (x @ weight).sum(), (x @ weight).sum()
    first.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.backward()


def test_averages_are_bytes_and_are_loaded_in_their_place(tmp_path):
    """test_resume.py compares the steps after it."""
    weights = [nn.Parameter(torch.randn(n, dtype=torch.bfloat16)) for n in (1000, 48)]
    optimizer = StepInBackward([{"params": weights[:1]}, {"params": weights[1:]}], lr=1e-2)
    sum(one.square().sum() for one in weights).backward()
    states = list(optimizer.state.values())
    assert states[0]["m"].dtype == states[0]["v"].dtype == torch.uint8
    assert states[0]["m_scale"].numel() == states[0]["v_scale"].numel() == 4
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    places, old = [one["m"].data_ptr() for one in states], [one["m"].clone() for one in states]
    for one in states:
        one["m"].zero_()
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert places == [one["m"].data_ptr() for one in optimizer.state.values()]
    assert all(map(torch.equal, old, (one["m"] for one in optimizer.state.values())))


def test_averages_follow_fp32_without_bias():
    """Also v: it changes by a thousandth in a step, which rounding to the nearest would lose."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.ones(40, 256, dtype=torch.bfloat16))
    optimizer = StepInBackward([weight], lr=0.0, betas=(0.9, 0.99))
    size = torch.logspace(0, -3, 40)[:, None]
    m, v = torch.zeros(40, 256), torch.zeros(40, 256)
    for _ in range(150):
        grad = (torch.randn(40, 256) + 0.5) * size
        (weight * grad).sum().backward()
        m, v = 0.9 * m + 0.1 * grad, 0.99 * v + 0.01 * grad.square()
    for have, want in zip(read_averages(optimizer.state[weight]), (m, v), strict=True):
        ratio = have.view(40, 256).mean(1) / want.mean(1)
        assert (ratio - 1).abs().mean() < 0.03
        assert abs(ratio.mean() - 1) < 0.01


def test_other_weights_than_bf16_are_refused():
    with pytest.raises(ValueError, match=r"float32; these are steps of bf16"):
        StepInBackward([nn.Parameter(torch.ones(3))], lr=1e-3)


USUAL = {"optim": "adamw_torch_fused", "learning_rate": 1e-2, "lr_scheduler_type": "linear"}
USUAL |= {"weight_decay": 0.1, "bf16": True, "use_cpu": True, "per_device_train_batch_size": 4}
OURS = USUAL | {"single_gpu_full": True}


def test_groups_rate_and_losses_are_those_of_a_usual_run(tuner):
    usual, ours = tuner(**USUAL), tuner(**OURS)
    groups = []
    for trainer in (usual, ours):
        trainer.train()
        for group in trainer.optimizer.param_groups:
            shapes = [parameter.shape for parameter in group["params"]]
            groups.append((shapes, group["weight_decay"], group["betas"], group["eps"]))
    assert groups[:2] == groups[2:] and [decay for _, decay, *_ in groups[:2]] == [0.1, 0.0]

    def curves(key: str) -> list[list[float]]:
        histories = [trainer.state.log_history for trainer in (ours, usual)]
        return [[line[key] for line in history if key in line] for history in histories]

    rates, usual_rates = curves("learning_rate")
    assert rates == usual_rates and len(rates) == 6
    # Rounding to bf16 alone moves the gradient of so small a model by 8 to 29 %.
    for key, later in (("loss", 0.2), ("grad_norm", 0.35)):
        have, want = curves(key)
        assert have[0] == pytest.approx(want[0], rel=0.02)
        assert have == pytest.approx(want, rel=later)
    assert {p.dtype for p in ours.model.parameters()} == {torch.bfloat16}


def test_a_loss_that_is_not_a_number_stops_before_any_weight_is_touched(tuner):
    trainer = tuner(**OURS)
    with torch.no_grad():
        trainer.model.lm_head.weight[5, 0] = math.nan
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(RunError, match=r"step 1: the loss is nan, in rows .*json row"):
        trainer.train()
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("where", ["gradient", "m_scale", "v_scale"])
def test_a_number_that_is_not_finite_stops_before_the_next_checkpoint(where, tuner, tmp_path):
    trainer = tuner(**OURS, save_strategy="steps", save_steps=1)
    weight = trainer.model.lm_head.weight

    def break_in_third_step(grad):
        if trainer.state.global_step < 2:
            return grad
        if where == "gradient":
            return grad * math.inf
        trainer.own_optimizer.state[weight][where][0] = math.inf
        return grad

    weight.register_hook(break_in_third_step)
    said = r"step 3: the gradient norm, a weight or a state .* (nan|inf), in .*out/checkpoint-2:"
    with pytest.raises(RunError, match=said):
        trainer.train()
    assert checkpoints(tmp_path / "out") == [1, 2]
