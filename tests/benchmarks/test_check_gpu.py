"""That the checks of a GPU pass where all is well, and find what is not."""

import subprocess
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deepseek_moe.decode.sampling import greedy, make_sampler

ROOT = Path(__file__).resolve().parents[2]
BUNDLED = ROOT / "models" / "tiny-base"
CPU = torch.device("cpu")
sys.path.append(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def checks() -> SimpleNamespace:
    """The modules of check_gpu.py, and the bundled model in both ways."""
    pytest.importorskip("triton", reason="Triton is not installed")
    names = ("gpu", "kernels", "training", "models", "changes")
    found = {name: import_module(f"check_{name}") for name in names}
    return SimpleNamespace(**found, pair=found["models"].Pair(str(BUNDLED), CPU, "float32"))


def test_without_a_gpu_it_says_so(
    checks: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["check_gpu.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as left:
        checks.gpu.main()
    assert left.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_a_check_that_fails_does_not_end_the_others(
    checks: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong() -> str:
        raise RuntimeError("so\nand so")

    def run(*made: Any) -> int:
        return checks.gpu.report(made, map(checks.gpu.outcome, made))

    assert run(("a", wrong), ("b", lambda: "well")) == 1
    assert capsys.readouterr().out.split("\n")[:3] == [
        "FAILED  a: RuntimeError: so and so", "ok      b: well", "2 checks, 1 failed",
    ]  # fmt: skip
    assert run(("b", lambda: "well")) == 0
    assert run() == 1  # nothing has that name


WORKER = """
import json, os, sys, time
print("a library says", file=sys.stderr, flush=True)
for line in sys.stdin:
    name = line.strip()
    time.sleep(0.3 if name == "slow" else 0)
    if name == "dies":
        print("struck by lightning", file=sys.stderr, flush=True)
        os._exit(7)
    print(json.dumps([name != "wrong", f"{name} {os.getpid()}"]), flush=True)
"""
WORKS = [sys.executable, "-c", WORKER]


@pytest.mark.parametrize("jobs", [1, 3])
def test_processes_share_the_checks(
    jobs: int, checks: SimpleNamespace, capfd: pytest.CaptureFixture[str]
) -> None:
    groups = [
        checks.kernels.Group([(name, str) for name in names])
        for names in (["slow"], ["a", "b"], ["dies", "after"], ["wrong", "last"])
    ]
    names = [name for group in groups for name, _ in group.checks]
    said = dict(zip(names, checks.gpu.in_processes(groups, jobs, 9, WORKS), strict=True))
    assert said["dies"] == (False, "its process ended, exit code 7: struck by lightning")
    of = {name: text.split() for name, (_, text) in said.items() if name != "dies"}
    assert all(name == words[0] for name, words in of.items())
    assert [name for name, (passed, _) in said.items() if not passed] == ["dies", "wrong"]
    assert of["a"][1] == of["b"][1]
    assert of["wrong"][1] != of["last"][1]  # what is wrong may have spoilt the process
    assert jobs > 1 or len({words[1] for words in of.values()}) == 3
    assert "a library says" not in "".join(capfd.readouterr())


def test_processes_run_at_the_same_time(checks: SimpleNamespace, tmp_path: Path) -> None:
    """Each worker answers when both have been asked."""
    script = """
import json, pathlib, sys, time
for line in sys.stdin:
    pathlib.Path(line.strip()).touch()
    end = time.time() + 20
    while len(list(pathlib.Path(line.strip()).parent.iterdir())) < 2 and time.time() < end:
        time.sleep(0.01)
    print(json.dumps([time.time() < end, "met"]), flush=True)
"""
    groups = [checks.kernels.Group([(str(tmp_path / name), str)]) for name in "ab"]
    said = checks.gpu.in_processes(groups, 2, 9, [sys.executable, "-c", script])
    assert list(said) == [(True, "met")] * 2


def test_what_needs_much_memory_waits(checks: SimpleNamespace) -> None:
    Group = checks.kernels.Group
    most, more, few = Group([("a", str)] * 3, 50), Group([("b", str)] * 2, 40), Group([("c", str)])
    queue = checks.gpu.Queue([few, more, most], 60)
    assert queue.take() is most and queue.take() is few
    waits = Thread(target=lambda: taken.append(queue.take()))
    taken: list[Any] = []
    waits.start()
    waits.join(0.1)
    assert waits.is_alive() and not taken
    queue.done(most)
    waits.join(5)
    assert taken == [more] and queue.take() is None
    alone = checks.gpu.Queue([most], 10)  # a GPU that is too small is tried all the same
    assert alone.take() is most


@pytest.mark.slow
def test_a_run_in_processes_prints_the_same() -> None:
    options = ["--device", "cpu", "--jobs", "2", "--only", "kernel s"]
    command = [sys.executable, str(ROOT / "benchmarks" / "check_gpu.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    lines = done.stdout.split("\n")
    assert [line.split(":")[0] for line in lines[:-2]] == [
        "ok      kernel sort_picks", "ok      kernel sum_picks", "ok      kernel swiglu",
    ]  # fmt: skip
    assert lines[-2] == "3 checks, 0 failed" and done.returncode == 0


def test_every_kernel_and_every_way_is_among_the_checks(checks: SimpleNamespace) -> None:
    from kernel_cases import CASES

    def names(groups: Any) -> list[str]:
        return [name for group in groups for name, _ in group.checks]

    kernels = names(checks.kernels.kernel_checks(CPU))
    assert sorted(kernels) == sorted(f"kernel {name}" for name in CASES)
    bundled = names(checks.models.bundled_checks(torch.device("cuda"), 9))
    assert len(bundled) == len(set(bundled))
    assert {"logits, bfloat16", "logits, float16", "logits, int8", "logits, int4"} <= set(bundled)
    [group] = checks.models.model_checks("x", CPU)  # one process has the model, once
    assert len(group.checks) == 4 and group.gigabytes > 40
    assert len(names(checks.training.training_checks(CPU))) == 4
    assert len(names(checks.changes.change_checks(CPU))) == len(checks.changes.CHANGES)


@pytest.mark.slow
def test_all_checks_of_the_engine_pass_on_the_cpu(
    checks: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    groups = [*checks.models.bundled_checks(CPU, 8), *checks.changes.change_checks(CPU)]
    made = [check for group in groups for check in group.checks]
    assert checks.gpu.report(made, map(checks.gpu.outcome, made)) == 0, capsys.readouterr().out


def test_only_what_was_asked_for_is_checked(
    checks: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--device", "cpu", "--model", str(BUNDLED), "--only", "model's logits, batch 8"]
    monkeypatch.setattr(sys, "argv", ["check_gpu.py", *options])
    with pytest.raises(SystemExit) as left:
        checks.gpu.main()
    assert left.value.code == 0
    assert capsys.readouterr().out.split("\n")[1] == "1 checks, 0 failed"


def test_a_kernel_that_forgets_a_place_is_found(
    checks: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepseek_moe.kernels.decode import torch_ops as plain
    from deepseek_moe.kernels.decode import triton_ops as fused

    def forgetful(x_NF: torch.Tensor) -> torch.Tensor:
        out_NF = torch.empty_like(plain.swiglu(x_NF))
        out_NF[:-1] = plain.swiglu(x_NF)[:-1]
        return out_NF

    monkeypatch.setattr(fused, "swiglu", plain.swiglu)
    assert checks.kernels.check_kernel("swiglu", CPU).startswith("within 0 ")
    monkeypatch.setattr(fused, "swiglu", forgetful)
    with pytest.raises(RuntimeError, match=r"1 tokens.*nan"):
        checks.kernels.check_kernel("swiglu", CPU)


def test_gradients_that_are_wrong_are_found(
    checks: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepseek_moe.kernels.decode import torch_ops as plain
    from deepseek_moe.kernels.decode import triton_ops as fused

    for name in ("open_gates", "close_gates", "sum_picks", "sort_picks"):
        monkeypatch.setattr(fused, name, getattr(plain, name))
    kind = "adapters over bf16"
    assert checks.training.check_fused_experts(kind, CPU).startswith("within ")
    assert checks.training.check_dropout(CPU).startswith("within ")

    def other(*args: Any) -> Any:
        grad_gate_up, grad_weights = plain.weighted_swiglu_backward(*args)
        return grad_gate_up, 1.1 * grad_weights

    monkeypatch.setattr(fused, "close_gates", other)
    with pytest.raises(RuntimeError, match=r"weights, uniform, recompute False: 0\.1 from fp32"):
        checks.training.check_fused_experts(kind, CPU)


@pytest.mark.parametrize("kind", ["all weights", "adapters over nf4"])
def test_steps_that_are_wrong_are_found(
    kind: str, checks: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = checks.training
    monkeypatch.setattr(training, "accelerate", lambda model: None)  # needs a GPU
    assert " from fp32, the plain way " in training.check_step(kind, False, CPU)

    def wrong(model: torch.nn.Module) -> None:
        for name, module in model.named_modules():
            if name.endswith("norm"):
                module.variance_epsilon = 0.5

    monkeypatch.setattr(training, "accelerate", wrong)
    with pytest.raises(RuntimeError, match="from fp32, the plain way"):
        training.check_step(kind, True, CPU)


def test_routes_agree_only_where_they_do(
    checks: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kernel_cases import Case

    from deepseek_moe.kernels.decode import torch_ops as plain
    from deepseek_moe.kernels.decode import triton_ops as fused

    def other(*args: Any) -> tuple[torch.Tensor, ...]:
        x_TD, act_TF, index_TK, weights_TK = plain.route(*args)
        return x_TD, act_TF, (index_TK + 1) % 6, weights_TK

    monkeypatch.setattr(fused, "route", plain.route)
    assert checks.kernels.routes_agree(Case(tokens=8)) == 0
    monkeypatch.setattr(fused, "route", other)
    with pytest.raises(RuntimeError, match="apart"):
        checks.kernels.routes_agree(Case(tokens=8))


def test_an_engine_that_is_wrong_is_found(
    checks: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, pair = checks.models, checks.pair
    assert "3 of 3 rows equal" in models.check_greedy(pair, 3, 12)
    models.check_logits(pair, (3,), 5), models.check_noise(pair, pair, 5)
    ops = vars(import_module("deepseek_moe.kernels.decode.torch_ops"))

    def too_sharp(q: torch.Tensor, cache: Any, position: Any, slot: Any, scale: float, c: Any):
        return ops["attend"](q, cache, position, slot, 1.5 * scale, c)

    monkeypatch.setattr(
        pair.fast.engine.decoder, "ops", SimpleNamespace(**(ops | {"attend": too_sharp}))
    )
    for check in (
        partial(models.check_greedy, pair, 3, 12),
        partial(models.check_logits, pair, (3,), 5),
        partial(models.check_noise, pair, pair, 5),
    ):
        with pytest.raises(RuntimeError):
            check()


@pytest.mark.parametrize("change", ["another head", "a second generator"])
def test_an_engine_that_computes_an_old_model_is_found(
    change: str, checks: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepseek_moe.decode import decoder, engine

    monkeypatch.setattr(checks.changes, "NEW", 4)
    # A Generator makes no engine of its own on a CPU.
    monkeypatch.setattr(checks.changes, "Generator", partial(generator_with_engine, checks))
    assert checks.changes.check_change(change, CPU).startswith("engine")
    monkeypatch.setattr(engine, "signature_of", lambda model: [])
    monkeypatch.setattr(decoder, "joined_view", lambda tensors: None)
    with pytest.raises(RuntimeError, match="not those of the changed model"):
        checks.changes.check_change(change, CPU)


def generator_with_engine(checks: SimpleNamespace, model: Any, fast: bool = True) -> Any:
    from deepseek_moe.decode.generation import Generator

    return checks.models.engine_of(model) if fast else Generator(model, fast=False)


def test_ids_may_differ_by_a_near_tie_only(checks: SimpleNamespace) -> None:
    same, pair = checks.models.same, SimpleNamespace(loaded=[SimpleNamespace(dtype=torch.bfloat16)])
    logits = torch.zeros(3, 2, 4)
    logits[..., 0], logits[..., 1], logits[..., 2] = 10.0, 9.9, 8.0
    # Numbers near 10 are 1/16 apart in bf16: four such steps are a quarter.
    assert same(pair, [[0, 0, 0], [0, 0, 0]], [[0, 0, 0], [0, 1, 2]], logits).startswith("1 of 2")
    with pytest.raises(RuntimeError, match="row 1 differs from id 1 on, by 2"):
        same(pair, [[0, 0, 0], [0, 0, 0]], [[0, 0, 0], [0, 2, 0]], logits)
    with pytest.raises(RuntimeError, match="row 0 has 3 ids, or 2"):
        same(pair, [[0, 0, 0]], [[0, 0]], logits)


def test_ids_that_cannot_be_drawn_are_counted(checks: SimpleNamespace) -> None:
    logits = torch.tensor([[5.0, 4.0, 1.0, 0.0]] * 2)
    seen = torch.zeros(2, 4, dtype=torch.bool)
    for sample, ids, refused in (
        (greedy, [[0], [1]], 1),
        (make_sampler(1.0, top_k=2), [[1], [2]], 1),
        (make_sampler(1.0, top_p=0.5), [[1], [0]], 1),
        (make_sampler(1.0), [[3], [2]], 0),
        (make_sampler(1.0, min_p=0.3), [[1], [2]], 1),
        (make_sampler(repetition_penalty=2.0), [[0], [3]], 1),
    ):
        possible = checks.models.Possible(sample, ids)
        assert possible(logits, seen).tolist() == [ids[0][0], ids[1][0]]
        assert possible.refused == refused, sample


def test_stop_ids_that_are_ignored_are_found(
    checks: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks.models.check_stops(checks.pair, 8)
    generate = checks.pair.fast.generate
    monkeypatch.setattr(checks.pair.fast, "generate", lambda *args, stop_ids=(): generate(*args))
    with pytest.raises(RuntimeError, match="rows of the steps"):
        checks.models.check_stops(checks.pair, 8)
