"""Adapters are PEFT's own: plain PEFT loads them and computes the same. And what trains is right.

tests/test_grouped.py has the adapters of the experts against loops over tokens.
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
from deepseek_moe.training.arguments import FineTuningArguments, ModelArguments
from deepseek_moe.training.build import build_model
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
    """With adapters and saved modules that are off their beginnings."""
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
    """In logits, and merged by PEFT; both differ from the base."""
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


@pytest.mark.parametrize("rank", [1, 3, 5, 8])
@pytest.mark.parametrize("implementation", [experts.GROUPED, "eager"])
def test_plain_peft_computes_the_same(
    implementation: str, rank: int, tiny_model: MakeModel, tmp_path: Path
) -> None:
    model = trained(tiny_model(experts_implementation=implementation), rank=rank)
    same_as_plain_peft(model, lambda: tiny_model(experts_implementation="eager"), tmp_path)


@pytest.mark.parametrize(
    "names",
    [
        ["experts.gate_up_proj"],
        ["gate_up_proj"],
        ["experts.down_proj"],
        ["layers.2.mlp.experts.down_proj"],
        ["q_proj", "v_proj"],
        ["shared_experts.down_proj", "mlp.gate_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ],
    ids="-".join,
)
def test_some_projections(names: list[str], tiny_model: MakeModel, tmp_path: Path) -> None:
    same_as_plain_peft(trained(tiny_model(), names), tiny_model, tmp_path)


def test_with_modules_saved_whole(tiny_model: MakeModel, tmp_path: Path) -> None:
    model = trained(tiny_model(), modules_to_save=["lm_head", "embed_tokens"])
    trains = {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    root = "base_model.model"
    assert trains == {
        f"{root}.lm_head.modules_to_save.default.weight",
        f"{root}.model.embed_tokens.modules_to_save.default.weight",
    }
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
    model = add_lora(
        tiny_model(experts_implementation=experts.GROUPED), LINEARS, 3, 6.0, 0.2
    ).eval()
    assert torch.equal(logits(model), logits(tiny_model(experts_implementation=experts.GROUPED)))


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


def test_several_adapters_in_one_model(tiny_model: MakeModel, tmp_path: Path) -> None:
    """Each alone, both, and another loaded where dropout is at work."""
    other = trained(tiny_model(), rank=2)
    other.save_pretrained(tmp_path / "other")
    model = trained(tiny_model(), rank=3, dropout=0.5)
    model.save_pretrained(tmp_path / "first")
    plain = peft.PeftModel.from_pretrained(tiny_model(), tmp_path / "first")
    for one in (model, plain):
        one.load_adapter(tmp_path / "other", "other")
        one.eval()
    alone = logits(other)
    for active in (["default"], ["other"], ["default", "other"]):
        for one in (model, plain):
            one.base_model.set_adapter(active)
        torch.testing.assert_close(logits(model), logits(plain), atol=1e-4, rtol=1e-5)
        assert torch.allclose(logits(model), alone, atol=1e-4) == (active == ["other"])


def test_adapters_are_resumed_with_their_dropout(tiny_model: MakeModel, tmp_path: Path) -> None:
    """As Trainer does it: the saved numbers into a new model."""
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


def test_longer_names_mean_what_ends_in_them() -> None:
    for name in ("shared_experts.down_proj", "shared_experts.gate_proj", "mlp.down_proj"):
        assert targets([name]) == ([name], [])
    for name in ("experts.down_proj", "layers.1.mlp.experts.down_proj", "gate_up_proj"):
        assert targets([name]) == ([], [name])


@pytest.mark.parametrize("name", ["gate_proj", "up_proj"])
def test_half_of_a_stack_is_refused(name: str, tiny_model: MakeModel) -> None:
    for use in (lambda m, n: add_lora(m, n, 3, 6.0, 0.0), freeze_all_but):
        with pytest.raises(UserError, match="name both, or for the others only: shared_experts"):
            use(tiny_model(), [name, "down_proj"])
    assert add_lora(tiny_model(), [f"shared_experts.{name}"], 3, 6.0, 0.0)


def test_unknown_names_are_refused_with_what_there_is(tiny_model: MakeModel) -> None:
    message = "no module 'w1'; it has down_proj, embed_tokens, gate, gate_proj, gate_up_proj, input"
    with pytest.raises(UserError, match=message):
        add_lora(tiny_model(), ["q_proj", "w1"], 3, 6.0, 0.0)
    with pytest.raises(UserError, match=message):
        freeze_all_but(tiny_model(), ["w1"])
    with pytest.raises(UserError, match="no module 'head'"):
        add_lora(tiny_model(), ["q_proj"], 3, 6.0, 0.0, ["head"])
    with pytest.raises(UserError, match="no module 'proj'"):  # not the end of a name alone
        freeze_all_but(tiny_model(), ["proj"])


@pytest.mark.parametrize("name", ["gate", "experts", "mlp", "embed_tokens", "norm"])
def test_adapters_are_for_linears(name: str, tiny_model: MakeModel) -> None:
    with pytest.raises(UserError, match=f"^{name} is no linear layer.*--modules_to_save$"):
        add_lora(tiny_model(), ["q_proj", name], 3, 6.0, 0.0)


def test_numbers_that_no_adapter_has_are_refused(tiny_model: MakeModel) -> None:
    with pytest.raises(UserError, match="lora_rank is 0"):
        add_lora(tiny_model(), LINEARS, 0, 6.0, 0.0)
    for dropout in (-0.1, 1.0):
        with pytest.raises(UserError, match=f"lora_dropout is {dropout}"):
            add_lora(tiny_model(), LINEARS, 3, 6.0, dropout)


@pytest.mark.parametrize(
    ("names", "count"),
    [
        (["lm_head"], 1),
        (["lm_head", "embed_tokens"], 2),
        (["q_proj"], 3),
        (["gate"], 2),  # the router, and not gate_proj
        (["norm"], 1),  # the last, and not input_layernorm
        (["down_proj"], 5),  # of dense, shared and routed
        (LINEARS, 3 * 4 + 3 + 2 * (3 + 2)),
        (["experts.down_proj"], 2),
        (["experts"], 4),
        (["shared_experts"], 6),
        (["layers.2.mlp"], 6),
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


# ---- the table ----


def test_parameter_table_of_full_training(tiny_model: MakeModel) -> None:
    model = tiny_model()
    table = {kind: (total, trains) for kind, total, trains in parameter_table(model)}
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
    assert table == {kind: (count, count) for kind, count in wanted.items()}
    assert table["all"][0] == model.num_parameters()
    freeze_all_but(model, ["shared_experts", "gate"])
    trains = {kind: trains for kind, _, trains in parameter_table(model) if trains}
    expected = {kind: wanted[kind] for kind in ("shared experts", "router")}
    assert trains == expected | {"all": sum(expected.values())}


def test_parameter_table_of_adapters(tiny_model: MakeModel) -> None:
    before = {kind: total for kind, total, _ in parameter_table(tiny_model())}
    model = add_lora(tiny_model(), LINEARS, 3, 6.0, 0.0, ["lm_head"])
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
    table = {kind: (total, trains) for kind, total, trains in parameter_table(model)}
    assert table == {kind: (before[kind] + count, count) for kind, count in new.items()}
    dense = {kind for kind, _, _ in parameter_table(tiny_model(n_routed_experts=None))}
    assert dense == {"embedding and head", "attention", "dense layers", "norms", "all"}


# ---- building ----


@pytest.fixture
def base(tiny_model: MakeModel, tmp_path: Path) -> Path:
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def build(base: Path, bf16: bool, **options: Any) -> nn.Module:
    training = FineTuningArguments(
        output_dir=str(base.parent / "out"), bf16=bf16, use_cpu=True, report_to="none"
    )
    return build_model(base, ModelArguments(str(base), **options), training)


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_router_and_norms_stay_as_loaded(bits: int, bf16: bool, base: Path) -> None:
    """Neither wrapped, quantised nor cast; nor is every name with "gate" in it a router's."""
    model = build(base, bf16, use_lora=True, bits=bits, modules_to_save="lm_head")
    low = torch.bfloat16 if bf16 else torch.float32
    kept = {"gate.weight": 2, "layernorm.weight": 6, "model.norm.weight": 1}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32, name  # adapters, and what is saved whole
        elif bits == 16 or "_proj" not in name:
            assert parameter.dtype == low, name
        for ending in kept:
            if name.endswith(ending):
                assert name.count("base_layer") == name.count("modules_to_save") == 0
                kept[ending] -= 1
    assert not any(kept.values())
    dtype = {16: low, 8: torch.int8, 4: torch.uint8}[bits]
    gates = [
        p.dtype for n, p in model.named_parameters() if n.endswith("gate_proj.base_layer.weight")
    ]
    assert gates == [dtype] * 3
    assert {p.dtype for n, p in model.named_parameters() if n.endswith("gate_up_proj")} == {dtype}
    saved = dict(model.named_parameters())[
        "base_model.model.lm_head.modules_to_save.default.weight"
    ]
    assert saved.requires_grad
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model.train()(IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    assert loss.isfinite()
    assert saved.grad.any()


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("saved", ["shared_experts", "layers.0", "mlp", "experts", "gate"])
def test_what_is_saved_whole_is_not_quantised(saved: str, bits: int, base: Path) -> None:
    model = build(base, True, use_lora=True, bits=bits, trainable="k_proj", modules_to_save=saved)
    packed = {16: torch.bfloat16, 8: torch.int8, 4: torch.uint8}[bits]
    copies = {n: p for n, p in model.named_parameters() if ".modules_to_save." in n}
    frozen = {p.dtype for n, p in model.named_parameters() if ".original_module." in n}
    assert copies and all(f"{saved}." in name for name in copies)
    assert {p.dtype for p in copies.values()} == {torch.float32}
    assert frozen == {torch.bfloat16}
    [last, *_] = [p for n, p in model.named_parameters() if "layers.2.self_attn.k_proj.base" in n]
    assert last.dtype == packed
    with torch.autocast("cpu", torch.bfloat16):
        model.train()(IDS, labels=IDS, use_cache=False).loss.backward()
    assert all(parameter.grad.any() for parameter in copies.values())


@pytest.mark.parametrize(
    ("saved", "names", "message"),
    [
        ("q_proj", ["q_proj"], r"cannot be added: .*change --trainable or"),
        ("experts", LINEARS, r"cannot be added: .*change --trainable or"),
        ("mlp", LINEARS, "--modules_to_save mlp has in it what --trainable adapts"),
        ("layers.1", LINEARS, "--modules_to_save layers.1 has in it what --trainable adapts"),
        ("gate_up_proj", ["q_proj"], "--modules_to_save gate_up_proj is no module with weights"),
        ("rotary_emb", ["q_proj"], "--modules_to_save rotary_emb is no module with weights"),
        ("mlp,experts", ["q_proj"], r"means model.layers.1.mlp.experts twice; leave out"),
    ],
)
def test_what_cannot_be_saved_whole_is_one_line(
    saved: str, names: list[str], message: str, tiny_model: MakeModel
) -> None:
    with pytest.raises(UserError, match=message):
        add_lora(tiny_model(), names, 3, 6.0, 0.0, saved.split(","))


def test_a_module_without_parameters_is_refused(tiny_model: MakeModel) -> None:
    with pytest.raises(UserError, match="--trainable rotary_emb has no parameters"):
        freeze_all_but(tiny_model(), ["rotary_emb"])


def test_full_training_is_in_fp32(base: Path) -> None:
    model = build(base, True)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert all(p.requires_grad for p in model.parameters())
    chosen = build(base, True, trainable="lm_head")
    assert [n for n, p in chosen.named_parameters() if p.requires_grad] == ["lm_head.weight"]
    assert chosen.lm_head.weight.dtype == torch.float32
    frozen = {p.dtype for p in chosen.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16}
    assert model.config._experts_implementation == experts.GROUPED
