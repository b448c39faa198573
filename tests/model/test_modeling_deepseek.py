"""The whole model: its variants, training, checkpointing, decoding and outputs."""

import pytest
import torch

from deepseek_moe import DeepseekForCausalLM
from deepseek_moe.model.balance_loss import balance_loss
from deepseek_moe.model.modeling_deepseek import CACHE, DeepseekExperts, DeepseekGate

# transformers 5.23 says activation checkpointing; 5.17 and its Trainer do not know that name.
pytestmark = pytest.mark.filterwarnings("ignore:.*_checkpointing_:FutureWarning")

IDS = torch.tensor([[0, 17, 5, 44, 80, 9, 31, 62, 23], [0, 3, 3, 71, 12, 95, 50, 28, 6]])


def gradients(model: DeepseekForCausalLM) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model.train()(IDS, labels=IDS).loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


def test_gradient_checkpointing_changes_no_gradient(tiny_model):
    model = tiny_model()
    want = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, want[name], msg=name)
    # Routing belongs to one pass: two passes before one backward do not mix.
    other = IDS.flip(0)
    model.zero_grad()
    (model(IDS, labels=IDS).loss + model(other, labels=other).loss).backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, 2 * want[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_keeps_the_first_routing(use_reentrant, tiny_model):
    """A router that would choose otherwise when the layer is recomputed is not asked again."""
    model = tiny_model().train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    picks: dict[DeepseekExperts, list[torch.Tensor]] = {}
    gates = [module for module in model.modules() if isinstance(module, DeepseekGate)]
    for module in model.modules():
        if isinstance(module, DeepseekExperts):
            module.register_forward_pre_hook(
                lambda experts, args: picks.setdefault(experts, []).append(args[1])
            )
    loss = model(IDS, labels=IDS).loss
    for gate in gates:
        gate.weight.data.neg_()  # from now on the worst experts look best
    loss.backward()
    model(IDS)
    assert len(picks) == len(gates)
    for first, recomputed, chosen_now in picks.values():
        assert torch.equal(first, recomputed)
        assert not torch.equal(first, chosen_now)


@pytest.mark.parametrize("autocast", [False, True])
def test_router_computes_in_fp32(autocast, tiny_config):
    torch.manual_seed(0)
    dtype = torch.float32 if autocast else torch.bfloat16
    gate = DeepseekGate(tiny_config()).to(dtype)
    torch.nn.init.normal_(gate.weight)
    hidden = torch.randn(50, 32).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits, weights, picks = gate(hidden)
    want = hidden.float() @ gate.weight.float().T
    torch.testing.assert_close(logits, want, atol=1e-5, rtol=1e-5)
    scores = want.softmax(-1).gather(-1, picks)
    torch.testing.assert_close(weights, scores, atol=1e-6, rtol=1e-5)
    assert torch.equal(picks.sort().values, want.topk(3).indices.sort().values)


@torch.no_grad()
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_cached_decoding_equals_full_forward(name, tiny_model):
    model = tiny_model(num_key_value_heads=2)
    out = model(IDS[:, :4], use_cache=True)
    steps = [out.logits]
    for token in IDS[:, 4:].split(1, dim=1):
        out = model(token, **{name: out[CACHE]}, use_cache=True)
        steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), model(IDS).logits, atol=1e-5, rtol=1e-4)
    for others in (["cache", "past_key_values"], ["by_a_newer_name"]):
        with pytest.raises(ValueError, match="give one cache, as `cache` or"):
            model(IDS, **dict.fromkeys(others, out[CACHE]))


@torch.no_grad()
def test_logits_to_keep(tiny_model):
    model = tiny_model()
    full = model(IDS).logits
    torch.testing.assert_close(model(IDS, logits_to_keep=2).logits, full[:, -2:])
    places = torch.tensor([1, 5])
    torch.testing.assert_close(model(IDS, logits_to_keep=places).logits, full[:, places])


@torch.no_grad()
def test_embeddings_can_be_given_instead_of_ids(tiny_model):
    model = tiny_model()
    embedded = model.get_input_embeddings()(IDS)
    torch.testing.assert_close(model(inputs_embeds=embedded).logits, model(IDS).logits)
    for wrong in ({}, {"input_ids": IDS, "inputs_embeds": embedded}):
        with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
            model(**wrong)


def test_eos_learns_though_it_pads(tiny_model):
    model = tiny_model().train()
    assert model.config.pad_token_id == model.config.eos_token_id == 1
    ids = torch.tensor([[0, 7, 1, 9]])
    model(ids, labels=ids).loss.backward()
    assert model.get_input_embeddings().weight.grad[1].any()


@torch.no_grad()
def test_router_logits_hidden_states_and_attentions(tiny_model):
    model = tiny_model(attn_implementation="eager")
    wanted = ("output_router_logits", "output_hidden_states", "output_attentions")
    out = model(IDS, **dict.fromkeys(wanted, True))
    assert [x.shape for x in out.router_logits] == [(IDS.numel(), 8)] * 2  # the MoE layers
    assert [x.shape for x in out.hidden_states] == [(*IDS.shape, 32)] * 4
    assert [x.shape for x in out.attentions] == [(2, 4, 9, 9)] * 3
    assert torch.equal(out.hidden_states[0], model.get_input_embeddings()(IDS))
    torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits)
    bare = model(IDS)
    assert bare.router_logits is bare.hidden_states is bare.attentions is bare.aux_loss is None


@torch.no_grad()
def test_hooks_on_a_gate_and_its_experts_see_every_token_and_may_change_it(tiny_model):
    model, seen = tiny_model(), []
    mlp = model.model.layers[1].mlp
    hooks = [
        mlp.gate.register_forward_hook(lambda _, args, out: seen.append([x.shape for x in out])),
        mlp.experts.register_forward_hook(lambda _, args, out: seen.append(out.shape)),
    ]
    plain = model(IDS).logits
    assert seen == [[(18, 8), (18, 3), (18, 3)], (18, 32)]
    seen.clear()
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    written = model.generate(IDS, attention_mask=torch.ones_like(IDS), **options)
    assert written.shape == (2, 12)
    assert [shape[0] for shape in seen[1::2]] == [18, 2, 2]  # the prompts, then a token of each
    for hook in hooks:
        hook.remove()
    for module, change in (
        (mlp.gate, lambda _, args, out: (out[0], 0 * out[1], out[2])),
        (mlp.experts, lambda _, args, out: 0 * out),
    ):
        hook = module.register_forward_hook(change)
        changed = model(IDS).logits
        hook.remove()
        assert not torch.allclose(changed, plain)


def test_training_gives_picks_and_balance_losses_beside_the_loss(tiny_model):
    model = tiny_model()
    silent = model(IDS, labels=IDS)
    out = model.train()(IDS, labels=IDS, output_router_logits=True)
    rows = torch.arange(2).repeat_interleave(IDS.shape[1])
    scores = [logits.softmax(-1) for logits in out.router_logits]
    want = [0.1 * balance_loss(x, x.topk(3).indices, rows, 2) for x in scores]
    for picks, x in zip(out.router_picks, scores, strict=True):
        assert torch.equal(picks.sort().values, x.topk(3).indices.sort().values)
    assert silent.router_picks is silent.aux_losses is None
    torch.testing.assert_close(out.aux_losses, torch.stack(want))
    torch.testing.assert_close(out.aux_loss, sum(want))
    torch.testing.assert_close(out.loss, silent.loss)
    assert not out.aux_loss.requires_grad  # its gradient is already on its way
