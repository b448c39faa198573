"""LoRA on chosen experts: what it computes, keeps, saves, and goes on from."""

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_fixtures import IDS, add_random_adapters, load, tensors_in
from finetune_fixtures import assert_same, forbid_loading, logged, run, succeed, weights
from peft import PeftModel

from deepseek_moe.errors import UserError
from deepseek_moe.experts.choose import CHOICE_FILE, choice_as_text
from deepseek_moe.training.arguments import FineTuningArguments, ModelArguments
from deepseek_moe.training.build import build_model
from deepseek_moe.training.expert_lora import with_all_experts
from deepseek_moe.training.merge_lora import merge_into, merged_tensors
from deepseek_moe.training.trainable import add_lora

MakeArgv = Callable[..., list[str]]
CHOSEN = {1: [0, 3, 7], 2: [5]}
STACKS = "experts.gate_up_proj,experts.down_proj"
LORA = {"use_lora": True, "lora_rank": 3, "lora_dropout": 0.1}
E, R = 8, 3


def is_factor(name: str) -> bool:
    return ".experts." in name and ".lora_" in name


def of_others(name: str, factor: torch.Tensor) -> torch.Tensor:
    """Where a lora_A or lora_B of all experts belongs to one that is not chosen."""
    layer, mask = int(name.split("layers.")[1].split(".")[0]), torch.zeros(factor.shape).bool()
    others = [one for one in range(E) if one not in CHOSEN.get(layer, ())]
    if "lora_A" in name:
        mask.unflatten(0, (E, -1))[others] = True
    else:
        mask.unflatten(1, (-1, E))[..., others] = True
    return mask


def zero_others(gradient: torch.Tensor, name: str) -> torch.Tensor:
    return gradient.masked_fill(of_others(name, gradient), 0)


def hook_others(model: torch.nn.Module) -> None:
    """Lets adapters of all experts train with gradients of the chosen ones only."""
    for name, parameter in model.named_parameters():
        if is_factor(name):
            parameter.register_hook(partial(zero_others, name=name))


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
def test_it_equals_all_adapters_without_the_other_gradients(
    options, checkpointing, tiny_model, tmp_path
):
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
            kept = zero_others(kept, name)
        assert factor.abs().max() > 0
        torch.testing.assert_close(factor, kept, rtol=0, atol=1e-6)


def test_a_layer_without_chosen_experts_has_no_adapter(tiny_model):
    model = add_random_adapters(tiny_model(), [], chosen={2: [1, 6]})
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(names) == 4 and all("layers.2.mlp.experts." in name for name in names)


def test_routed_experts_beside_chosen_ones_are_refused(tiny_model):
    for name in ("experts", "mlp.experts.down_proj", "gate_up_proj"):
        with pytest.raises(UserError, match=f"--trainable {name} means routed experts"):
            add_lora(tiny_model(), ["q_proj", name], 3, 6.0, 0.0, chosen=CHOSEN)
    adapted = add_lora(tiny_model(), ["gate_proj", "down_proj"], 3, 6.0, 0.0, chosen=CHOSEN)
    linears = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert sum("mlp.experts" in name for name in linears) == 8
    assert sum("shared_experts" in name for name in linears) == 8


@pytest.fixture(scope="module")
def command(argv: MakeArgv, place: Path) -> MakeArgv:
    """Makes a command of 6 steps in fp32, saved after the third and the last."""
    (place / "my_experts.json").write_text(choice_as_text(CHOSEN))
    plain = LORA | {"train_experts": "my_experts.json", "max_steps": 6}
    return lambda output, **changes: argv(output, **(plain | changes))


@pytest.fixture(scope="module")
def finished(place: Path, command: MakeArgv) -> Path:
    succeed(command(place / "finished"), place / "log")
    return place / "finished"


def test_what_is_saved_is_an_adapter_of_peft(place, finished):
    tensors = weights(finished)
    assert len(tensors) == 8
    for name, factor in tensors.items():
        assert factor.any() and not factor[of_others(name, factor)].any(), name
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


def test_a_repeat_with_other_experts_is_refused(finished, command, tmp_path):
    """Only the choice itself counts, and not the name of its file."""
    for name, chosen in (("moved", CHOSEN), ("other", CHOSEN | {2: [4]})):
        (tmp_path / name).write_text(choice_as_text(chosen))
    succeed(command(finished, train_experts=tmp_path / "moved"), tmp_path / "log")
    other = run(command(finished, train_experts=tmp_path / "other"), tmp_path / "log")
    assert "other train experts" in other.refusal


def test_the_states_of_the_optimizer_are_of_chosen_experts_only(finished):
    states = torch.load(finished / "checkpoint-3" / "optimizer.pt", weights_only=True)["state"]
    sizes = {"gate_up_proj": (32, 16), "down_proj": (8, 32)}  # in, out
    wanted = [
        shape
        for width, out in sizes.values()
        for some in CHOSEN.values()
        for shape in ((len(some) * R, width), (out, len(some) * R))
    ]
    assert sorted(tuple(one["exp_avg"].shape) for one in states.values()) == sorted(wanted)


def test_an_adapter_goes_on_with_its_experts(place, finished, argv, tmp_path):
    more = {"use_lora": True, "lora_dropout": 0, "adapter": finished, "max_steps": 2}
    succeed(argv(tmp_path / "still", **more, learning_rate=0), tmp_path / "log")
    assert_same(tmp_path / "still", finished)
    succeed(argv(tmp_path / "on", **more), tmp_path / "log")
    for name, factor in weights(tmp_path / "on").items():
        assert not torch.equal(factor, weights(finished)[name])
        assert not factor[of_others(name, factor)].any(), name
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


def test_it_works_with_all_that_a_run_may_have(place, command, tmp_path):
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


def test_the_dry_run_counts_the_chosen_experts(command, tmp_path):
    done = succeed(command(tmp_path / "out", dry_run=True), tmp_path / "log")
    [experts] = [line.split() for line in done.out.splitlines() if line.startswith("routed ")]
    in_and_out = 32 + 16 + 8 + 32  # of gate and up, and of down
    assert experts[3] == f"{4 * R * in_and_out:,}"
    assert "LoRA of rank 3 on 4 chosen experts" in done.out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"trainable": "experts"}, "--trainable experts means routed experts"),
        ({"train_experts": "nowhere.json"}, "nowhere.json cannot be read: No such file"),
    ],
)
def test_a_wrong_choice_is_refused(changes, said, command, tmp_path):
    """Before weights are loaded."""
    words = command(tmp_path / "out", **changes)
    assert said in run(words, tmp_path / "log", forbid_loading).refusal
    assert not (tmp_path / "out").exists()
