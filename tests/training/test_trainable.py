"""Adapters are PEFT's own: plain PEFT loads them and computes the same. And what trains is right.

compute/test_grouped_experts.py compares the adapters of experts with loops over tokens.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from deepseek_moe import DeepseekForCausalLM
from deepseek_moe.errors import UserError
from deepseek_moe.training import expert_lora
from deepseek_moe.training.compute import grouped_experts as experts
from deepseek_moe.training.trainable import (
    EXPERT_PARAMETERS,
    add_lora,
    freeze_all_but,
    parameter_table,
    targets,
)

peft = pytest.importorskip("peft", reason="adapters are PEFT's: pip install peft")

from peft.tuners.lora.layer import ParamWrapper  # noqa: E402

MakeModel = Callable[..., DeepseekForCausalLM]
LINEARS = [f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")]
IDS = torch.tensor([[0, 17, 5, 44, 80, 2, 91], [0, 3, 62, 9, 9, 31, 7]])


def trained(model: nn.Module, names: list[str] = LINEARS, rank: int = 3, **options: Any) -> Any:
    """`model` with adapters and saved modules that have moved from where they begin."""
    torch.manual_seed(1)
    model = add_lora(model, names, rank, 5.0, options.pop("dropout", 0.0), **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(IDS, use_cache=False).logits


def same_as_plain_peft(model: Any, fresh: Callable[[], nn.Module], folder: Path) -> None:
    """Compares `model` with plain PEFT in logits and merged weights; both differ from the base."""
    model.save_pretrained(folder)
    plain = peft.PeftModel.from_pretrained(fresh(), folder)
    wrappers = [m for m in plain.modules() if isinstance(m, ParamWrapper)]
    assert all(type(m) is ParamWrapper for m in wrappers)
    ours = [m for m in model.modules() if isinstance(m, ParamWrapper)]
    assert len(wrappers) == len(ours)
    assert all(type(m) is expert_lora.ParamWrapper for m in ours)
    wanted = logits(plain)
    assert (wanted - logits(fresh())).abs().max() > 0.05
    torch.testing.assert_close(logits(model), wanted, atol=1e-4, rtol=1e-5)
    merged = plain.merge_and_unload()
    torch.testing.assert_close(logits(merged), wanted, atol=1e-4, rtol=1e-5)
    found = dict(model.merge_and_unload().named_parameters())
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(found.pop(name), parameter, msg=name)
    assert not found


@pytest.mark.parametrize(
    ("implementation", "rank"), [(experts.GROUPED, 1), (experts.GROUPED, 5), ("eager", 8)]
)
def test_plain_peft_computes_the_same(
    implementation: str, rank: int, tiny_model: MakeModel, tmp_path: Path
) -> None:
    model = trained(tiny_model(experts_implementation=implementation), rank=rank)
    same_as_plain_peft(model, lambda: tiny_model(experts_implementation="eager"), tmp_path)


@pytest.mark.parametrize(
    "names",
    [
        ["gate_up_proj"],
        ["layers.2.mlp.experts.down_proj"],
        ["shared_experts.down_proj", "mlp.gate_proj"],
        ["gate_proj", "up_proj"],
    ],
    ids="-".join,
)
def test_plain_peft_agrees_on_some_projections(
    names: list[str], tiny_model: MakeModel, tmp_path: Path
) -> None:
    same_as_plain_peft(trained(tiny_model(), names), tiny_model, tmp_path)


def test_modules_saved_whole_train_beside_the_adapters(
    tiny_model: MakeModel, tmp_path: Path
) -> None:
    model = trained(tiny_model(), modules_to_save=["lm_head", "embed_tokens"])
    trains = {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    names = ("lm_head", "model.embed_tokens")
    assert trains == {f"base_model.model.{n}.modules_to_save.default.weight" for n in names}
    same_as_plain_peft(model, tiny_model, tmp_path)


def test_nothing_but_adapters_trains_by_default(tiny_model: MakeModel) -> None:
    model = add_lora(tiny_model(), LINEARS, 3, 6.0, 0.0)
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model.train()(IDS, labels=IDS, use_cache=False).loss.backward()
        optimizer.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if "lora_" in n}
    assert len(changed) == 2 * (3 * 4 + 3 + 2 * (3 + 2))  # attention; dense; shared and routed


def test_new_adapters_change_nothing(tiny_model: MakeModel) -> None:
    grouped = {"experts_implementation": experts.GROUPED}
    model = add_lora(tiny_model(**grouped), LINEARS, 3, 6.0, 0.2).eval()
    assert torch.equal(logits(model), logits(tiny_model(**grouped)))


def test_disabled_adapters_leave_the_base(tiny_model: MakeModel) -> None:
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


def test_adapters_are_resumed_with_their_dropout(tiny_model: MakeModel, tmp_path: Path) -> None:
    """Trainer loads the saved numbers into a new model."""
    model = trained(tiny_model(), dropout=0.3)
    model.save_pretrained(tmp_path)
    again = add_lora(tiny_model(), LINEARS, 3, 5.0, 0.3)
    again.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(logits(again.eval()), logits(model))
    probabilities = {m.p for m in again.modules() if isinstance(m, nn.Dropout)}
    assert probabilities == {0.3}
    assert any(p.requires_grad for p in again.parameters())


# ---- dropout ----


def test_dropout_is_not_in_the_saved_config(tiny_model: MakeModel, tmp_path: Path) -> None:
    model = trained(tiny_model(), dropout=0.25)
    drops = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    drops += [m.dropout_p for m in model.modules() if isinstance(m, ParamWrapper)]
    assert drops == [0.25] * (3 * 4 + 3 + 2 * (3 + 2))
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["lora_dropout"] == 0.0
    assert saved["r"] == 3
    assert saved["lora_alpha"] == 5.0
    assert saved["target_parameters"] == sorted(EXPERT_PARAMETERS)
    same_as_plain_peft(model, tiny_model, tmp_path)


def test_experts_drop_out_in_training_only(tiny_model: MakeModel) -> None:
    model = trained(tiny_model(), EXPERT_PARAMETERS, dropout=0.5)
    for wrapper in (m for m in model.modules() if isinstance(m, ParamWrapper)):
        assert [wrapper.train(mode).low_rank().dropout for mode in (True, False)] == [0.5, 0.0]


# ---- what is named ----


def test_gate_up_and_down_mean_the_experts_too() -> None:
    assert targets(LINEARS) == (LINEARS, sorted(EXPERT_PARAMETERS))
    assert targets(["down_proj"]) == (["down_proj"], ["experts.down_proj"])
    assert targets(["gate_proj", "up_proj"])[1] == ["experts.gate_up_proj"]
    assert targets(["q_proj"]) == (["q_proj"], [])
    # A longer name means what ends in it.
    for name in ("shared_experts.down_proj", "shared_experts.gate_proj", "mlp.down_proj"):
        assert targets([name]) == ([name], [])
    for name in ("experts.down_proj", "layers.1.mlp.experts.down_proj", "gate_up_proj"):
        assert targets([name]) == ([], [name])


@pytest.mark.parametrize(
    ("names", "count"),
    [
        (["lm_head", "embed_tokens"], 2),
        (["gate"], 2),  # the router, and not gate_proj
        (["norm"], 1),  # the last, and not input_layernorm
        (["down_proj"], 5),  # of dense, shared and routed
        (LINEARS, 3 * 4 + 3 + 2 * (3 + 2)),
        (["experts.down_proj"], 2),
        (["shared_experts"], 6),
        (["layers.2"], 12),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, list) else str(x),
)
def test_chosen_modules_train_and_no_others(
    names: list[str], count: int, tiny_model: MakeModel
) -> None:
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
        (["gate_proj", "down_proj"], {}, HALF),
        (["up_proj"], {}, HALF),
        (["q_proj", "w1"], {}, UNKNOWN),
        (["gate"], {}, f"^gate is no linear layer.*{SAVED}$"),
        (["experts"], {}, "^experts is no linear layer"),
        (["embed_tokens"], {}, "^embed_tokens is no linear layer"),
        (LINEARS, {"rank": 0}, "lora_rank is 0"),
        (LINEARS, {"dropout": -0.1}, "lora_dropout is -0.1"),
        (LINEARS, {"dropout": 1.0}, "lora_dropout is 1.0"),
        (["q_proj"], {"modules_to_save": ["head"]}, "no module 'head'"),
        (["q_proj"], {"modules_to_save": ["gate_up_proj"]}, f"{SAVED} gate_up_proj is no module"),
        (["q_proj"], {"modules_to_save": ["rotary_emb"]}, f"{SAVED} rotary_emb is no module with"),
        (["q_proj"], {"modules_to_save": ["mlp", "experts"]}, "model.layers.1.mlp.experts twice"),
        (LINEARS, {"modules_to_save": ["experts"]}, "cannot be added: .*change --trainable or"),
        (
            LINEARS,
            {"modules_to_save": ["layers.1"]},
            f"{SAVED} layers.1 has in it what --trainable",
        ),
    ],
)
def test_adapters_that_cannot_be_are_refused(
    names: list[str], changes: dict[str, Any], message: str, tiny_model: MakeModel
) -> None:
    values = {"rank": 3, "alpha": 6.0, "dropout": 0.0} | changes
    with pytest.raises(UserError, match=message):
        add_lora(tiny_model(), names, **values)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gate_proj", HALF),
        ("w1", UNKNOWN),
        ("proj", "no module 'proj'"),  # Only the end of a part of a name.
        ("rotary_emb", "--trainable rotary_emb has no parameters"),
    ],
)
def test_modules_that_cannot_train_are_refused(
    name: str, message: str, tiny_model: MakeModel
) -> None:
    with pytest.raises(UserError, match=message):
        freeze_all_but(tiny_model(), [name])


# ---- the table ----


def table_of(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {kind: (total, trains) for kind, total, trains in parameter_table(model)}


def test_the_table_counts_what_there_is_and_what_trains(tiny_model: MakeModel) -> None:
    model = tiny_model()
    wanted = {
        "embedding and head": 2 * 96 * 32,
        "attention": 3 * 4 * 32 * 32,
        "routed experts": 2 * 8 * 3 * 8 * 32,
        "shared experts": 2 * 3 * 16 * 32,
        "router": 2 * 8 * 32,
        "dense layers": 3 * 32 * 32,
        "norms": 7 * 32,
    }
    wanted["all"] = sum(wanted.values())
    assert table_of(model) == {kind: (count, count) for kind, count in wanted.items()}
    assert wanted["all"] == model.num_parameters()
    freeze_all_but(model, ["shared_experts", "gate"])
    trains = {kind: trains for kind, (_, trains) in table_of(model).items() if trains}
    expected = {kind: wanted[kind] for kind in ("shared experts", "router")}
    assert trains == expected | {"all": sum(expected.values())}


def test_the_table_counts_adapters(tiny_model: MakeModel) -> None:
    before = table_of(tiny_model())
    new = {
        "embedding and head": 96 * 32,
        "attention": 3 * 4 * 3 * (32 + 32),
        "routed experts": 2 * 8 * 3 * ((32 + 16) + (8 + 32)),
        "shared experts": 2 * 3 * 3 * (32 + 16),
        "router": 0,
        "dense layers": 3 * 3 * (32 + 32),
        "norms": 0,
    }
    new["all"] = sum(new.values())
    table = table_of(add_lora(tiny_model(), LINEARS, 3, 6.0, 0.0, ["lm_head"]))
    assert table == {kind: (before[kind][0] + count, count) for kind, count in new.items()}
    dense = {"embedding and head", "attention", "dense layers", "norms", "all"}
    assert table_of(tiny_model(n_routed_experts=None)).keys() == dense
