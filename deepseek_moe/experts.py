"""The way through the experts that training takes: one product for all of them, frozen or not.

transformers knows it as "grouped", beside its own implementations; the loop in
`DeepseekExperts.forward` is the reference for each. Different from transformers' "grouped_mm":

- frozen weights, which may be quantised, are unpacked when needed, in the backward pass again, and
  never kept for it;
- low-rank adapters are two thin products beside the base, x A B, instead of a sum W + B A of the
  size of all experts;
- the products follow autocast.

Letters: T tokens, K experts a token, N = T*K picks, E experts, I in, O out, R rank.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .quantization import dequantize

NAME = "grouped"
Adapter = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(x [N, I] in the experts' order, offsets [E]) -> what to add to the product, [N, O]."""


def grouped_experts_forward(
    experts: nn.Module,
    hidden_TD: torch.Tensor,
    index_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    adapters: dict[str, list[Adapter]] | None = None,
) -> torch.Tensor:
    """As `DeepseekExperts.forward`, with `adapters` of "gate_up_proj" and "down_proj" added."""
    T, K = index_TK.shape
    dtype = _compute_dtype(hidden_TD)
    expert_N, order_N = index_TK.flatten().sort(stable=True)  # picks of an expert side by side
    numbers_E = torch.arange(experts.num_experts, device=expert_N.device)
    offsets_E = torch.searchsorted(expert_N, numbers_E, right=True).int()

    def linear(x_NI: torch.Tensor, name: str) -> torch.Tensor:
        weight_EOI = getattr(experts, name)
        if weight_EOI.requires_grad:
            out_NO = grouped_mm(x_NI, weight_EOI.to(dtype).transpose(1, 2), offsets_E)
        else:
            out_NO = _FrozenGroupedLinear.apply(x_NI, weight_EOI, offsets_E)
        for adapter in (adapters or {}).get(name, ()):
            out_NO = out_NO + adapter(x_NI, offsets_E)
        return out_NO

    x_ND = hidden_TD.to(dtype)[order_N // K]
    gate_NF, up_NF = linear(x_ND, "gate_up_proj").chunk(2, dim=-1)
    out_ND = linear(experts.act_fn(gate_NF) * up_NF, "down_proj")
    # Gathered back and summed, not added in place: that would be another sum in each run on a GPU.
    back_N = torch.empty_like(order_N)
    back_N[order_N] = torch.arange(T * K, device=order_N.device)
    out_TKD = out_ND[back_N].view(T, K, -1)
    return (out_TKD * weights_TK.unsqueeze(-1)).sum(dim=1).to(hidden_TD.dtype)


def grouped_mm(x_NI: torch.Tensor, weight_EIO: torch.Tensor, offsets_E: torch.Tensor):
    """x[n] @ weight[e] for the rows of each expert, which end at offsets[e]; x sorted by expert."""
    return F.grouped_mm(x_NI, weight_EIO, offs=offsets_E)


def grouped_low_rank(
    x_NI: torch.Tensor, a_ERI: torch.Tensor, b_ERO: torch.Tensor, offsets_E: torch.Tensor
) -> torch.Tensor:
    """x A B for each expert's rows, in the dtype of x, for any rank."""
    pad = -a_ERI.shape[1] % 8  # grouped_mm wants rows of whole 16 bytes, side by side
    a_ERI, b_ERO = (F.pad(m.to(x_NI.dtype), (0, 0, 0, pad)).contiguous() for m in (a_ERI, b_ERO))
    return grouped_mm(grouped_mm(x_NI, a_ERI.transpose(1, 2), offsets_E), b_ERO, offsets_E)


class _FrozenGroupedLinear(torch.autograd.Function):
    """x W^T for each expert's rows. W may be quantised: it is unpacked here and, for the gradient
    of x, in the backward pass once more."""

    @staticmethod
    def forward(
        ctx: Any, x_NI: torch.Tensor, weight_EOI: torch.Tensor, offsets_E: torch.Tensor
    ) -> torch.Tensor:
        ctx.weight_EOI = weight_EOI  # the module's own parameter, not a copy
        ctx.save_for_backward(offsets_E)
        return grouped_mm(x_NI, dequantize(weight_EOI, x_NI.dtype).transpose(1, 2), offsets_E)

    @staticmethod
    def backward(ctx: Any, grad_NO: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (offsets_E,) = ctx.saved_tensors
        weight_EOI = dequantize(ctx.weight_EOI, grad_NO.dtype)
        return grouped_mm(grad_NO.contiguous(), weight_EOI, offsets_E), None, None


def _compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


ALL_EXPERTS_FUNCTIONS.register(NAME, grouped_experts_forward)
