"""The experts in training: what they compute, keep and repeat, alone and in whole models.

Here they take the plain twins of their kernels. tests/kernels compares those with the kernels, and
tests/gpu/test_training.py the two ways through all experts.
"""

from functools import partial
from typing import Any

import pytest
import torch
from adapter_fixtures import add_random_adapters
from expert_fixtures import ROUTINGS, ExpertLayer
from peft import LoraConfig
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from deepseek_moe import DeepseekForCausalLM
from deepseek_moe.bundled import BUNDLED_MODEL
from deepseek_moe.checkpoint import own_tokenizer
from deepseek_moe.errors import UserError
from deepseek_moe.kernels.training import torch_ops
from deepseek_moe.model.layout import EXPERT_STACKS
from deepseek_moe.training.compute.grouped_experts import GROUPED, grouped_experts_forward, new_seed
from deepseek_moe.training.trainable import EXPERT_PARAMETERS

IDS = torch.tensor([[0, 17, 5, 44, 80, 2, 91], [0, 3, 62, 9, 9, 31, 7]])
BOTH = tuple(EXPERT_STACKS)
KINDS: dict[str, dict[str, Any]] = {
    "all weights": {"trained": True},
    "three experts": {"chosen": 3},
    "one expert over 4 bits": {"chosen": 1, "bits": 4},
    "all experts, chosen, over 8 bits": {"chosen": 16, "bits": 8},
    "frozen": {},
    "adapters": {"adapted": BOTH},
    "adapters of rank 1 and dropout": {"adapted": BOTH, "rank": 1, "dropout": 0.4},
    "adapter of gate and up over 8 bits": {"adapted": BOTH[:1], "rank": 8, "bits": 8},
    "adapter of down over 4 bits": {"adapted": BOTH[1:], "bits": 4},
    "adapters with dropout over 4 bits": {"adapted": BOTH, "bits": 4, "dropout": 0.4},
}


def written_out(
    experts: Any,
    hidden_TD: torch.Tensor,
    index_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    adapters: dict[str, Any],
) -> torch.Tensor:
    """One token and one pick after the other.

    Only inputs of adapters drop out: of a token before A of gate and up, of a pick before down's A.
    """
    up, low = (adapters.get(name) for name in BOTH)
    dropped_TD, E = hidden_TD, experts.num_experts
    kept_NF = torch.ones(index_TK.numel(), experts.down_proj.shape[-1])
    if up and up.dropout:
        dropped_TD = torch_ops.drop_out(hidden_TD, up.dropout, new_seed(hidden_TD.device))
    if low and low.dropout:
        seed = new_seed(hidden_TD.device)
        # What the kernel itself drops of numbers that are all alike.
        args = kept_NF.repeat(1, 2) * 100.0, None, torch.ones(len(kept_NF)), low.dropout, seed
        kept_NF = torch.div(*reversed(torch_ops.weighted_swiglu(*args)))
    place_TK = torch_ops.sort_picks(index_TK.int(), E)[1]
    rows = []
    for t, picks in enumerate(index_TK.tolist()):
        row = hidden_TD[t] * 0.0
        for k, e in enumerate(picks):
            if e == E:  # Another rank computes it.
                continue
            gate_up = experts.gate_up_proj[e] @ hidden_TD[t]
            if up:
                gate_up = gate_up + up.b_ERO[e].T @ (up.a_ERI[e] @ dropped_TD[t])
            gate, linear = gate_up.chunk(2)
            act = gate / (1 + torch.exp(-gate)) * linear
            out = experts.down_proj[e] @ act
            if low:
                out = out + low.b_ERO[e].T @ (low.a_ERI[e] @ (act * kept_NF[place_TK[t, k]]))
            row = row + weights_TK[t, k] * out
        rows.append(row)
    return torch.stack(rows)


def agree(have: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert have.keys() == want.keys() and any(x.any() for x in want.values())
    for name, other in want.items():
        assert (have[name] - other).abs().max() <= 1e-5 * max(1.0, other.abs().max().item()), name


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_output_and_every_gradient_equal_the_loops(kind, routing):
    layer = ExpertLayer(**KINDS[kind])
    index_TK = layer.picks(routing)
    want = layer.run(index_TK, in_full=True, forward=written_out)
    for recompute in (False, True):
        agree(layer.run(index_TK, recompute=recompute), want)


def test_other_activations_than_silu_are_refused():
    def with_gelu(experts: Any, *args: Any) -> torch.Tensor:
        experts.act_fn = nn.GELU()
        return grouped_experts_forward(experts, *args)

    layer = ExpertLayer()
    with pytest.raises(UserError, match="computes GELU; fine-tune one whose hidden_act is silu"):
        layer.run(layer.picks("uniform"), forward=with_gelu)


@pytest.mark.parametrize("recompute", [False, True])
def test_only_gate_and_up_are_kept(recompute):
    """Tensors with a row a pick: [N, 2F] and the thin products, with `recompute` only these. Beside
    them is the input, which other layers keep too."""
    layer, kept = ExpertLayer(adapted=BOTH, dropout=0.4), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        layer.run(layer.picks("uniform"), recompute=recompute)
    wide = [x.shape[1] for x in kept if x.dim() == 2 and x.shape[0] == layer.tokens * layer.K]
    assert sorted(wide) == sorted([8, 8] if recompute else [8, 8, 2 * layer.width])
    of_tokens = [x for x in kept if x.shape == (layer.tokens, layer.D)]
    assert [str(x.dtype) for x in of_tokens] == ["torch.float32"]


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The operands of each grouped product."""
    seen, product = [], F.grouped_mm

    def noted(x: torch.Tensor, weight: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.append((x, weight))
        return product(x, weight, **options)

    monkeypatch.setattr(F, "grouped_mm", noted)
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_changes_nothing_and_does_not_make_the_last_product_again(kind, products):
    def checkpointed(experts: Any, hidden_TD: Any, *rest: Any) -> torch.Tensor:
        again = partial(grouped_experts_forward, experts)
        return checkpoint(again, hidden_TD, *rest, use_reentrant=False)

    layer = ExpertLayer(**KINDS[kind])
    index_TK = layer.picks("uniform")
    have = layer.run(index_TK, forward=checkpointed)
    up, down = (layer.D, 2 * layer.width), (layer.width, layer.D)
    # Neither gradients of weights nor adapters.
    shapes = [tuple(weight.shape[1:]) for _, weight in products if weight.dim() == 3]
    shapes = [shape for shape in shapes if sorted(shape) in (sorted(up), sorted(down))]
    assert shapes == [up, down, up, down[::-1], up[::-1]]  # forward, again, backward
    agree(have, layer.run(index_TK))


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_aligned_as_gpus_want_them(dtype, rank, products):
    """GPUs take only operands whose rows, or columns, are side by side and whole 16 bytes; CPUs
    take any."""
    layer = ExpertLayer(adapted=BOTH, rank=rank)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        layer.run(layer.picks("uniform"))
    # Forward, the base and A and B of two stacks; backward, two products for each adapter's factor
    # and one for the input of each base.
    assert [x.dtype for x, _ in products] == [dtype] * (6 + 8 + 2)
    for x in (x for pair in products for x in pair):
        near, far = sorted(x.stride()[-2:])
        assert near == 1 and far * x.element_size() % 16 == 0


def test_several_active_adapters_are_summed(tiny_model):
    """As PEFT merges them."""
    model = add_random_adapters(tiny_model(experts_implementation=GROUPED), EXPERT_PARAMETERS)
    fields = {"target_modules": [], "target_parameters": list(EXPERT_PARAMETERS)}
    model.add_adapter("other", LoraConfig(r=2, init_lora_weights=False, **fields))
    alone = model.eval()(IDS).logits
    model.base_model.set_adapter(["default", "other"])
    both = model(IDS).logits
    assert not torch.allclose(both, alone, atol=1e-2)
    merged = model.merge_and_unload(adapter_names=["default", "other"])(IDS).logits
    torch.testing.assert_close(both, merged, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_100_steps_follow_the_losses_of_transformers_own_experts() -> None:
    """All weights of the bundled model train in fp32 on text that it can learn by heart."""
    text = (BUNDLED_MODEL.parents[1] / "LICENSE-MODEL").read_text(encoding="utf-8")
    ids = torch.tensor(own_tokenizer(BUNDLED_MODEL)(text[:3000]).input_ids[:256]).view(8, 32)

    def losses(implementation: str) -> torch.Tensor:
        options = {"experts_implementation": implementation, "dtype": torch.float32}
        model = DeepseekForCausalLM.from_pretrained(BUNDLED_MODEL, **options).train()
        optimizer, found = torch.optim.AdamW(model.parameters(), lr=1e-4), []
        for step in range(100):
            batch = ids[step % 4 * 2 :][:2]
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return torch.tensor(found)

    want, found = losses("grouped_mm"), losses(GROUPED)
    assert want[-10:].mean() < 0.1 * want[:4].mean()
    # In bf16 rounding grows with the steps, and any two ways come to differ by a tenth.
    torch.testing.assert_close(found, want, rtol=0.0, atol=2e-4)


def test_padding_is_left_out_of_the_balance_loss_over_all_tokens(tiny_model):
    """test_trainer.py compares the balance loss of packed rows and of parts of a step."""
    model, ids = tiny_model(seq_aux=False).train(), IDS.clone()
    sequence_ids = torch.tensor([[0, 0, 0, 0, 0, -1, -1], [1] * 7])
    have = model(ids, sequence_ids=sequence_ids, use_cache=False).aux_loss
    ids[sequence_ids < 0] = 50
    other = model(ids, sequence_ids=sequence_ids, use_cache=False).aux_loss
    torch.testing.assert_close(other, have)
    assert not torch.allclose(model(ids, use_cache=False).aux_loss, have)
