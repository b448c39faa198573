"""The way through the experts that training takes: one product for all of them, frozen or not.

transformers knows it as "grouped", beside its own implementations; the loop in
`DeepseekExperts.forward` is the reference for each. Different from transformers' "grouped_mm":

- frozen weights, which may be quantised, are unpacked when needed, in the backward pass again, and
  never kept for it;
- low-rank adapters are two thin products beside the base, x A B, instead of a sum W + B A of the
  size of all experts;
- the products follow autocast;
- on a GPU all between the products is fused (fused_experts.py).

Letters: T tokens, K experts a token, N = T*K picks, E experts, I in, O out, R rank.
"""

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import SiLUActivation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ...kernels import has_triton
from ..quantized_base import dequantize
from .fused_experts import Picks, fused_experts

GROUPED, RECOMPUTED = "grouped", "grouped_recomputed"
"""Names of the implementation; RECOMPUTED keeps nothing of gate and up for the backward pass."""
STACKS = ("gate_up_proj", "down_proj")


class LowRank(NamedTuple):
    """What an adapter adds to the product of a stack: dropout(x) A B for each expert."""

    a_ERI: torch.Tensor  # scaled
    b_ERO: torch.Tensor
    dropout: float

    def __call__(self, x_NI: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
        """[N, O] of x in the experts' order."""
        x_NI = F.dropout(x_NI, self.dropout) if self.dropout else x_NI
        return grouped_low_rank(x_NI, self.a_ERI, self.b_ERO, offsets_E)


Adapters = dict[str, list[LowRank]]
"""Of "gate_up_proj" and "down_proj"."""


@torch.compiler.disable  # for --torch_compile True: this is as fast as it gets
def grouped_experts_forward(
    experts: nn.Module,
    hidden_TD: torch.Tensor,
    index_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    adapters: Adapters | None = None,
) -> torch.Tensor:
    """As `DeepseekExperts.forward`, with `adapters` added."""
    T, K = index_TK.shape
    dtype = compute_dtype(hidden_TD)
    if _can_fuse(experts, hidden_TD, dtype, adapters or {}):
        return _fused_forward(experts, hidden_TD, index_TK, weights_TK, adapters or {}, dtype)
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

    # Where each pick went.
    back_N = torch.empty_like(order_N)
    back_N[order_N] = torch.arange(T * K, device=order_N.device)
    x_ND = _TakePicks.apply(hidden_TD.to(dtype), order_N // K, back_N.view(T, K))
    gate_NF, up_NF = linear(x_ND, "gate_up_proj").chunk(2, dim=-1)
    out_ND = linear(experts.act_fn(gate_NF) * up_NF, "down_proj")
    # Gathered back and summed, not added in place: that would be another sum in each run on a GPU.
    out_TKD = out_ND[back_N].view(T, K, -1)
    return (out_TKD * weights_TK.unsqueeze(-1)).sum(dim=1).to(hidden_TD.dtype)


class _TakePicks(torch.autograd.Function):
    """x[token_N], [N, D], whose backward pass sums the K gradients of each token in one order.

    The backward pass of indexing would add them to one row: on a CPU with several threads, in
    another order in each run. `back_TK` is where the picks of each token are among the N.
    """

    @staticmethod
    def forward(
        ctx: Any, x_TD: torch.Tensor, token_N: torch.Tensor, back_TK: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(back_TK)
        return x_TD[token_N]

    @staticmethod
    def backward(ctx: Any, grad_ND: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (back_TK,) = ctx.saved_tensors
        return grad_ND[back_TK].sum(dim=1), None, None


def _can_fuse(
    experts: nn.Module, hidden_TD: torch.Tensor, dtype: torch.dtype, adapters: Adapters
) -> bool:
    return (
        hidden_TD.is_cuda
        and torch.version.hip is None
        and has_triton()
        and dtype in (torch.bfloat16, torch.float16)
        and isinstance(experts.act_fn, nn.SiLU | SiLUActivation)
        and all(len(some) <= 1 for some in adapters.values())
    )


def _fused_forward(
    experts: nn.Module,
    hidden_TD: torch.Tensor,
    index_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    adapters: Adapters,
    dtype: torch.dtype,
    ops: ModuleType | None = None,
) -> torch.Tensor:
    """The same by `FusedExperts`; `ops` are the kernels, or their plain twins for tests."""
    if ops is None:
        from ...kernels.training import triton_ops as ops
    up, down = (next(iter(adapters.get(name, ())), None) for name in STACKS)
    token_N, place_TK, ends_E = ops.sort_picks(index_TK.int(), experts.num_experts)
    place_TK = place_TK.masked_fill(index_TK == experts.num_experts, -1)
    dropouts = [0.0 if low is None else low.dropout for low in (up, down)]
    seed = int(torch.randint(2**31 - 1, ())) if dropouts[1] else 0  # checkpointing draws it again
    # transformers keeps the name there that was chosen (integrations/moe.py); its setter is public.
    recompute = experts.config._experts_implementation == RECOMPUTED
    picks = Picks(ops, token_N, place_TK, ends_E, recompute, *dropouts, seed)
    stacks = []
    for name, low in zip(STACKS, (up, down), strict=True):
        factors = (None, None) if low is None else (low.a_ERI, low.b_ERO)
        stacks += [getattr(experts, name), *(_rows_of_16_bytes(m, dtype) for m in factors)]
    out_TD = fused_experts(picks, hidden_TD.to(dtype), weights_TK, *stacks)
    return out_TD.to(hidden_TD.dtype)


def _rows_of_16_bytes(factor_ERI: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A rank that grouped_mm takes, side by side."""
    if factor_ERI is None:
        return None
    if -factor_ERI.shape[1] % 8:
        factor_ERI = F.pad(factor_ERI, (0, 0, 0, -factor_ERI.shape[1] % 8))
    return factor_ERI.to(dtype, memory_format=torch.contiguous_format).contiguous()


def grouped_mm(
    x_NI: torch.Tensor, weight_EIO: torch.Tensor, offsets_E: torch.Tensor
) -> torch.Tensor:
    """x[n] @ weight[e] for the rows of each expert, which end at offsets[e]; x sorted by expert."""
    return F.grouped_mm(x_NI, weight_EIO, offs=offsets_E)


def grouped_low_rank(
    x_NI: torch.Tensor, a_ERI: torch.Tensor, b_ERO: torch.Tensor, offsets_E: torch.Tensor
) -> torch.Tensor:
    """x A B for each expert's rows, in the dtype of x, for any rank."""
    a_ERI, b_ERO = (_rows_of_16_bytes(m, x_NI.dtype) for m in (a_ERI, b_ERO))
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


def compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    """What products of `hidden` are in: autocast's dtype, or its own."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


for name in (GROUPED, RECOMPUTED):
    ALL_EXPERTS_FUNCTIONS.register(name, grouped_experts_forward)
