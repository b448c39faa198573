"""Every kernel equals its plain twin: in Triton's interpreter here, on a GPU by check_gpu.py."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
if torch.cuda.is_available():
    pytest.skip("on a GPU, benchmarks/check_gpu.py checks them", allow_module_level=True)

from kernel_cases import CASES, Case, agree

from deepseek_moe.kernels import fused, plain

BITS = [16, 8, 4]
NAMES = sorted(CASES)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", NAMES)
def test_equals_its_plain_twin(name: str, bits: int, tokens: int) -> None:
    case = Case(tokens=tokens, bits=bits, dtype=torch.float32, device="cpu", seed=tokens)
    # One token's packed weights are unpacked in a way that costs a fortieth of bf16's rounding.
    agree(name, case, tolerance=5e-4 if bits < 16 and tokens == 1 else 2e-5)


def test_dropout_of_an_adapter() -> None:
    """What is dropped is zero, the rest larger; the backward pass drops the same."""
    gate_up, weights, p = torch.randn(60, 256), torch.rand(60), 0.25
    act, dropped = fused.open_gates(gate_up, None, weights, p, 7)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], act[kept] / (1 - p))
    assert abs(kept.float().mean() - (1 - p)) < 0.02
    assert kept.float().mean(0).max() < 1
    assert not torch.equal(kept, fused.open_gates(gate_up, None, weights, p, 8)[1] != 0)
    low_grad, none = torch.randn(60, 128), torch.zeros(60, 128)
    have = fused.close_gates(none, low_grad, gate_up, weights, True, p, 7)
    want = plain.close_gates(low_grad * kept / (1 - p), None, gate_up, weights, True, 0.0, 0)
    torch.testing.assert_close(have[0], want[0])
    torch.testing.assert_close(have[1], want[1])
    torch.testing.assert_close(have[2], dropped)
