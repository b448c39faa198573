"""Every kernel equals its plain twin: in Triton's interpreter here, on a GPU by check_gpu.py."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
if torch.cuda.is_available():
    pytest.skip("on a GPU, benchmarks/check_gpu.py checks them", allow_module_level=True)

from kernel_cases import CASES, Case, agree

BITS = [16, 8, 4]
NAMES = sorted(CASES)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", NAMES)
def test_equals_its_plain_twin(name: str, bits: int, tokens: int) -> None:
    case = Case(tokens=tokens, bits=bits, dtype=torch.float32, device="cpu", seed=tokens)
    # One token's packed weights are unpacked in a way that costs a fortieth of bf16's rounding.
    agree(name, case, tolerance=5e-4 if bits < 16 and tokens == 1 else 2e-5)
