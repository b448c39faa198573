"""AdamW of 8 bits without waits takes the steps of bitsandbytes' own."""

import pytest
import torch
from bitsandbytes.optim import AdamW

from deepseek_moe.training.compute.bitsandbytes_adamw import UnwaitingAdamW


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_same_bits(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU was found")
    found = []
    for kind in (AdamW, UnwaitingAdamW):
        source = torch.Generator().manual_seed(0)
        weights = [torch.randn(n, 64, generator=source).to(device) for n in (1, 100, 300)]
        weights = [torch.nn.Parameter(weight) for weight in weights]
        idle = torch.nn.Parameter(torch.ones(2, device=device))
        optimizer = kind([*weights, idle], lr=1e-2, weight_decay=0.1, optim_bits=8)
        for _ in range(3):
            for weight in weights:
                weight.grad = torch.randn(weight.shape, generator=source).to(device)
            optimizer.step()
        states = [optimizer.state[weight] for weight in weights]
        numbers = [x for state in states for x in state.values() if torch.is_tensor(x)]
        assert states[2]["state1"].dtype == torch.uint8 and idle not in optimizer.state
        found.append([*weights, *numbers])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
