"""LoRA on chosen experts: what it computes, keeps, saves, and goes on from."""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accident_fixtures import die_in_step
from adapter_fixtures import IDS, add_random_adapters, load, tensors_in
from finetune_fixtures import (
    assert_same,
    checkpoints,
    logged,
    run,
    run_ranks,
    succeed,
    weights,
)
from peft import PeftModel
from text_fixtures import ROOT

from deepseek_moe import DeepseekForCausalLM
from deepseek_moe.checkpoint import fingerprint
from deepseek_moe.errors import UserError
from deepseek_moe.experts.choose import CHOICE_FILE, choice_as_text
from deepseek_moe.experts.profile import LayerProfile, Profile
from deepseek_moe.training.arguments import FineTuningArguments, ModelArguments
from deepseek_moe.training.build import build_model
from deepseek_moe.training.expert_lora import with_all_experts
from deepseek_moe.training.merge_lora import merge_into, merged_tensors
from deepseek_moe.training.trainable import add_lora

MakeArgv = Callable[..., list[str]]
MakeModel = Callable[..., DeepseekForCausalLM]
CHOSEN = {1: [0, 3, 7], 2: [5]}
STACKS = "experts.gate_up_proj,experts.down_proj"
LORA = {"use_lora": True, "lora_rank": 3, "lora_dropout": 0.1}
E, R = 8, 3
PROFILE = "a profile of this model, or of another one"


def of_others(name: str, factor: torch.Tensor, chosen: Mapping[int, list[int]]) -> torch.Tensor:
    """A view on a lora_A or lora_B of all experts: what belongs to experts that are not chosen.
    Experts come first."""
    layer = int(name.split("layers.")[1].split(".")[0])
    others = [one for one in range(E) if one not in chosen.get(layer, ())]
    if "lora_A" in name:
        return factor.unflatten(0, (E, -1))[others]
    return factor.unflatten(1, (-1, E)).permute(2, 1, 0)[others]


def is_factor(name: str) -> bool:
    return ".experts." in name and ".lora_" in name


# --- What it computes


def zero_others(gradient: torch.Tensor, name: str, chosen: Mapping[int, list[int]]) -> torch.Tensor:
    kept = torch.ones_like(gradient)
    layer = int(name.split("layers.")[1].split(".")[0])
    for one in set(range(E)) - set(chosen[layer]):
        if "lora_A" in name:
            kept.unflatten(0, (E, -1))[one] = 0
        else:
            kept.unflatten(1, (-1, E))[..., one] = 0
    return gradient * kept


def zero_gradients_of_others() -> None:
    """Lets the script train adapters of all experts with gradients of the chosen ones only."""
    from deepseek_moe.training import build

    original = build.build_model

    def build_with_hooks(*args: Any) -> torch.nn.Module:
        model = original(*args)
        hook_others(model)
        return model

    build.build_model = build_with_hooks


def hook_others(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if is_factor(name):
            parameter.register_hook(partial(zero_others, name=name, chosen=CHOSEN))


def trained(model: torch.nn.Module, steps: int = 4) -> Any:
    """`model` after a few steps of AdamW, the same dropout in each."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        model.train()(IDS, labels=IDS, use_cache=False).loss.backward()
        optimizer.step()
    return model


def build(base: Path, **options: Any) -> Any:
    training = FineTuningArguments(output_dir="none", use_cpu=True, report_to="none")
    torch.manual_seed(0)
    return build_model(base, ModelArguments(str(base), **(LORA | options)), training)


@pytest.mark.parametrize(
    ("options", "checkpointing"),
    [
        ({"lora_dropout": 0}, False),
        ({}, False),
        ({}, True),
        ({"bits": 4}, True),
        ({"trainable": "q_proj,v_proj"}, False),
    ],
)
def test_it_equals_all_adapters_with_the_gradients_of_the_others_zeroed(
    options: dict[str, Any], checkpointing: bool, tiny_model: MakeModel, tmp_path: Path
) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    few = build(tmp_path / "base", chosen_experts=CHOSEN, **options)
    named = ",".join([STACKS, options.get("trainable", "")])
    every = build(tmp_path / "base", **(options | {"trainable": named}))
    hook_others(every)
    if checkpointing:
        few.gradient_checkpointing_enable({"use_reentrant": False})
        every.gradient_checkpointing_enable({"use_reentrant": False})
    few, every = trained(few), trained(every)
    wanted = {n: p.detach() for n, p in every.named_parameters() if p.requires_grad}
    found = {n: p.detach() for n, p in few.named_parameters() if p.requires_grad}
    assert found.keys() == wanted.keys()
    for name, factor in with_all_experts(few, found).items():
        kept = wanted[name].clone()
        if is_factor(name):  # The adapters of the others are random times zero there.
            size = found[name].numel() * E // len(CHOSEN[int(name.split("layers.")[1][0])])
            assert size == factor.numel()
            kept = zero_others(kept, name, CHOSEN)
        assert factor.abs().max() > 0
        torch.testing.assert_close(factor, kept, rtol=0, atol=1e-6)


def test_a_layer_without_chosen_experts_has_no_adapter(tiny_model: MakeModel) -> None:
    model = add_random_adapters(tiny_model(), [], chosen={2: [1, 6]})
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(names) == 4 and all("layers.2.mlp.experts." in name for name in names)


def test_routed_experts_beside_chosen_ones_are_refused(tiny_model: MakeModel) -> None:
    for name in ("experts", "mlp.experts.down_proj", "gate_up_proj"):
        with pytest.raises(UserError, match=f"--trainable {name} means routed experts"):
            add_lora(tiny_model(), ["q_proj", name], 3, 6.0, 0.0, chosen=CHOSEN)
    adapted = add_lora(tiny_model(), ["gate_proj", "down_proj"], 3, 6.0, 0.0, chosen=CHOSEN)
    linears = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert sum("mlp.experts" in name for name in linears) == 8
    assert sum("shared_experts" in name for name in linears) == 8


# --- Runs


@pytest.fixture(scope="module")
def choice(place: Path) -> Path:
    file = place / "my_experts.json"
    file.write_text(choice_as_text(CHOSEN))
    return file


@pytest.fixture(scope="module")
def command(argv: MakeArgv, choice: Path) -> MakeArgv:
    """Makes a command of 6 steps in fp32, saved after the third and the last."""

    def command(output: Path, **changes: Any) -> list[str]:
        plain = LORA | {"train_experts": choice, "max_steps": 6}
        return argv(output, **(plain | changes))

    return command


@pytest.fixture(scope="module")
def finished(place: Path, command: MakeArgv) -> Path:
    succeed(command(place / "finished"), place / "log")
    return place / "finished"


def test_what_is_saved_is_an_adapter_of_peft(place: Path, finished: Path) -> None:
    tensors = weights(finished)
    assert len(tensors) == 8
    for name, factor in tensors.items():
        assert factor.any() and not of_others(name, factor, CHOSEN).any(), name
        width = {"A": 0, "B": 1}[name.split("lora_")[1][0]]
        assert factor.shape[width] == E * R
    named = json.loads((finished / CHOICE_FILE).read_text())["experts"]
    assert named == {str(layer): experts for layer, experts in CHOSEN.items()}

    base = place / "base"
    plain = PeftModel.from_pretrained(load(base, dtype=torch.float32), finished)
    merged = load(base, dtype=torch.float32)
    with torch.no_grad():
        before, wanted = merged(IDS).logits, plain(IDS).logits
        merge_into(merged, base, finished)
        assert (wanted - before).abs().max() > 1e-2
        torch.testing.assert_close(merged(IDS).logits, wanted, rtol=0, atol=1e-4)
    old = tensors_in(base)
    changed = [n for n, x in merged_tensors(base, finished) if not torch.equal(x, old[n].float())]
    experts = {tuple(map(int, re.findall(r"\.(\d+)\.", name))) for name in changed}
    assert experts == {(layer, one) for layer, some in CHOSEN.items() for one in some}


def test_a_resumed_run_equals_an_uninterrupted_one(
    finished: Path, command: MakeArgv, choice: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    assert run(command(output), tmp_path / "log", partial(die_in_step, 5)).code == -9
    assert checkpoints(output) == [3]
    states = torch.load(output / "checkpoint-3" / "optimizer.pt", weights_only=True)["state"]
    found = sorted(tuple(one["exp_avg"].shape) for one in states.values())
    sizes = {"gate_up_proj": (32, 16), "down_proj": (8, 32)}  # in, out
    wanted = [
        shape
        for width, out in sizes.values()
        for some in CHOSEN.values()
        for shape in ((len(some) * R, width), (out, len(some) * R))
    ]
    assert found == sorted(wanted)

    moved = shutil.copy(choice, tmp_path / "moved.json")  # Only the choice itself counts.
    other = tmp_path / "other.json"
    other.write_text(choice_as_text(CHOSEN | {2: [4]}))
    refused = run(command(output, train_experts=other), tmp_path / "log").refusal
    assert "other train experts" in refused
    succeed(command(output, train_experts=moved), tmp_path / "log")
    assert_same(output, finished)
    assert logged(output, "loss") == logged(finished, "loss")


def test_an_adapter_goes_on_with_its_experts(
    place: Path, finished: Path, argv: MakeArgv, tmp_path: Path
) -> None:
    more = {"use_lora": True, "lora_dropout": 0, "adapter": finished, "max_steps": 2}
    succeed(argv(tmp_path / "still", **more, learning_rate=0), tmp_path / "log")
    assert_same(tmp_path / "still", finished)
    succeed(argv(tmp_path / "on", **more), tmp_path / "log")
    for name, factor in weights(tmp_path / "on").items():
        assert not torch.equal(factor, weights(finished)[name])
        assert not of_others(name, factor, CHOSEN).any(), name
    assert (tmp_path / "on" / CHOICE_FILE).read_text() == (finished / CHOICE_FILE).read_text()

    both = run(argv(tmp_path / "no", **more, train_experts="x"), tmp_path / "log").refusal
    assert f"--train_experts is that of --adapter {finished}" in both
    broken = shutil.copytree(finished, tmp_path / "broken")
    (broken / CHOICE_FILE).write_text(choice_as_text({1: [0], 2: [5]}))
    done = run(argv(tmp_path / "no", **(more | {"adapter": broken})), tmp_path / "log")
    assert done.code == 2 and "has adapters of experts that were not chosen" in done.error
    (broken / CHOICE_FILE).write_text(choice_as_text({1: [0]}))
    done = run(argv(tmp_path / "no", **(more | {"adapter": broken})), tmp_path / "log")
    assert done.code == 2 and "its experts have adapters in layers [1, 2]" in done.error


# A step of plain SGD is as large as the gradient, while Adam's would hide its scale.
SGD = {"optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": 1, "max_grad_norm": 0}
SGD |= {"lora_dropout": 0, "max_steps": 3}


@pytest.fixture(scope="module")
def with_zeroed_gradients(place: Path, argv: MakeArgv) -> Path:
    """A run of one process with adapters of all experts, only those of the chosen ones moving."""
    output, changes = place / "zeroed", LORA | {"trainable": STACKS, **SGD}
    command = argv(output, **changes, per_device_train_batch_size=8)
    succeed(command, place / "log", zero_gradients_of_others)
    return output


@pytest.mark.usefixtures("deepspeed_extensions", "free_buffers")
@pytest.mark.parametrize(
    ("config", "processes"),
    [
        (None, 1),
        pytest.param("zero2_no_offload", 2, marks=pytest.mark.slow),
        pytest.param("zero3", 2, marks=pytest.mark.slow),
    ],
)
def test_a_run_equals_one_with_zeroed_gradients(
    config: str | None,
    processes: int,
    command: MakeArgv,
    with_zeroed_gradients: Path,
    tmp_path: Path,
) -> None:
    changes = SGD | {"per_device_train_batch_size": 8 // processes}
    if config:
        changes["deepspeed"] = ROOT / "configs" / f"ds_config_{config}.json"
    ends = run_ranks(command(tmp_path / "out", **changes), tmp_path / "log", processes)
    assert [done.code for done in ends] == [0] * processes, ends[0].err
    for key in ("loss", "grad_norm", "balance_loss"):
        wanted = logged(with_zeroed_gradients, key)
        assert len(wanted) == 3
        assert logged(tmp_path / "out", key) == pytest.approx(wanted, rel=1e-5), key
    found, wanted = weights(tmp_path / "out"), weights(with_zeroed_gradients)
    assert found.keys() == wanted.keys()
    for name, factor in wanted.items():
        kept = zero_others(factor, name, CHOSEN)
        assert kept.abs().max() > 1e-2
        torch.testing.assert_close(found[name], kept, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("deepspeed_extensions", "free_buffers")
@pytest.mark.parametrize("config", ["zero2_no_offload", "zero3"])
def test_a_run_under_deepspeed_goes_on(config: str, command: MakeArgv, tmp_path: Path) -> None:
    changes = SGD | {"max_steps": 4, "save_steps": 2}
    succeed(command(tmp_path / "one", **changes), tmp_path / "log")
    changes["deepspeed"] = ROOT / "configs" / f"ds_config_{config}.json"
    argv = command(tmp_path / "out", **changes, per_device_train_batch_size=2)
    killed = run_ranks(argv, tmp_path / "log", 2, partial(die_in_step, 4))
    assert [done.code for done in killed] == [-9, -9]
    assert checkpoints(tmp_path / "out") == [2]
    ends = run_ranks(argv, tmp_path / "log", 2)
    assert [done.code for done in ends] == [0, 0], ends[0].err
    wanted = weights(tmp_path / "one")
    for name, factor in weights(tmp_path / "out").items():
        torch.testing.assert_close(factor, wanted[name], rtol=0, atol=1e-5)


def test_it_works_with_all_that_a_run_may_have(
    place: Path, command: MakeArgv, tmp_path: Path
) -> None:
    """In 4 bits, packed, evaluated, recomputed, from a file that has the shared experts train."""
    file, output = tmp_path / "expert_cfg.json", tmp_path / "out"
    named = {"experts": {"2": [6, 1]}, "shared_experts": True, "non_expert_modules": False}
    file.write_text(json.dumps(named))
    options = {"bits": 4, "bf16": True, "packing": True, "gradient_checkpointing": True}
    options |= {"eval_fraction": 0.2, "eval_strategy": "steps", "eval_steps": 3}
    options |= {"trainable": "q_proj", "merge_on_save": True, "train_experts": file}
    succeed(command(output, **options), tmp_path / "log")
    assert len(logged(output, "eval_loss")) == 2
    learnt = {name for name, factor in weights(output / "adapter").items() if factor.any()}
    assert {name.split(".")[-3] for name in learnt if "layers.1." in name} == {
        *("q_proj", "gate_proj", "up_proj", "down_proj")
    }
    assert sum("mlp.experts." in name for name in learnt) == 4
    assert (load(output)(IDS).logits - load(place / "base")(IDS).logits).abs().max() > 1e-2


def test_the_dry_run_counts_the_chosen_experts(command: MakeArgv, tmp_path: Path) -> None:
    done = succeed(command(tmp_path / "out", dry_run=True), tmp_path / "log")
    [experts] = [line.split() for line in done.out.splitlines() if line.startswith("routed ")]
    in_and_out = 32 + 16 + 8 + 32  # of gate and up, and of down
    assert experts[3] == f"{4 * R * in_and_out:,}"
    assert "LoRA of rank 3 on 4 chosen experts" in done.out
    assert not (tmp_path / "out").exists()


# --- What is refused, before any weight is loaded


def forbid_loading() -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("weights are loaded")

    DeepseekForCausalLM.from_pretrained = fail


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"expert_threshold": 0.5}, "--expert_threshold has no effect on "),
        ({"trainable": "experts"}, "--trainable experts means routed experts"),
        ({"train_experts": "nowhere.json"}, "nowhere.json cannot be read: No such file"),
        ({"train_experts": PROFILE, "expert_threshold": 1.5}, "--expert_threshold is 1.5"),
        ({"train_experts": PROFILE, "expert_share": 0.01}, "of 8 experts keeps none"),
        ({"train_experts": PROFILE}, "profile.json was measured on another model"),
    ],
)
def test_a_wrong_choice_is_refused(
    changes: dict[str, Any], said: str, place: Path, command: MakeArgv, tmp_path: Path
) -> None:
    if changes.get("train_experts") is PROFILE:
        file = tmp_path / "profile.json"
        model = "tensors:other" if len(changes) == 1 else fingerprint(place / "base")
        layer = LayerProfile([1] * 8, [1.0] * 8, [1.0] * 8)
        Profile({1: layer, 2: layer}, 8, model, "d").save(file)
        changes = changes | {"train_experts": file}
    done = run(command(tmp_path / "out", **changes), tmp_path / "log", forbid_loading)
    assert said in done.refusal
    assert not (tmp_path / "out").exists()
