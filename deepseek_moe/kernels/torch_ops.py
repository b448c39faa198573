"""What the kernels that both rooms use compute, in torch."""

import torch
from torch import Tensor
from torch.nn import functional as F


def sort_picks(index_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gives each pick a place, so that those of one expert lie side by side, in the tokens' order.

    Returns the token of each place [N], the place of each pick [T, K], and where the places of each
    expert end [E], all int32. Picks of no expert have place 0, and leave places of token 0 at the
    end.
    """
    T, K = index_TK.shape
    expert_N, order_N = index_TK.flatten().sort(stable=True)
    numbers_E = torch.arange(num_experts, device=expert_N.device, dtype=expert_N.dtype)
    ends_E = torch.searchsorted(expert_N, numbers_E, right=True)
    place_N = torch.empty_like(order_N)
    place_N[order_N] = torch.arange(T * K, device=order_N.device)
    place_TK = place_N.view(T, K).masked_fill(index_TK == num_experts, 0)
    token_N = (order_N // K).masked_fill(expert_N == num_experts, 0)
    return token_N.int(), place_TK.int(), ends_E.int()


def swiglu(gate_up_NF: Tensor) -> Tensor:
    """silu(gate) * up, [N, F], of [N, 2F]."""
    gate_NF, up_NF = gate_up_NF.float().chunk(2, dim=-1)
    return (F.silu(gate_NF) * up_NF).to(gate_up_NF.dtype)
