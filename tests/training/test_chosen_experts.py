"""Chosen experts train with their full weights; everything else stays as it is in the base."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accident_fixtures import die_in_step
from finetune_fixtures import (
    ZERO,
    assert_same,
    change_built,
    checkpoints,
    logged,
    run_ranks,
    succeed,
    succeed_ranks,
    weights,
    write_base,
)
from safetensors.torch import load_file, save_file

from deepseek_moe import DeepseekForCausalLM, export
from deepseek_moe.checkpoint import Checkpoint
from deepseek_moe.errors import UserError
from deepseek_moe.experts.choose import choice_as_text
from deepseek_moe.training.arguments import FineTuningArguments, ModelArguments
from deepseek_moe.training.build import build_model
from deepseek_moe.training.parameter_counts import parameter_table, weights_passed
from deepseek_moe.training.quantized_base import dequantize
from deepseek_moe.training.run import WRITTEN

MakeArgv = Callable[..., list[str]]
CHOSEN = {1: [1, 4, 6], 3: [7]}
"""Layer 2 has routed experts too, and none of them trains."""
ADAM = {"learning_rate": 1e-2, "adam_epsilon": 1e-3, "max_steps": 4, "save_steps": 2}
ADAM |= {"max_grad_norm": 0.1}  # which clips


def is_chosen(name: str) -> bool:
    """Whether an official tensor is of a chosen expert."""
    return any(f"layers.{i}.mlp.experts.{e}." in name for i, some in CHOSEN.items() for e in some)


@pytest.fixture(scope="module")
def base(place: Path) -> Path:
    """A base in fp32 of three layers with routed experts, with the choice beside its files."""
    folder = write_base(place / "four", num_hidden_layers=4)
    model = DeepseekForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.save_pretrained(folder)
    (place / "four.json").write_text(choice_as_text(CHOSEN))
    return folder


@pytest.fixture(scope="module")
def command(base: Path, place: Path, argv: MakeArgv) -> MakeArgv:
    """Makes a command of 4 steps that trains CHOSEN. Keywords change it."""

    def command(output: Path, **changes: Any) -> list[str]:
        plain = {"model_name_or_path": base, "train_experts": place / "four.json"}
        plain = plain | ADAM | changes
        return argv(output, **{n: value for n, value in plain.items() if value is not None})

    return command


@pytest.fixture(scope="module")
def plain(command: MakeArgv, place: Path) -> Path:
    """The folder of an undisturbed run in one process, in fp32."""
    succeed(command(place / "plain"), place / "plain_log")
    return place / "plain"


def assert_only_chosen_changed(folder: Path, base: Path) -> None:
    found, before = weights(folder), weights(base)
    assert found.keys() == before.keys()
    changed = {name for name in before if not torch.equal(found[name], before[name])}
    assert changed == {name for name in before if is_chosen(name)}


def mask_all_but_chosen(model: torch.nn.Module) -> None:
    """Puts zeros in place of every gradient but those of CHOSEN."""
    for name, parameter in model.named_parameters():
        kept = torch.zeros(len(parameter), *[1] * (parameter.dim() - 1))
        for layer, experts in CHOSEN.items():
            if f"layers.{layer}.mlp.experts." in name:
                kept[experts] = 1.0
        parameter.register_hook(lambda grad, kept=kept: grad * kept)


@pytest.fixture(scope="module")
def masked(command: MakeArgv, place: Path) -> Path:
    argv = command(place / "masked", train_experts=None)
    succeed(argv, place / "masked_log", partial(change_built, mask_all_but_chosen))
    return place / "masked"


HALF = {"per_device_train_batch_size": 2}
CASES: dict[str, dict[str, Any]] = {
    "one process": {},
    "recomputed": {"gradient_checkpointing": True},
    "accumulated": HALF | {"gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_it_equals_full_training_without_the_other_gradients(case, base, masked, command, tmp_path):
    """test_deepspeed.py does it with two processes."""
    output = tmp_path / "out"
    succeed(command(output, **CASES[case]), tmp_path / "log")
    assert_only_chosen_changed(output, base)
    found, wanted, before = weights(output), weights(masked), weights(base)
    for name, tensor in wanted.items():
        assert (found[name] - tensor).abs().max() <= 1e-6, name
        if is_chosen(name):
            assert (tensor - before[name]).abs().max() > 1e-3, name
    assert all(norm > 0.1 for norm in logged(output, "grad_norm"))
    for key in ("loss", "grad_norm", "balance_loss"):
        assert logged(output, key) == pytest.approx(logged(masked, key), rel=1e-5), key


def test_layers_and_parameters_are_counted_once(base):
    """Under bf16 the chosen are fp32, beside a frozen stack in bf16 that holds all experts."""
    model, training = ModelArguments(chosen_experts=CHOSEN), arguments(bf16=True)
    built = build_model(base, model, training)
    whole = DeepseekForCausalLM.from_pretrained(base)
    assert weights_passed(built) == weights_passed(whole)
    table, all_of_them = parameter_table(built), parameter_table(whole)
    assert [row[:2] for row in table] == [row[:2] for row in all_of_them]
    trained = sum(x.numel() for name, x in weights(base).items() if is_chosen(name))
    assert {row[2] for row in table} == {0, trained}
    dtypes = {p.requires_grad: p.dtype for p in built.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    untouched = built.model.layers[2].mlp.experts
    assert type(untouched) is type(whole.model.layers[2].mlp.experts)


def arguments(**options: Any) -> FineTuningArguments:
    return FineTuningArguments(output_dir="none", use_cpu=True, report_to="none", **options)


def test_weights_of_one_dtype_are_held_once(base):
    """In fp32, or in bf16 with --single_gpu_full, what trains is a part of the frozen stack."""
    for given in ({}, {"bf16": True, "single_gpu_full": True}):
        built = build_model(base, ModelArguments(chosen_experts=CHOSEN), arguments(**given))
        experts = built.model.layers[1].mlp.experts
        for name in ("gate_up_proj", "down_proj"):
            trained, stack = getattr(experts, f"chosen_{name}"), getattr(experts, name)
            assert trained.untyped_storage().data_ptr() == stack.untyped_storage().data_ptr()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_stack_has_the_chosen_first_and_what_trains_is_exact(bits, base):
    options = ModelArguments(chosen_experts=CHOSEN, bits=bits)
    built, saved = build_model(base, options, arguments()), Checkpoint(base)
    experts = built.model.layers[1].mlp.experts
    for name in ("gate_up_proj", "down_proj"):
        official = saved.read(f"model.layers.1.mlp.experts.{name}")
        assert torch.equal(getattr(experts, f"chosen_{name}"), official[CHOSEN[1]])
        stack = dequantize(getattr(experts, name), torch.float32)
        ordered = official[[1, 4, 6, 0, 2, 3, 5, 7]]
        assert (stack - ordered).norm() < 0.15 * ordered.norm() < 0.5 * (stack - official).norm()


@pytest.mark.slow
@pytest.mark.usefixtures("deepspeed_extensions")
@pytest.mark.parametrize(("zero", "bits"), [("zero2_no_offload", 4), ("zero3", 16)])
def test_two_processes_that_die_go_on_as_if_nothing_had_been(zero, bits, base, command, tmp_path):
    """test_resume.py does it with one process."""
    changes = HALF | {"deepspeed": ZERO[zero], "bits": bits, "bf16": True}
    argv, whole = (command(tmp_path / name, **changes) for name in ("out", "whole"))
    died = run_ranks(argv, tmp_path / "log", 2, partial(die_in_step, 4))
    assert [one.code for one in died] == [-9, -9] and checkpoints(tmp_path / "out") == [2]
    for words in (argv, whole):
        succeed_ranks(words, tmp_path / "log")
    assert_same(tmp_path / "out", tmp_path / "whole")
    assert_only_chosen_changed(tmp_path / "out", base)


@pytest.fixture(scope="module")
def delta(command: MakeArgv, place: Path) -> Path:
    """The folder of a run that saves a delta."""
    succeed(command(place / "delta", save_delta=True), place / "delta_log")
    return place / "delta"


@pytest.fixture
def export_delta(run_module: Callable[..., None]) -> Callable[..., Path]:
    """Returns the folder that the export writes."""

    def export_delta(model: Path, delta: Path, output: Path) -> Path:
        run_module(export, "--model", model, "--delta", delta, "--output", output)
        return output

    return export_delta


def test_a_delta_holds_what_changed_and_becomes_a_model(base, plain, delta, tmp_path, export_delta):
    names = {file.name for file in delta.iterdir()} - {"run.json", ".lock"}
    assert names == {file.name for pattern in WRITTEN for file in delta.glob(pattern)}
    assert not (delta / "config.json").exists() and not [*delta.glob("model*")]
    changed = {name for name in weights(base) if is_chosen(name)}
    assert load_file(delta / "delta.safetensors").keys() == changed
    assert_same(export_delta(base, delta, tmp_path / "whole"), plain)
    shutil.copytree(delta, tmp_path / "moved", ignore=lambda *_: ["run.json"])
    assert_same(export_delta(base, tmp_path / "moved", tmp_path / "again"), plain)
    DeepseekForCausalLM.from_pretrained(tmp_path / "whole")
    last = export_delta(base, delta / "checkpoint-4", tmp_path / "last")
    assert_same(last, plain)


def test_a_delta_of_another_base_or_no_delta_is_refused(base, delta, tmp_path, export_delta):
    other = shutil.copytree(base, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] += 1.0
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    for folder in (delta, delta / "checkpoint-4"):
        with pytest.raises(UserError, match=r"over another model|was not trained over"):
            export_delta(other, folder, tmp_path / "out")
    with pytest.raises(UserError, match="is no delta that can be read"):
        export_delta(base, base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_modules_train_only_if_they_are_named(base, command, tmp_path):
    names = "mlp.gate,down_proj"  # down_proj is that of the dense layer and of shared experts
    argv = command(tmp_path / "out", trainable=names, bits=4, save_delta=True)
    succeed(argv, tmp_path / "log")
    found, before = load_file(tmp_path / "out" / "delta.safetensors"), weights(base)
    named = ("mlp.gate.weight", "shared_experts.down_proj.weight", "mlp.down_proj.weight")
    wanted = {name for name in before if is_chosen(name) or name.endswith(named)}
    assert found.keys() == wanted
    assert not any(torch.equal(found[name], before[name]) for name in wanted)
    for name in ("experts", "mlp", "experts.down_proj", "layers"):
        model = ModelArguments(chosen_experts=CHOSEN, trainable=name)
        with pytest.raises(UserError, match=f"^--trainable {name} means routed experts, and --tr"):
            build_model(base, model, arguments())
