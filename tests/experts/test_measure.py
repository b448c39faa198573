"""A measured profile beside counts and sums made the slow way."""

from typing import Any

import pytest
import torch
from text_fixtures import BUNDLED, bundled_model, tokenizer_of
from torch.nn import functional as F

from deepseek_moe import DeepseekForCausalLM, load
from deepseek_moe.errors import RunError, UserError
from deepseek_moe.experts import measure as measuring
from deepseek_moe.experts.measure import hash_ids, measure, picked_experts, router_profile
from deepseek_moe.experts.profile import SCORES, Picks, Profile

TEXTS = ["Once upon a time there was a king.", "A bird", "The old woman went into the wood."]
SHAPES = [
    {},
    {"norm_topk_prob": True},
    {"n_shared_experts": None},
    {"first_k_dense_replace": 0},
    {"num_hidden_layers": 5, "moe_layer_freq": 2},
    {"hidden_act": "gelu"},
    {"num_experts_per_tok": 1},
]


def random_ids(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(2, 96, (n,), generator=generator).tolist() for n in lengths]


def profile_of(model: DeepseekForCausalLM, ids: list[list[int]], **options: Any) -> Profile:
    return measure(model, ids, fingerprint="tensors:m", **options)


def by_a_loop(model: DeepseekForCausalLM, sequences: list[list[int]]) -> dict[str, Any]:
    """Every score [layers, E], one sequence, one token, one pick at a time."""
    experts = [layer.mlp.experts for layer in model.model.layers if layer.is_moe]
    sums = {name: torch.zeros(len(experts), len(experts[0])) for name in SCORES}

    def add(row: int, inputs: tuple[torch.Tensor, ...]) -> None:
        for hidden_D, index_K, weights_K in zip(*inputs, strict=True):
            for expert, weight in zip(index_K.tolist(), weights_K.tolist(), strict=True):
                gate_up, down = experts[row].matrices(expert)
                gate, up = F.linear(hidden_D, gate_up).chunk(2)
                out_D = F.linear(experts[row].act_fn(gate) * up, down)
                sums["picks"][row, expert] += 1
                sums["gate"][row, expert] += weight
                sums["gate_times_norm"][row, expert] += weight * out_D.float().norm().item()

    hooks = [
        one.register_forward_pre_hook(lambda _, inputs, row=row: add(row, inputs))
        for row, one in enumerate(experts)
    ]
    with torch.no_grad():
        for ids in sequences:
            model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    sums["gate"] /= sum(map(len, sequences))
    sums["gate_times_norm"] /= sums["picks"].clamp(min=1)
    return sums


def rows(profile: Profile, name: str) -> torch.Tensor:
    return torch.tensor([getattr(layer, name) for layer in profile.layers.values()])


def assert_equal(profile: Profile, wanted: dict[str, torch.Tensor], rtol: float = 1e-5) -> None:
    for name in SCORES:
        found, want = rows(profile, name).double(), wanted[name].double()
        torch.testing.assert_close(found, want, rtol=rtol, atol=1e-6)


def test_picks_are_those_of_the_router_logits():
    model, sequences = bundled_model().eval(), tokenizer_of(BUNDLED)(TEXTS).input_ids
    profile, picks = profile_of(model, sequences, batch_size=2), torch.zeros(5, 24)
    assert list(profile.layers) == [1, 2, 3, 4, 5]
    for ids in sequences:
        with torch.no_grad():
            logits = model(torch.tensor([ids]), output_router_logits=True).router_logits
        top = [logits_TE.topk(6).indices for logits_TE in logits]
        picks += torch.stack([top_TK.flatten().bincount(minlength=24) for top_TK in top])
        found = {n: of.experts for n, of in picked_experts(model, ids).items()}
        assert found == {n: x.tolist() for n, x in enumerate(top, 1)}
    assert torch.equal(rows(profile, "picks"), picks.long())


# In bf16 the inputs of the first layer with experts are the same, so the picks are too.
@pytest.mark.parametrize(
    ("shape", "dtype", "rtol"),
    [(shape, torch.float32, 1e-5) for shape in SHAPES]
    + [({"num_hidden_layers": 2}, torch.bfloat16, 0.02)],
    ids=str,
)
def test_scores_are_those_of_a_loop_over_experts(shape, dtype, rtol, tiny_model):
    model, sequences = tiny_model(**shape).to(dtype), random_ids(9, 3, 17)
    profile = profile_of(model, sequences, batch_size=2)
    assert list(profile.layers) == model.config.moe_layers and profile.num_experts == 8
    assert_equal(profile, by_a_loop(model, sequences), rtol)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_routers_alone_give_the_picks_and_mean_gate_weights(shape, tiny_model):
    model, (ids,) = tiny_model(**shape), random_ids(21)
    picks = picked_experts(model, ids)
    found = router_profile(picks, 8, 0, "m")
    wanted = profile_of(model, [ids])
    for name in ("picks", "gate"):
        torch.testing.assert_close(rows(found, name), rows(wanted, name), rtol=1e-5, atol=1e-7)
    for of in picks.values():
        assert all(weights == sorted(weights, reverse=True) for weights in of.weights)
    assert not any(layer.gate_times_norm for layer in found.layers.values())
    first = {n: Picks(of.experts[:9], of.weights[:9]) for n, of in picks.items()}
    parts = router_profile(first, 8, 0, ""), router_profile(picks, 8, 9, "")
    assert [part.tokens for part in parts] == [9, 12]
    assert torch.equal(sum(rows(part, "picks") for part in parts), rows(found, "picks"))
    assert not any(layer.mlp.gate._forward_hooks for layer in model.model.layers if layer.is_moe)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_the_size_of_batches_changes_nothing(batch_size, tiny_model):
    model, sequences = tiny_model(), random_ids(9, 3, 17, 0, 30, 1)
    wanted = profile_of(model, sequences)
    profile = profile_of(model, sequences, batch_size=batch_size)
    assert_equal(profile, {n: rows(wanted, n) for n in SCORES})
    assert (profile.tokens, profile.data) == (60, wanted.data)
    assert hash_ids(sequences) != hash_ids(random_ids(9, 3, 17, 0, 31, 1))
    assert hash_ids([[1, 2], [3]]) != hash_ids([[1], [2, 3]])


def test_tied_picks_are_counted_as_the_router_takes_them(tiny_model):
    model, sequences = tiny_model(), random_ids(9, 4)
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight.zero_()
    profile = profile_of(model, sequences)
    assert_equal(profile, by_a_loop(model, sequences))
    assert sum(profile.layers[1].picks) == 13 * 3
    assert sum(profile.layers[1].gate) == pytest.approx(3 / 8)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_a_measured_model_computes_as_before(implementation, tiny_model, monkeypatch):
    """While it is measured, too, and after an error."""
    model, ids = tiny_model(experts_implementation=implementation), random_ids(9)
    before = model.get_experts_implementation()
    assert before == {"": implementation}
    outputs: list[torch.Tensor] = []
    hook = model.model.register_forward_hook(lambda *a: outputs.append(a[-1].last_hidden_state))
    profile_of(model, ids)
    with torch.inference_mode():
        model.model(torch.tensor(ids))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    hook.remove()
    assert model.get_experts_implementation() == before
    monkeypatch.setattr(measuring, "experts_and_norms", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        profile_of(model, ids)
    assert model.get_experts_implementation() == before
    assert measuring.MEASURED not in measuring.ALL_EXPERTS_FUNCTIONS


@pytest.mark.parametrize("broken", ["gate.weight", "experts.down_proj"])
def test_numbers_that_are_not_finite_are_refused(broken, tiny_model):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[2].mlp.get_parameter(broken).fill_(torch.nan)
    with pytest.raises(RunError, match="layer 2 are not finite"):
        profile_of(model, random_ids(9))


def test_what_cannot_be_measured_is_refused(tiny_model, bundled_model):
    for nothing in ([], [[]]):
        with pytest.raises(UserError, match="no token"):
            profile_of(tiny_model(), nothing)
    with pytest.raises(UserError, match="no routed experts"):
        profile_of(tiny_model(first_k_dense_replace=9), random_ids(3))
    with pytest.raises(UserError, match="quantised"):
        profile_of(load(str(bundled_model), quantization="int8")[0], [[1, 2]])
