"""The MoE layer and its balance loss against a dense one: every value and every gradient."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from deepseek_moe import DeepseekConfig
from deepseek_moe.model.balance_loss import balance_loss
from deepseek_moe.model.modeling_deepseek import DeepseekMoE, Routing
from deepseek_moe.training.compute.grouped_experts import GROUPED

IMPLEMENTATIONS = ["eager", "grouped_mm", "batched_mm", GROUPED]


def dense_moe(
    config: DeepseekConfig, w: dict[str, torch.Tensor], hidden_BLD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Every expert computes every token: output, balance loss, and which picks [B, L, E] count."""

    def swiglu(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor):
        return (F.silu(x @ gate.mT) * (x @ up.mT)) @ down.mT

    E, K = config.n_routed_experts, config.num_experts_per_tok
    scores_BLE = (hidden_BLD @ w["gate.weight"].T).softmax(-1)
    picked_BLE = torch.zeros_like(scores_BLE).scatter(-1, scores_BLE.topk(K).indices, 1.0)
    weights_BLE = scores_BLE * picked_BLE
    if config.norm_topk_prob and K > 1:
        weights_BLE = weights_BLE / weights_BLE.sum(-1, keepdim=True)
    gate, up = w["experts.gate_up_proj"].chunk(2, dim=1)
    outs_BELD = swiglu(hidden_BLD[:, None], gate, up, w["experts.down_proj"])
    out_BLD = torch.einsum("ble,beld->bld", weights_BLE, outs_BELD)
    if config.n_shared_experts:
        shared = [w[f"shared_experts.{matrix}_proj.weight"] for matrix in ("gate", "up", "down")]
        out_BLD = out_BLD + swiglu(hidden_BLD, *shared)
    counted = 1 if config.seq_aux else (0, 1)
    share, mean = picked_BLE.mean(counted) * E / K, scores_BLE.mean(counted)
    return out_BLD, (share * mean).sum(-1).mean(), picked_BLE


def random_moe(config: DeepseekConfig) -> DeepseekMoE:
    torch.manual_seed(1)
    moe = DeepseekMoE(config)
    for weight in moe.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return moe


CASES: dict[str, dict[str, Any]] = {  # `push` is added to the logits of experts
    "usual": {},
    "loss_over_all_tokens": {"seq_aux": False},
    "no_balance_loss": {"aux_loss_alpha": 0.0},
    "expert_without_token": {"push": {5: -30.0}},
    "one_expert_has_all_others_none": {"push": {2: 9.0}, "num_experts_per_tok": 1},
    "one_token": {"shape": (1, 1)},
    "one_token_each": {"shape": (4, 1)},
    "top_1": {"num_experts_per_tok": 1},
    "top_1_is_not_normed": {"num_experts_per_tok": 1, "norm_topk_prob": True},
    "normed": {"norm_topk_prob": True},
    "no_shared": {"n_shared_experts": None},
    "all_experts": {"num_experts_per_tok": 8},
    "one_routed_expert": {"n_routed_experts": 1, "num_experts_per_tok": 1},
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES)
def test_moe_layer_equals_the_dense_one(case, implementation, tiny_config):
    changes = dict(CASES[case])
    shape, push = changes.pop("shape", (2, 7)), changes.pop("push", {})
    config = tiny_config(experts_implementation=implementation, **changes)
    moe = random_moe(config)
    hidden = torch.randn(*shape, config.hidden_size)
    hidden[..., 0] = 1.0
    for expert, much in push.items():
        moe.gate.weight.data[expert, 0] = much
    probe = torch.randn_like(hidden)  # the gradient that comes from the layers above

    exact = {name: w.detach().double().requires_grad_() for name, w in moe.named_parameters()}
    exact["hidden"] = hidden.double().requires_grad_()
    want, balance, picked_BLE = dense_moe(config, exact, exact["hidden"])
    ((want * probe).sum() + config.aux_loss_alpha * balance).backward()

    hidden.requires_grad_()
    routing = Routing()
    out = moe.train()(hidden, routing)
    (out * probe).sum().backward()

    torch.testing.assert_close(out, want.float(), atol=1e-5, rtol=1e-5)
    assert picked_BLE.flatten(0, 1).gather(1, routing.index_TK).all()
    if config.aux_loss_alpha:
        expected = (config.aux_loss_alpha * balance).float()
        torch.testing.assert_close(routing.aux_loss, expected, atol=1e-6, rtol=1e-5)
    else:
        assert routing.aux_loss is None
    for name, weight in [*moe.named_parameters(), ("hidden", hidden)]:
        scale = max(1.0, exact[name].grad.abs().max().item())
        # 2e-5: a softmax with one logit near 9 above the rest loses a digit, more on some CPUs
        assert (weight.grad - exact[name].grad).abs().max() <= 2e-5 * scale, name
    unused_E = ~picked_BLE.bool().any(0).any(0)
    assert not moe.experts.gate_up_proj.grad[unused_E].any()
    assert unused_E.any() or not push


def test_balance_loss_is_1_when_even_and_grows_to_the_number_of_experts():
    in_two, as_one = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), torch.zeros(8, dtype=torch.long)
    even, one_way = torch.full((8, 4), 0.25), torch.eye(4)[[2] * 8]
    assert balance_loss(even, torch.tensor([[0], [1], [2], [3]] * 2), in_two, 2) == 1
    assert balance_loss(one_way, torch.full((8, 1), 2), in_two, 2) == 4
    # Two sequences, each all to one expert, are uneven within and even over both.
    scores, picks = torch.eye(2)[in_two], in_two[:, None]
    assert balance_loss(scores, picks, in_two, 2) == 2
    assert balance_loss(scores, picks, as_one, 1) == 1


def test_many_short_sequences_keep_little_for_the_backward_pass():
    """Not which token is in which sequence; and padding has no gradient."""
    sequences = torch.arange(200) // 2  # a hundred
    sequences[-20:] = -1
    scores, kept = torch.rand(200, 4, requires_grad=True), []
    picks = torch.zeros(200, 1, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()), lambda x: x):
        balance_loss(scores, picks, sequences, 90)
    assert sum(kept) == 90 * 4 + 200
    (grad,) = torch.autograd.grad(balance_loss(scores, picks, sequences, 90), scores)
    assert grad[:180, 0].all() and not grad[180:].any() and not grad[:, 1:].any()


def test_experts_skip_the_mark_of_another_rank(tiny_config):
    """Expert parallelism gives the picks of other ranks the number after the last expert."""
    experts = random_moe(tiny_config(experts_implementation="eager")).experts
    hidden, index = torch.randn(2, 32), torch.tensor([[0, 8], [8, 8]])
    out = experts(hidden, index, torch.ones(2, 2))
    torch.testing.assert_close(out[0], experts(hidden[:1], index[:1, :1], torch.ones(1, 1))[0])
    assert not out[1].any()


def test_with_several_threads_the_gradient_repeats_bit_for_bit(tiny_config):
    """Each token's gradient is a sum over its picks, which threads must add in a fixed order."""
    sizes = {"hidden_size": 64, "moe_intermediate_size": 32}
    moe = random_moe(tiny_config(experts_implementation=GROUPED, **sizes))
    hidden_BLD = torch.randn(2, 256, 64, requires_grad=True)

    def gradient() -> torch.Tensor:
        return torch.autograd.grad(moe(hidden_BLD).square().sum(), hidden_BLD)[0]

    torch.set_num_threads(4)
    try:
        first = gradient()
        assert all(torch.equal(gradient(), first) for _ in range(20))
    finally:
        torch.set_num_threads(1)
