"""Every kernel equals its twin in torch, in Triton's interpreter; tests/gpu does it on a GPU."""

from inspect import signature
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
if torch.cuda.is_available():
    pytest.skip("on a GPU, tests/gpu compares them", allow_module_level=True)

from kernel_cases import CASES, TWINS, Case, assert_twins_agree, small_cases

from deepseek_moe.decode.int_quantizer import quantize
from deepseek_moe.kernels.decode import Place, experts_many, torch_ops, triton_ops
from deepseek_moe.kernels.int_weights import Weight
from deepseek_moe.kernels.training import torch_ops as plain
from deepseek_moe.kernels.training import triton_ops as fused


@pytest.mark.parametrize("case", small_cases(), ids=str)
def test_equals_its_twin(case):
    # One token's int weights are unpacked in a way that costs a fortieth of bf16's rounding.
    assert_twins_agree(case, 5e-4 if case.bits < 16 and case.tokens == 1 else 2e-5)


def test_every_kernel_has_a_case_and_the_parameters_of_its_twin():
    assert {name.split(":")[0] for name in CASES} == TWINS.keys()
    for name, twins in TWINS.items():
        ours, plain_ones = (list(signature(one).parameters) for one in twins)
        assert ours == plain_ones, name


def test_a_kernel_that_forgets_a_place_is_found(monkeypatch):
    right = torch_ops.swiglu

    def forgetful(x_NF: torch.Tensor) -> torch.Tensor:
        out_NF = torch.empty_like(right(x_NF))
        out_NF[:-1] = right(x_NF)[:-1]
        return out_NF

    monkeypatch.setitem(TWINS, "swiglu", (forgetful, right))
    with pytest.raises(AssertionError, match="relative distance nan"):
        assert_twins_agree(Case("swiglu", tokens=2), tolerance=1e9)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("norm_topk", [False, True])
def test_a_choice_among_scores_that_are_no_numbers_shows(norm_topk, value):
    """The weights of that token are NaN, so that its logits will be; its picks are experts."""
    logits_TE, position_T = torch.randn(3, 6), torch.arange(3, dtype=torch.int32)
    logits_TE[1, 4] = value
    want = torch_ops.pick_experts(logits_TE, position_T, 2, norm_topk)
    index_TK, weights_TK = triton_ops.pick_experts(logits_TE, position_T, 2, norm_topk)
    assert weights_TK[1].isnan().all()
    assert ((index_TK >= 0) & (index_TK < 6)).all()
    assert torch.equal(index_TK[::2], want[0][::2])
    torch.testing.assert_close(weights_TK[::2], want[1][::2])


@pytest.mark.parametrize("name", ["m_scale", "v_scale"])
def test_a_step_that_breaks_a_number_shows(name):
    """In what stands for the gradients' norm, which is the only number that is looked at."""
    for make in TWINS["adamw"]:
        for seed in (0, 1):  # blocks that are whole, and a shorter one at the end
            weight, grad, state, options, seed = CASES["adamw"](Case("adamw", tokens=3, seed=seed))
            state["m"][-1, -1] = 100  # no zero
            assert make(weight, grad, state, options | {"eps": 0.0}, seed).isfinite()
            state[name][-1] = float("inf")
            assert not make(weight, grad, state, options, seed).isfinite()


@pytest.mark.parametrize("tokens", [1, 3])
def test_attention_gives_the_same_bits_in_a_cache_of_any_capacity(tokens):
    """So a text goes on as it would have, when its cache has grown."""
    torch.manual_seed(0)
    heads, width, longest = 2, 32, 900
    cache = torch.randn(2, tokens, heads, longest + 1, width)
    q_TD, slot_T = torch.randn(tokens, heads * width), torch.arange(tokens, dtype=torch.int32)
    position_T = torch.full_like(slot_T, longest)
    counters = torch.zeros(512, dtype=torch.int32)
    outs = []
    for capacity in (960, 4096):
        keys, values = torch.nn.functional.pad(cache, (0, 0, 0, capacity - longest - 1))
        place = Place(keys.contiguous(), values.contiguous(), position_T, slot_T)
        outs.append(triton_ops.attend(q_TD, place, counters))
    assert torch.equal(*outs)
    torch.testing.assert_close(outs[0], torch_ops.attend(q_TD, place, counters))


@pytest.mark.parametrize("bits", [8, 4])
def test_experts_of_prompts_are_dequantised_in_pieces(bits, monkeypatch):
    torch.manual_seed(0)
    weight = torch.randn(3, 200, 64, dtype=torch.bfloat16)
    weight = Weight(*quantize(weight, bits), bits)
    x_NI = torch.randn(12, 64, dtype=torch.bfloat16)
    ends_E = torch.tensor([4, 4, 12], dtype=torch.int32)
    pieces = []

    def note(piece: Weight, dtype: torch.dtype) -> torch.Tensor:
        pieces.append(piece.data.shape[1])
        return torch_ops.matrix(piece, dtype)

    monkeypatch.setattr(experts_many, "matrix", note)
    monkeypatch.setattr(experts_many, "DEQUANTIZED", 3 * 64 * 100)
    out_NO = experts_many._library(x_NI, weight, ends_E)
    assert pieces == [64, 64, 64, 8]
    want_EIO = torch_ops.matrix(weight, torch.bfloat16).transpose(1, 2)
    torch.testing.assert_close(out_NO, torch.nn.functional.grouped_mm(x_NI, want_EIO, offs=ends_E))


def test_dropout_of_an_adapter():
    """What is dropped is zero, the rest larger; the backward pass drops the same."""
    gate_up, weights, p = torch.randn(40, 128), torch.rand(40), 0.25
    seed, others = seed_of(7), [seed_of(8), seed_of(7, salt=1)]
    act, dropped = fused.weighted_swiglu(gate_up, None, weights, p, seed)
    kept = dropped != 0
    assert_drops(act, dropped, p)
    for other in others:
        assert not torch.equal(
            kept, fused.weighted_swiglu(gate_up, None, weights, p, other)[1] != 0
        )
    low_grad, none = torch.randn(40, 64), torch.zeros(40, 64)
    have = fused.weighted_swiglu_backward(none, low_grad, gate_up, weights, True, p, seed)
    grad = low_grad * kept / (1 - p)
    want = plain.weighted_swiglu_backward(grad, None, gate_up, weights, True, 0.0, None)
    torch.testing.assert_close(have, want)
    torch.testing.assert_close(none, dropped)  # in its place


@pytest.mark.parametrize("ops", [fused, plain])
def test_dropout_without_a_mask(ops: ModuleType) -> None:
    """The same seed drops the same again, of other numbers too."""
    x, grad, p = torch.randn(40, 96), torch.randn(40, 96), 0.25
    dropped = ops.drop_out(x, p, seed_of(7))
    assert_drops(x, dropped, p)
    assert torch.equal(ops.drop_out(grad, p, seed_of(7)) != 0, dropped != 0)
    for other in (seed_of(8), seed_of(7, salt=1)):
        assert not torch.equal(ops.drop_out(x, p, other) != 0, dropped != 0)
    assert ops.drop_out(x, 0.0, None) is x


def seed_of(step: int, salt: int = 0) -> plain.Seed:
    return plain.Seed(torch.tensor(step), salt)


def assert_drops(x: torch.Tensor, dropped: torch.Tensor, p: float) -> None:
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], x[kept] / (1 - p))
    assert abs(kept.float().mean() - (1 - p)) < 0.02
    assert kept.float().mean(0).max() < 1


# No rows of 16, 32, 48, 80... numbers: with AVX-512, bitsandbytes 0.50.2 takes the scales of other
# blocks for those.
@pytest.mark.parametrize("shape", [(3, 96, 128), (5, 100), (3, 127, 85), (7,)], ids=str)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_unpacks_as_bitsandbytes(quant_type, double_quant, shape):
    """Bit by bit. (In bf16 the twin alone: Triton's interpreter does not round to the nearest.)"""
    functional = pytest.importorskip("bitsandbytes", reason="it quantises").functional
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) ** 3
    options = {"quant_type": quant_type, "compress_statistics": double_quant}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        packed, state = functional.quantize_4bit(weight.to(dtype), **options)
        with torch.compiler.set_stance("force_eager"):  # what it compiles takes seconds to
            want = functional.dequantize_4bit(packed, state)
        for ops in (plain,) if dtype == torch.bfloat16 else (plain, fused):
            torch.testing.assert_close(ops.unpack_4bit(packed, state), want, rtol=0, atol=0)
