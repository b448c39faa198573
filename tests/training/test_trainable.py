"""Adapters are PEFT's own: plain PEFT loads them and computes the same. And what trains is right.

compute/test_grouped_experts.py compares the adapters of experts with loops over tokens.
"""

import json
from collections.abc import Sequence
from typing import Any

import peft
import pytest
import torch
from adapter_fixtures import LINEARS, move_what_trains
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from deepseek_moe.errors import UserError
from deepseek_moe.training import expert_lora
from deepseek_moe.training.arguments import ModelArguments
from deepseek_moe.training.compute import grouped_experts as experts
from deepseek_moe.training.parameter_counts import parameter_table
from deepseek_moe.training.trainable import (
    EXPERT_PARAMETERS,
    adapt,
    add_lora,
    freeze_all_but,
)

IDS = torch.tensor([[0, 17, 5, 44, 80, 2, 91], [0, 3, 62, 9, 9, 31, 7]])
ADAPTED = 3 * 4 + 3 + 2 * (3 + 2)  # attention; dense; shared and routed


def adapted(model: nn.Module, names: Sequence[str] = LINEARS, **changes: Any) -> peft.PeftModel:
    return add_lora(model, names, **({"rank": 3, "alpha": 5.0, "dropout": 0.0} | changes))


def trained(model: nn.Module, names: Sequence[str] = LINEARS, **changes: Any) -> peft.PeftModel:
    """`model` with adapters and saved modules that have moved from where they begin."""
    torch.manual_seed(1)
    return move_what_trains(adapted(model, names, **changes)).eval()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(IDS, use_cache=False).logits


def wrappers(model: nn.Module) -> list[ParamWrapper]:
    return [module for module in model.modules() if isinstance(module, ParamWrapper)]


@pytest.mark.parametrize(
    ("names", "changes"),
    [
        (LINEARS, {"rank": 1}),
        (LINEARS, {"rank": 5, "dropout": 0.25}),
        (["gate_up_proj"], {}),
        (["layers.2.mlp.experts.down_proj"], {}),
        (["shared_experts.down_proj", "mlp.gate_proj"], {}),
        (["gate_proj", "up_proj"], {}),
        (LINEARS, {"modules_to_save": ["lm_head", "embed_tokens"]}),
    ],
    ids=str,
)
def test_plain_peft_computes_the_same(names, changes, tiny_model, tmp_path):
    """In logits and in merged weights. Both differ from the base."""
    model = trained(tiny_model(experts_implementation=experts.GROUPED), names, **changes)
    model.save_pretrained(tmp_path)
    plain = peft.PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert [type(one) for one in wrappers(plain)] == [ParamWrapper] * len(wrappers(model))
    assert all(type(one) is expert_lora.ParamWrapper for one in wrappers(model))
    wanted = logits(plain)
    assert (wanted - logits(tiny_model())).abs().max() > 0.05
    torch.testing.assert_close(logits(model), wanted, atol=1e-4, rtol=1e-5)
    merged = plain.merge_and_unload()
    torch.testing.assert_close(logits(merged), wanted, atol=1e-4, rtol=1e-5)
    found = dict(model.merge_and_unload().named_parameters())
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(found.pop(name), parameter, msg=name)
    assert not found


def test_new_adapters_change_nothing_and_only_they_and_saved_modules_train(tiny_model):
    grouped = {"experts_implementation": experts.GROUPED}
    model = adapted(tiny_model(**grouped), dropout=0.2, modules_to_save=["lm_head"]).eval()
    assert torch.equal(logits(model), logits(tiny_model(**grouped)))
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # in the first step B is zero, and A has no gradient
        model.train()(IDS, labels=IDS, use_cache=False).loss.backward()
        optimizer.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    saved = {"base_model.model.lm_head.modules_to_save.default.weight"}
    assert changed == {n for n in before if "lora_" in n} | saved
    assert len(changed) == 2 * ADAPTED + 1


def test_disabled_adapters_leave_the_base(tiny_model):
    model, base = trained(tiny_model()), logits(tiny_model())
    on = logits(model)
    assert (on - base).abs().max() > 0.05
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), base, atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(model), on)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), on, atol=1e-4, rtol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), on, atol=1e-4, rtol=1e-5)


def test_dropout_is_in_a_resumed_run_but_not_in_the_saved_config(tiny_model, tmp_path):
    """Trainer loads the saved numbers into a new model. Plain PEFT refuses dropout on experts."""
    model = trained(tiny_model(), dropout=0.25)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["lora_dropout"], saved["r"], saved["lora_alpha"]) == (0.0, 3, 5.0)
    assert saved["target_parameters"] == sorted(EXPERT_PARAMETERS)
    again = adapted(tiny_model(), dropout=0.25)
    again.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(logits(again.eval()), logits(model))
    assert {one.low_rank().dropout for one in wrappers(again)} == {0.0}
    drops = [m.p for m in again.modules() if isinstance(m, nn.Dropout)]
    drops += [one.low_rank().dropout for one in wrappers(again.train())]
    assert drops == [0.25] * ADAPTED


@pytest.mark.parametrize(
    ("names", "count"),
    [
        (["lm_head", "embed_tokens"], 2),
        (["gate"], 2),  # the router, and not gate_proj
        (["norm"], 1),  # the last, and not input_layernorm
        (LINEARS, ADAPTED),
        (["gate_proj", "up_proj"], 2 + 2 * 2 + 2),  # dense; shared; the one stack of the routed
        (["down_proj"], 1 + 2 + 2),
        (["experts.down_proj"], 2),
        (["layers.1.mlp.experts.down_proj"], 1),  # all that end in it
        (["shared_experts.down_proj"], 2),
        (["shared_experts"], 6),
        (["layers.2"], 12),
    ],
    ids=str,
)
def test_chosen_modules_train_and_no_others(names, count, tiny_model):
    model = tiny_model(experts_implementation=experts.GROUPED)
    freeze_all_but(model, names)
    chosen = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(chosen) == count
    for name in chosen:
        assert any(f".{n}." in f".{name}." for n in [*names, "gate_up_proj"])
    model.train()(IDS, labels=IDS, use_cache=False).loss.backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == chosen


HALF = "name both, or for the others only: shared_experts"
UNKNOWN = "no module 'w1'; it has down_proj, embed_tokens, gate, gate_proj, gate_up_proj, input"
SAVED = "--modules_to_save"


@pytest.mark.parametrize(
    ("names", "changes", "message"),
    [
        ("gate_proj,down_proj", {}, HALF),
        ("q_proj,w1", {}, UNKNOWN),
        ("gate", {}, f"^gate is no linear layer.*{SAVED}$"),
        ("embed_tokens", {}, "^embed_tokens is no linear layer"),
        ("q_proj", {"lora_dropout": -0.1}, "lora_dropout is -0.1"),
        ("q_proj", {"lora_dropout": 1.0}, "lora_dropout is 1.0"),
        ("q_proj", {"modules_to_save": "head"}, "no module 'head'"),
        ("q_proj", {"modules_to_save": "gate_up_proj"}, f"{SAVED} gate_up_proj is no module"),
        ("q_proj", {"modules_to_save": "rotary_emb"}, f"{SAVED} rotary_emb is no module with"),
        ("q_proj", {"modules_to_save": "mlp,experts"}, "model.layers.1.mlp.experts twice"),
        (None, {"modules_to_save": "experts"}, "cannot be added: .*change --trainable or"),
        (None, {"modules_to_save": "layers.1"}, "layers.1 has in it what --trainable"),
        ("up_proj", {"use_lora": False}, HALF),
        ("w1", {"use_lora": False}, UNKNOWN),
        ("proj", {"use_lora": False}, "no module 'proj'"),  # Only the end of a part of a name.
        ("rotary_emb", {"use_lora": False}, "--trainable rotary_emb has no parameters"),
        ("weight", {"use_lora": False}, "--trainable weight has no parameters"),
    ],
    ids=str,
)
def test_what_cannot_train_is_refused(names, changes, message, tiny_model):
    options = ModelArguments(**({"use_lora": True, "trainable": names} | changes))
    with pytest.raises(UserError, match=message):
        adapt(tiny_model(), options)


def table_of(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {kind: (total, trains) for kind, total, trains in parameter_table(model)}


def test_the_table_counts_what_there_is_and_what_trains(tiny_model):
    model = tiny_model()
    there = {
        "embedding and head": 2 * 96 * 32,
        "attention": 3 * 4 * 32 * 32,
        "routed experts": 2 * 8 * 3 * 8 * 32,
        "shared experts": 2 * 3 * 16 * 32,
        "router": 2 * 8 * 32,
        "dense layers": 3 * 32 * 32,
        "norms": 7 * 32,
        "all": model.num_parameters(),
    }
    assert table_of(model) == {kind: (count, count) for kind, count in there.items()}
    freeze_all_but(model, ["shared_experts", "gate"])
    trains = {kind: trains for kind, (_, trains) in table_of(model).items() if trains}
    chosen = {kind: there[kind] for kind in ("shared experts", "router")}
    assert trains == chosen | {"all": sum(chosen.values())}

    table = table_of(adapted(tiny_model(), modules_to_save=["lm_head"]))
    new = {
        "embedding and head": 96 * 32,
        "attention": 3 * 4 * 3 * (32 + 32),
        "routed experts": 2 * 8 * 3 * ((32 + 16) + (8 + 32)),
        "router": 0,
    }
    assert {kind: table[kind] for kind in new} == {k: (there[k] + n, n) for k, n in new.items()}
    dense = {"embedding and head", "attention", "dense layers", "norms", "all"}
    assert table_of(tiny_model(n_routed_experts=None)).keys() == dense
