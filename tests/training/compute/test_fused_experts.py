"""The fused way through the experts equals the plain one: outputs and every gradient.

On the CPU with the plain twins of its kernels, whose own equality is in tests/test_kernels.py; on a
GPU tests/gpu does the same with the kernels.
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
from deepseek_moe.files import BUNDLED_MODEL
from deepseek_moe.kernels.training import torch_ops as plain
from deepseek_moe.training.compute import grouped_experts as way
from deepseek_moe.training.compute.grouped_experts import (
    LowRank,
    _fused_forward,
    grouped_experts_forward,
)
from deepseek_moe.training.quantized_base import Quantization

E, D, WIDTH, TOKENS, RANK = 8, 64, 48, 21, 5
STACKS = {"gate_up_proj": (2 * WIDTH, D), "down_proj": (D, WIDTH)}
ROUTINGS = {
    "spread": torch.stack([torch.randperm(E, generator=torch.Generator().manual_seed(t))[:3]
                           for t in range(TOKENS)]),
    "skewed": torch.tensor([[7, 0, 1]] * (TOKENS - 1) + [[3, 7, 0]]),
    "most_experts_without_tokens": torch.tensor([[2, 5, 3]] * TOKENS),
    "last_expert_without_tokens": torch.tensor([[t % 7, (t + 1) % 7, (t + 3) % 7]
                                                for t in range(TOKENS)]),
}  # fmt: skip


def make(trained: bool, bits: int = 16, recompute: bool = False) -> Any:
    torch.manual_seed(1)
    experts = SimpleNamespace(num_experts=E, act_fn=nn.SiLU(), recompute=recompute)
    for name, (out, width) in STACKS.items():
        weight = nn.Parameter(torch.randn(E, out, width) * 0.3, requires_grad=trained)
        if bits != 16:
            weight = Quantization(bits, dtype="float32").quantize(weight)
        setattr(experts, name, weight)
    return experts


def factors(names: tuple[str, ...], dropout: float = 0.0) -> dict[str, list[LowRank]]:
    torch.manual_seed(2)
    made = {}
    for name in names:
        out, width = STACKS[name]
        a, b = torch.randn(E, RANK, width) * 0.3, torch.randn(E, RANK, out) * 0.3
        made[name] = [LowRank(a.requires_grad_(), b.requires_grad_(), dropout)]
    return made


def run(forward: Any, experts: Any, adapters: Any, index: torch.Tensor, **kw: Any) -> Any:
    """The output, and the gradients of all that can have one."""
    torch.manual_seed(3)
    hidden = torch.randn(TOKENS, D, requires_grad=True)
    weights = torch.rand(index.shape, requires_grad=True)
    probe = torch.randn(TOKENS, D)
    leaves = {"hidden": hidden, "weights": weights}
    for name in STACKS:
        if getattr(experts, name).requires_grad:
            leaves[name] = getattr(experts, name)
        for low in adapters.get(name, ()):
            leaves |= {f"{name} A": low.a_ERI, f"{name} B": low.b_ERO}
    torch.manual_seed(4)
    out = forward(experts, hidden, index, weights, adapters, **kw)
    grads = torch.autograd.grad((out * probe).sum(), list(leaves.values()))
    return out, dict(zip(leaves, grads, strict=True))


def agree(have: Any, want: Any) -> None:
    for name, (mine, other) in {
        "output": (have[0], want[0]),
        **{n: (have[1][n], want[1][n]) for n in want[1]},
    }.items():
        assert other.any()
        assert (mine - other).abs().max() <= 1e-5 * max(1.0, other.abs().max().item()), name


FUSED: dict[str, Any] = {"dtype": torch.float32, "ops": plain}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_all_weights_train(routing: str, recompute: bool) -> None:
    experts, index = make(True, recompute=recompute), ROUTINGS[routing]
    want = run(grouped_experts_forward, experts, {}, index)
    agree(run(_fused_forward, experts, {}, index, **FUSED), want)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("names", [tuple(STACKS), ("gate_up_proj",), ("down_proj",)])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_adapters_over_frozen_weights(bits: int, names: tuple[str, ...], recompute: bool) -> None:
    experts, adapters = make(False, bits, recompute), factors(names)
    for index in ROUTINGS.values():
        want = run(grouped_experts_forward, experts, adapters, index)
        agree(run(_fused_forward, experts, adapters, index, **FUSED), want)


def test_picks_of_other_ranks_count_for_nothing() -> None:
    """Expert parallelism marks them with the number of experts; the loop leaves them out."""
    index = ROUTINGS["spread"].clone()
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

    experts = make(True)
    agree(run(_fused_forward, experts, {}, index, **FUSED), run(loop, experts, {}, index))


def test_nothing_trains_but_what_is_before() -> None:
    experts, index = make(False), ROUTINGS["spread"]
    want = run(grouped_experts_forward, experts, {}, index)
    agree(run(_fused_forward, experts, {}, index, **FUSED), want)


@pytest.mark.parametrize("recompute", [False, True])
def test_dropout(recompute: bool) -> None:
    """Of the adapters' inputs only: of a token before A of gate and up, of a pick before down's;
    the backward pass drops what the forward pass dropped."""
    p, index = 0.4, ROUTINGS["spread"]
    experts, adapters = make(False, recompute=recompute), factors(tuple(STACKS), p)

    def written_out(experts: Any, hidden: Any, index: Any, weights: Any, adapters: Any) -> Any:
        seed = int(torch.randint(2**31 - 1, ()))
        dropped, _ = torch.native_dropout(hidden, p, True)
        [[up], [down]] = adapters.values()
        _, place_TK, _ = plain.sort_picks(index.int(), E)
        kept_NF = plain._kept(torch.empty(index.numel(), WIDTH), p, seed)
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

    want = run(written_out, experts, adapters, index)
    agree(run(_fused_forward, experts, adapters, index, **FUSED), want)
    again = run(_fused_forward, experts, adapters, index, **FUSED)
    assert torch.equal(again[0], run(_fused_forward, experts, adapters, index, **FUSED)[0])


def test_only_gate_and_up_are_kept() -> None:
    """Of tensors with a row a pick: [N, 2F] and the thin products, with `recompute` only these."""
    rows = TOKENS * 3
    for recompute, fat in ((False, [2 * WIDTH]), (True, [])):
        experts, adapters = make(False, recompute=recompute), factors(tuple(STACKS))
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(partial(_note, kept), lambda x: x):
            run(_fused_forward, experts, adapters, ROUTINGS["spread"], **FUSED)
        wide = [x.shape[1] for x in kept if x.dim() == 2 and x.shape[0] == rows]
        assert sorted(wide) == sorted([8, 8, *fat])


def test_of_dropout_a_mask_is_kept() -> None:
    """Beside the input, which others keep too."""
    kept: list[torch.Tensor] = []
    experts, adapters = make(False), factors(tuple(STACKS), 0.4)
    with torch.autograd.graph.saved_tensors_hooks(partial(_note, kept), lambda x: x):
        run(_fused_forward, experts, adapters, ROUTINGS["spread"], **FUSED)
    masks = [x.dtype for x in kept if x.shape == (TOKENS, D) and x.dtype == torch.bool]
    hidden = {x.data_ptr() for x in kept if x.shape == (TOKENS, D) and x.dtype != torch.bool}
    assert len(masks) == 1 and len(hidden) == 2  # the test's own product keeps its probe


def test_checkpointing_does_not_make_the_last_product_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    product, shapes = way.Picks.product, []

    def noted(self: Any, x_NI: torch.Tensor, weight_EIO: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(weight_EIO.shape[1:]))
        return product(self, x_NI, weight_EIO)

    monkeypatch.setattr(way.Picks, "product", noted)

    def checkpointed(experts: Any, hidden: Any, *rest: Any) -> torch.Tensor:
        again = partial(_fused_forward, experts, **FUSED)
        return checkpoint(again, hidden, *rest, use_reentrant=False)

    experts, index = make(True), ROUTINGS["spread"]
    have = run(checkpointed, experts, {}, index)
    up, down = (D, 2 * WIDTH), (WIDTH, D)
    assert shapes == [up, down, up, down[::-1], up[::-1]]  # forward, again, backward
    agree(have, run(grouped_experts_forward, experts, {}, index))


def _note(kept: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    kept.append(x)
    return x


@pytest.mark.slow
def test_200_steps_follow_the_plain_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the bundled model, all weights, on text that it can learn by heart."""
    text = (BUNDLED_MODEL.parents[1] / "LICENSE-MODEL").read_text(encoding="utf-8")
    ids = torch.tensor(own_tokenizer(BUNDLED_MODEL)(text[:6000]).input_ids[:512]).view(8, 64)

    def losses() -> torch.Tensor:
        model = DeepseekForCausalLM.from_pretrained(BUNDLED_MODEL, experts_implementation="grouped")
        optimizer, found = torch.optim.AdamW(model.train().parameters(), lr=1e-4), []
        for step in range(200):
            batch = ids[step % 4 * 2 :][:2]
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return torch.tensor(found)

    want = losses()
    assert want[-10:].mean() < 0.5 * want[:4].mean()
    monkeypatch.setattr(way, "_can_fuse", lambda *_: True)
    monkeypatch.setattr(way, "_fused_forward", partial(_fused_forward, ops=plain))
    found = losses()
    # Rounding grows in 200 steps: "eager" and "grouped_mm" come to differ by 0.013, and by 0.002 on
    # average.
    torch.testing.assert_close(found, want, rtol=0.0, atol=0.03)
    assert (found - want).abs().mean() < 0.004
