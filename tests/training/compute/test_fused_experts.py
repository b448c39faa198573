"""What the fused way through the experts does beyond its sums: what it keeps, repeats and drops.

test_grouped_experts.py and tests/model/test_experts.py compare its output and gradients with loops.
Here it takes the plain twins of its kernels; tests/kernels compares those with the kernels.
"""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from deepseek_moe import DeepseekForCausalLM
from deepseek_moe.checkpoint import own_tokenizer
from deepseek_moe.errors import UserError
from deepseek_moe.files import BUNDLED_MODEL
from deepseek_moe.kernels.training import torch_ops
from deepseek_moe.training.compute.grouped_experts import (
    GROUPED,
    RECOMPUTED,
    LowRank,
    grouped_experts_forward,
)
from deepseek_moe.training.quantized_base import Quantization, dequantize

E, D, WIDTH, TOKENS, RANK = 8, 64, 48, 21, 5
STACKS = {"gate_up_proj": (2 * WIDTH, D), "down_proj": (D, WIDTH)}
INDEX = torch.stack([torch.randperm(E, generator=torch.Generator().manual_seed(t))[:3]
                     for t in range(TOKENS)])  # fmt: skip


def make(trained: bool, bits: int = 16, recompute: bool = False) -> Any:
    torch.manual_seed(1)
    config = SimpleNamespace(_experts_implementation=RECOMPUTED if recompute else GROUPED)
    experts = SimpleNamespace(num_experts=E, act_fn=nn.SiLU(), config=config)
    for name, (out, width) in STACKS.items():
        weight = nn.Parameter(torch.randn(E, out, width) * 0.3, requires_grad=trained)
        if bits != 16:
            weight = Quantization(bits, dtype="float32").quantize(weight)
        setattr(experts, name, weight)
    return experts


def factors(names: tuple[str, ...] = tuple(STACKS), dropout: float = 0.0) -> dict[str, LowRank]:
    torch.manual_seed(2)
    made = {}
    for name in names:
        out, width = STACKS[name]
        a, b = torch.randn(E, RANK, width) * 0.3, torch.randn(E, RANK, out) * 0.3
        made[name] = LowRank(a.requires_grad_(), b.requires_grad_(), dropout)
    return made


def run(
    experts: Any,
    adapters: dict[str, LowRank],
    index: torch.Tensor = INDEX,
    forward: Any = grouped_experts_forward,
) -> dict[str, torch.Tensor]:
    """The output, and the gradients of all that can have one."""
    torch.manual_seed(3)
    hidden = torch.randn(TOKENS, D, requires_grad=True)
    weights = torch.rand(index.shape, requires_grad=True)
    probe = torch.randn(TOKENS, D)
    leaves = {"hidden": hidden, "weights": weights}
    leaves |= {n: getattr(experts, n) for n in STACKS if getattr(experts, n).requires_grad}
    for name, low in adapters.items():
        leaves |= {f"{name} A": low.a_ERI, f"{name} B": low.b_ERO}
    torch.manual_seed(4)
    out = forward(experts, hidden, index, weights, adapters)
    grads = torch.autograd.grad((out * probe).sum(), list(leaves.values()))
    return {"output": out.detach(), **dict(zip(leaves, grads, strict=True))}


def agree(have: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert have.keys() == want.keys()
    for name, other in want.items():
        assert other.any()
        assert (have[name] - other).abs().max() <= 1e-5 * max(1.0, other.abs().max().item()), name


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("names", [tuple(STACKS), ("gate_up_proj",), ("down_proj",), ()])
def test_quantised_and_recomputed_give_the_same(bits: int, names: tuple[str, ...]) -> None:
    """As the numbers that the quantised weights stand for."""
    plain, adapters = make(False), factors(names)
    for name in STACKS:
        weight = dequantize(getattr(make(False, bits), name), torch.float32)
        setattr(plain, name, nn.Parameter(weight, requires_grad=False))
    want = run(plain, adapters)
    agree(run(make(False, bits), adapters), want)
    agree(run(make(False, bits, recompute=True), adapters), want)
    if not names and bits == 16:
        agree(run(make(True, recompute=True), {}), run(make(True), {}))


def test_picks_of_other_ranks_count_for_nothing() -> None:
    """Expert parallelism marks them with the number of experts; the loop leaves them out."""
    index = INDEX.clone()
    index[::3, 1] = E
    index[5] = E

    def loop(experts: Any, hidden: Any, index: Any, weights: Any, adapters: Any) -> torch.Tensor:
        rows = []
        for t in range(TOKENS):
            row = hidden[t] * 0.0
            for k, e in enumerate(index[t].tolist()):
                if e < E:
                    gate, up = (experts.gate_up_proj[e] @ hidden[t]).chunk(2)
                    row = row + weights[t, k] * (experts.down_proj[e] @ (F.silu(gate) * up))
            rows.append(row)
        return torch.stack(rows)

    agree(run(make(True), {}, index), run(make(True), {}, index, loop))


@pytest.mark.parametrize("recompute", [False, True])
def test_dropout(recompute: bool) -> None:
    """Only inputs of adapters drop out: of a token before A of gate and up, of a pick before down's
    A. The backward pass drops what the forward pass dropped."""
    p = 0.4
    experts, adapters = make(False, recompute=recompute), factors(dropout=p)

    def written_out(experts: Any, hidden: Any, index: Any, weights: Any, adapters: Any) -> Any:
        seed = int(torch.randint(2**31 - 1, ()))
        dropped, _ = torch.native_dropout(hidden, p, True)
        up, down = adapters.values()
        _, place_TK, _ = torch_ops.sort_picks(index.int(), E)
        # The kernel's own dropout of numbers that are all 1.
        ones = torch.full((index.numel(), 2 * WIDTH), 100.0), None, torch.ones(index.numel())
        whole_NF, dropped_NF = torch_ops.weighted_swiglu(*ones, p, seed)
        kept_NF = dropped_NF / whole_NF
        rows = []
        for t in range(TOKENS):
            row = torch.zeros(D)
            for k, e in enumerate(index[t].tolist()):
                gate_up = experts.gate_up_proj[e] @ hidden[t]
                gate_up = gate_up + up.b_ERO[e].T @ (up.a_ERI[e] @ dropped[t])
                act = F.silu(gate_up[:WIDTH]) * gate_up[WIDTH:]
                out = experts.down_proj[e] @ act
                low = down.b_ERO[e].T @ (down.a_ERI[e] @ (act * kept_NF[place_TK[t, k]]))
                row = row + weights[t, k] * (out + low)
            rows.append(row)
        return torch.stack(rows)

    want = run(experts, adapters, forward=written_out)
    have, again = run(experts, adapters), run(experts, adapters)
    agree(have, want)
    assert all(torch.equal(have[name], again[name]) for name in have)


@pytest.mark.parametrize("recompute", [False, True])
def test_only_gate_and_up_and_a_mask_are_kept(recompute: bool) -> None:
    """Tensors with a row a pick: [N, 2F] and the thin products, with `recompute` only these. Of the
    dropout a mask is kept, beside the input, which other layers keep too."""
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        run(make(False, recompute=recompute), factors(dropout=0.4))
    wide = [x.shape[1] for x in kept if x.dim() == 2 and x.shape[0] == TOKENS * 3]
    assert sorted(wide) == sorted([8, 8] if recompute else [8, 8, 2 * WIDTH])
    of_tokens = [x for x in kept if x.shape == (TOKENS, D)]
    assert [x.dtype for x in of_tokens].count(torch.bool) == 1
    # The test's own product keeps its probe.
    assert len({x.data_ptr() for x in of_tokens if x.dtype != torch.bool}) == 2


def test_checkpointing_does_not_make_the_last_product_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    product, shapes = F.grouped_mm, []

    def noted(x_NI: torch.Tensor, weight: torch.Tensor, **options: Any) -> torch.Tensor:
        if weight.dim() == 3:  # else it is the gradient of a weight
            shapes.append(tuple(weight.shape[1:]))
        return product(x_NI, weight, **options)

    monkeypatch.setattr(F, "grouped_mm", noted)

    def checkpointed(experts: Any, hidden: Any, *rest: Any) -> torch.Tensor:
        again = partial(grouped_experts_forward, experts)
        return checkpoint(again, hidden, *rest, use_reentrant=False)

    have = run(make(True), {}, forward=checkpointed)
    up, down = (D, 2 * WIDTH), (WIDTH, D)
    assert shapes == [up, down, up, down[::-1], up[::-1]]  # forward, again, backward
    agree(have, run(make(True), {}))


def test_other_activations_than_silu_are_refused() -> None:
    experts = make(False)
    experts.act_fn = nn.GELU()
    with pytest.raises(UserError, match="computes GELU; fine-tune one whose hidden_act is silu"):
        run(experts, {})


@pytest.mark.slow
def test_100_steps_follow_the_losses_of_transformers_own_experts() -> None:
    """All weights of the bundled model train in fp32 on text that it can learn by heart."""
    text = (BUNDLED_MODEL.parents[1] / "LICENSE-MODEL").read_text(encoding="utf-8")
    ids = torch.tensor(own_tokenizer(BUNDLED_MODEL)(text[:6000]).input_ids[:512]).view(8, 64)

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
    torch.testing.assert_close(found, want, rtol=0.0, atol=1e-5)
