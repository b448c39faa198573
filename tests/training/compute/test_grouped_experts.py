"""The experts in training: adapters, autocast, checkpointing, and the balance loss of batches.

tests/model/test_experts.py compares them without adapters, when all weights train, with loops.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from adapter_fixtures import add_random_adapters
from peft import LoraConfig
from torch import nn

from deepseek_moe import DeepseekForCausalLM
from deepseek_moe.model.modeling_deepseek import DeepseekExperts, DeepseekGate
from deepseek_moe.training.compute import grouped_experts as experts
from deepseek_moe.training.examples import Collator
from deepseek_moe.training.quantized_base import Quantization
from deepseek_moe.training.trainable import EXPERT_PARAMETERS, add_lora

MakeModel = Callable[..., DeepseekForCausalLM]
E, D, WIDTH, TOKENS = 8, 32, 16, 11
IDS = torch.tensor([[0, 17, 5, 44, 80, 2, 91], [0, 3, 62, 9, 9, 31, 7]])
EXAMPLES = [[0, 17, 5, 44, 80], [0, 3, 62, 9, 9, 31, 7], [0, 12, 70, 1]]

ROUTINGS: dict[str, torch.Tensor] = {
    "spread": torch.stack([torch.randperm(E, generator=torch.Generator().manual_seed(t))[:3]
                           for t in range(TOKENS)]),
    "most_experts_without_tokens": torch.tensor([[2, 5]] * TOKENS),
    "skewed": torch.tensor([[7, 0]] * (TOKENS - 1) + [[3, 7]]),
    "one_expert": torch.tensor([[4]] * TOKENS),
    "last_expert_without_tokens": torch.tensor([[t % 7, (t + 1) % 7] for t in range(TOKENS)]),
}  # fmt: skip


def plain_experts(
    weights: dict[str, torch.Tensor],
    low_rank: dict[str, list[tuple[torch.Tensor, torch.Tensor, float]]],
    hidden: torch.Tensor,
    index: torch.Tensor,
    shares: torch.Tensor,
) -> torch.Tensor:
    """One token and one pick after the other, with W_e + scaling B_e A_e written out.

    Of an A [E*R, I] expert e has rows e*R to e*R + R - 1; of a B [O, R*E] columns e, E + e, ...
    """

    def weight(name: str, e: int) -> torch.Tensor:
        w = weights[name][e]
        for a, b, scaling in low_rank.get(name, ()):
            rank = a.shape[0] // E
            for r in range(rank):
                w = w + scaling * torch.outer(b[:, r * E + e], a[e * rank + r])
        return w

    rows = []
    for t, x in enumerate(hidden):
        row = torch.zeros_like(x)
        for k, e in enumerate(index[t].tolist()):
            gate_up = weight("gate_up_proj", e) @ x
            gate, up = gate_up[:WIDTH], gate_up[WIDTH:]
            opened = gate / (1 + torch.exp(-gate)) * up
            row = row + shares[t, k] * (weight("down_proj", e) @ opened)
        rows.append(row)
    return torch.stack(rows)


@pytest.fixture
def adapted(tiny_model: MakeModel) -> Callable[..., nn.Module]:
    """Makes the experts of a layer with random adapters, one of each rank, all of them active."""

    def make(*ranks: int, names: Sequence[str] = EXPERT_PARAMETERS) -> nn.Module:
        options = {"moe_intermediate_size": WIDTH, "experts_implementation": experts.GROUPED}
        model = tiny_model(**options)
        torch.manual_seed(3)
        model = add_lora(model, names, ranks[0], 6.0, 0.0)
        for rank in ranks[1:]:
            fields = {"target_modules": [], "target_parameters": list(names)}
            model.add_adapter(f"rank_{rank}", LoraConfig(r=rank, lora_alpha=9, **fields))
        model.base_model.set_adapter(list(model.peft_config))
        wrapper = model.base_model.model.model.layers[1].mlp.experts
        for name, parameter in wrapper.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.3)
        return wrapper

    return make


def factors(wrapper: nn.Module) -> dict[str, list[tuple[nn.Parameter, nn.Parameter, float]]]:
    """By stack: lora_A, lora_B and scaling of each adapter."""
    found: dict[str, list[Any]] = {}
    while not isinstance(wrapper, DeepseekExperts):
        found[wrapper.parameter_name] = [
            (wrapper.lora_A[name].weight, wrapper.lora_B[name].weight, wrapper.scaling[name])
            for name in wrapper.lora_A
        ]
        wrapper = wrapper.base_layer
    return found


def same_as_plain(model: nn.Module, index: torch.Tensor) -> None:
    """Output and every gradient of adapters, hidden states and router weights."""
    torch.manual_seed(4)
    hidden = torch.randn(TOKENS, D, requires_grad=True)
    shares = torch.rand(index.shape, requires_grad=True)
    probe = torch.randn(TOKENS, D)
    low_rank = factors(model)
    base = model.get_base_layer()
    leaves = [
        hidden,
        shares,
        *(x for some in low_rank.values() for a, b, _ in some for x in (a, b)),
    ]
    exact = {id(x): x.detach().double().requires_grad_() for x in leaves}

    want = plain_experts(
        {name: getattr(base, name).detach().double() for name in ("gate_up_proj", "down_proj")},
        {
            name: [(exact[id(a)], exact[id(b)], scaling) for a, b, scaling in some]
            for name, some in low_rank.items()
        },
        exact[id(hidden)],
        index,
        exact[id(shares)],
    )
    (want * probe).sum().backward()
    have = model(hidden, index, shares)
    (have * probe).sum().backward()

    torch.testing.assert_close(have.double(), want, atol=1e-4, rtol=1e-5)
    for leaf in leaves:
        wanted = exact[id(leaf)].grad
        scale = max(1.0, wanted.abs().max().item())
        assert wanted.any()
        assert (leaf.grad - wanted).abs().max() <= 1e-5 * scale, tuple(leaf.shape)
    assert all(p.grad is None for p in base.parameters())


@pytest.mark.parametrize("rank", [1, 3, 5, 8])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_adapters_equal_the_sum_written_out(
    routing: str, rank: int, adapted: Callable[..., nn.Module]
) -> None:
    same_as_plain(adapted(rank), ROUTINGS[routing])


@pytest.mark.parametrize("name", EXPERT_PARAMETERS)
def test_one_adapted_stack_of_the_two(name: str, adapted: Callable[..., nn.Module]) -> None:
    model = adapted(3, names=[name])
    assert factors(model).keys() == {name.rpartition(".")[-1]}
    same_as_plain(model, ROUTINGS["spread"])


def test_several_active_adapters_are_summed(adapted: Callable[..., nn.Module]) -> None:
    model = adapted(3, 2)
    assert [len(some) for some in factors(model).values()] == [2, 2]
    same_as_plain(model, ROUTINGS["spread"])


@pytest.mark.parametrize("name", EXPERT_PARAMETERS)
def test_lora_b_has_the_experts_fastest(name: str, adapted: Callable[..., nn.Module]) -> None:
    """Expert 5's columns of B change the tokens that go to expert 5, and no others."""
    model, index = adapted(3, names=[name]), ROUTINGS["spread"]
    [[(_, b, _)]] = factors(model).values()
    with torch.no_grad():
        b[:, torch.arange(b.shape[1]) % E != 5] = 0.0
        args = torch.randn(TOKENS, D), index, torch.ones(index.shape)
        changed = (model(*args) - model.get_base_layer()(*args)).abs().amax(dim=1) > 1e-3
    assert changed.tolist() == (index == 5).any(dim=1).tolist()
    assert changed.any()
    assert not changed.all()


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_aligned_as_gpus_want_them(
    dtype: torch.dtype,
    rank: int,
    adapted: Callable[..., nn.Module],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """GPUs take only operands whose rows, or columns, are side by side and whole 16 bytes; CPUs
    take any."""
    calls, plain = [], torch.nn.functional.grouped_mm

    def checked(x: torch.Tensor, weight: torch.Tensor, **options: Any) -> torch.Tensor:
        for one in (x, weight):
            near, far = sorted(one.stride()[-2:])
            assert near == 1
            assert far * one.element_size() % 16 == 0
        calls.append(x.dtype)
        return plain(x, weight, **options)

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", checked)
    index = ROUTINGS["spread"]
    hidden = torch.randn(TOKENS, D, requires_grad=True)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        adapted(rank)(hidden, index, torch.ones(index.shape)).sum().backward()
    # Forward, the base and A and B of two stacks; backward, two products for each adapter's factor
    # and one for the input of each base.
    assert calls == [dtype] * (6 + 8 + 2)


@pytest.mark.parametrize("adapters", [False, True])
def test_training_under_autocast_is_close_to_fp32(adapters: bool, tiny_model: MakeModel) -> None:
    """Whole models: frozen weights with adapters, or all weights trained."""
    found = []
    for enabled in (False, True):
        model = tiny_model(experts_implementation=experts.GROUPED, initializer_range=0.1)
        if adapters:
            model = add_random_adapters(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model.train()(IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads.values())
        found.append((loss.detach(), torch.cat([g.flatten() for g in grads.values()])))
    (loss, grad), (low_loss, low_grad) = found
    assert not torch.equal(loss, low_loss)  # else autocast did nothing
    torch.testing.assert_close(low_loss, loss, atol=0.05, rtol=0.01)
    assert torch.cosine_similarity(grad, low_grad, dim=0) > 0.98


# ---- gradient checkpointing ----


def gradients(model: nn.Module, **inputs: Any) -> dict[str, torch.Tensor]:
    """The gradients of a training step's loss, or without `labels` of the balance loss alone."""
    model.zero_grad()
    out = model.train()(use_cache=False, **inputs)
    (out.logits.sum() * 0 if out.loss is None else out.loss).backward()
    found = model.named_parameters()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in found}


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert any(gradient.any() for gradient in wanted.values())
    for name, gradient in wanted.items():
        scale = max(1.0, gradient.abs().max().item())
        assert (found[name] - gradient).abs().max() <= 1e-5 * scale, name


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("bits", [16, 4])
def test_checkpointing_changes_no_gradient(
    bits: int, dropout: float, tiny_model: MakeModel
) -> None:
    model = tiny_model(experts_implementation=experts.GROUPED)
    if bits == 4:
        quantise_experts(model)
    model = add_random_adapters(model, dropout=dropout)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(7)  # of the dropout
        found.append(gradients(model, input_ids=IDS, labels=IDS))
    same(found[1], found[0])


def quantise_experts(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, DeepseekExperts):
            for name in ("gate_up_proj", "down_proj"):
                weight = getattr(module, name).data
                setattr(module, name, Quantization(4, dtype="float32").quantize(weight))


@pytest.mark.parametrize("adapters", [False, True])
def test_recomputed_routing_keeps_its_picks(adapters: bool, tiny_model: MakeModel) -> None:
    """The router is turned round between the passes, so that choosing again would choose others."""
    model = tiny_model(experts_implementation=experts.GROUPED)
    if adapters:
        model = add_random_adapters(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    gates = [module for module in model.modules() if isinstance(module, DeepseekGate)]
    picks: list[list[torch.Tensor]] = [[] for _ in gates]
    for gate, seen in zip(gates, picks, strict=True):
        gate.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out[2]))
    loss = model.train()(IDS, labels=IDS, use_cache=False).loss
    for gate in gates:
        gate.weight.data.neg_()
    loss.backward()
    for first, again in picks:
        assert torch.equal(first, again)


# ---- the balance loss of padded and packed rows, and of parts of a step ----


def batch_of(examples: list[list[int]], packing: bool) -> dict[str, torch.Tensor]:
    """Examples as rows with padding, or packed into two rows: all but the last, and the last."""
    rows = [examples[:-1], examples[-1:]] if packing else [[example] for example in examples]
    features = []
    for row in filter(None, rows):
        ids, lengths = [i for example in row for i in example], [len(example) for example in row]
        trained = [k > 0 for length in lengths for k in range(length)]
        row = {"input_ids": ids, "length": len(ids), "trained": trained, "lengths": lengths}
        features.append(row | {"sources": ["here"] * len(lengths)})
    batch = Collator(pad_token_id=1, packing=packing)(features)
    wanted = ("input_ids", "labels", "sequence_ids", "position_ids")
    return {name: batch[name] for name in wanted if name in batch}


both_layouts = pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])


@both_layouts
def test_each_example_counts_by_itself_in_the_balance_loss(
    packing: bool, tiny_model: MakeModel
) -> None:
    model = tiny_model(experts_implementation=experts.GROUPED)
    alone = [gradients(model, input_ids=torch.tensor([example])) for example in EXAMPLES]
    wanted = {name: sum(some[name] for some in alone) / len(alone) for name in alone[0]}
    assert wanted["model.layers.1.mlp.gate.weight"].abs().max() > 1e-3
    batch = batch_of(EXAMPLES, packing)
    del batch["labels"]
    same(gradients(model, **batch), wanted)

    model.train()
    losses = [model(torch.tensor([example]), use_cache=False).aux_loss for example in EXAMPLES]
    have = model(**batch, use_cache=False).aux_loss
    torch.testing.assert_close(have, sum(losses) / len(losses))
    rows_as_sequences = batch | {"sequence_ids": None}
    assert (model(**rows_as_sequences, use_cache=False).aux_loss - have).abs() > 1e-3


def test_padding_is_left_out_of_the_balance_loss_over_all_tokens(tiny_model: MakeModel) -> None:
    model = tiny_model(seq_aux=False).train()
    batch = batch_of(EXAMPLES, packing=True)
    have = model(**batch, use_cache=False).aux_loss
    other = batch["input_ids"].clone()
    other[batch["sequence_ids"] < 0] = 50
    torch.testing.assert_close(
        model(**batch | {"input_ids": other}, use_cache=False).aux_loss, have
    )


def test_aux_loss_scale_multiplies_the_balance_gradient_alone(tiny_model: MakeModel) -> None:
    model = tiny_model()
    scaled = {
        scale: gradients(model, input_ids=IDS, labels=IDS, aux_loss_scale=scale)
        for scale in (0.0, 1.0, 0.25)
    }
    same(scaled[0.0], gradients(tiny_model(aux_loss_alpha=0.0), input_ids=IDS, labels=IDS))
    quarter = {name: g + (scaled[1.0][name] - g) / 4 for name, g in scaled[0.0].items()}
    same(scaled[0.25], quarter)
    router = "model.layers.2.mlp.gate.weight"
    assert (scaled[1.0][router] - scaled[0.0][router]).abs().max() > 1e-3


@both_layouts
def test_micro_batches_add_up_to_the_big_batch(packing: bool, tiny_model: MakeModel) -> None:
    model = add_random_adapters(tiny_model(experts_implementation=experts.GROUPED))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or "mlp.gate." in name)
    tokens = sum(len(example) - 1 for example in EXAMPLES)

    def part(examples: list[list[int]]) -> dict[str, torch.Tensor]:
        inputs = batch_of(examples, packing)
        share = len(examples) / len(EXAMPLES)
        return gradients(model, **inputs, aux_loss_scale=share, num_items_in_batch=tokens)

    parts = [part(EXAMPLES[:2]), part(EXAMPLES[2:])]
    same({name: sum(some[name] for some in parts) for name in parts[0]}, part(EXAMPLES))
