"""Every kernel equals its twin in torch, in the sizes of the official model.

On a CPU tests/kernels does the same with small sizes, in Triton's interpreter.
"""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from kernel_cases import assert_twins_agree, official_cases

pytestmark = pytest.mark.gpu
OUTPUTS = 1e-2
"""The relative distance that outputs may have when they are rounded to 16 bits."""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU was found")
@pytest.mark.parametrize("case", official_cases(), ids=str)
def test_equals_its_twin(case):
    assert_twins_agree(case, OUTPUTS)
    torch.cuda.empty_cache()  # Other processes share the memory.
