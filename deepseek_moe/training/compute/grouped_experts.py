"""The experts implementation "grouped": transformers calls it where the model's config names it.

Unlike transformers' own "grouped_mm" it follows autocast, takes quantised weights, and computes
adapters as two thin products beside the base, x A B, instead of a sum W + B A of the size of all
experts. What stands between the products is fused on a GPU (fused_experts.py).

Letters: T tokens, K experts a token, E experts, I in, O out, R rank.
"""

from types import ModuleType
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import SiLUActivation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ...errors import UserError
from ...kernels.training import ops_for, torch_ops
from ...kernels.training.torch_ops import Seed
from ...model.layout import EXPERT_STACKS
from .fused_experts import Picks, fused_experts

GROUPED, RECOMPUTED = "grouped", "grouped_recomputed"
"""Names of the implementation; RECOMPUTED keeps nothing of gate and up for the backward pass."""


class LowRank(NamedTuple):
    """An adapter of one stack. It adds dropout(x) A B to the product with each expert."""

    a_ERI: torch.Tensor  # scaled
    b_ERO: torch.Tensor
    dropout: float
    seed: Seed | None = None  # of the dropout; None: drawn


@torch.compiler.disable  # a compiled graph would not be faster, and cannot hold these Functions
def grouped_experts_forward(
    experts: nn.Module,
    hidden_TD: torch.Tensor,
    index_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    adapters: dict[str, LowRank] | None = None,
    trained: dict[str, nn.Parameter] | None = None,
) -> torch.Tensor:
    """Computes what `DeepseekExperts.forward` does, and adds `adapters`, named by their stacks.

    Of each stack that `trained` names, it has the weights of the first experts, those that train.

    Raises:
        UserError: the experts have another activation than SiLU.
    """
    refuse_other_than_silu(experts)
    dtype = compute_dtype(hidden_TD)
    ops = ops_of(hidden_TD.device, dtype)
    token_N, place_TK, ends_E = ops.sort_picks(index_TK.int(), experts.num_experts)
    place_TK = place_TK.masked_fill(index_TK == experts.num_experts, -1)
    stacks, dropouts, seeds = [], [], []
    for name in EXPERT_STACKS:
        a_ERI, b_ERO, dropout, seed = (adapters or {}).get(name, (None, None, 0.0, None))
        factors = [_with_aligned_rank(factor, dtype) for factor in (a_ERI, b_ERO)]
        stack = getattr(experts, name)
        weights = (trained[name], stack) if trained else (stack, None)
        stacks.append((*weights, *factors))
        dropouts.append(dropout)
        seeds.append(seed or (new_seed(hidden_TD.device) if dropout else None))
    # transformers keeps the name there that was chosen (integrations/moe.py); its setter is public.
    recompute = experts.config._experts_implementation == RECOMPUTED
    picks = Picks(ops, token_N, place_TK, ends_E, recompute, *dropouts, *seeds)
    return fused_experts(picks, hidden_TD.to(dtype), weights_TK, *stacks).to(hidden_TD.dtype)


def ops_of(device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The kernels, which are tried in 16 bits only, or their twins."""
    return torch_ops if dtype.itemsize > 2 else ops_for(device)


def new_seed(device: torch.device) -> Seed:
    """A random seed. Checkpointing, which brings random numbers back, draws it again."""
    return Seed(torch.randint(2**31 - 1, (), device=device), 0)


def refuse_other_than_silu(module: nn.Module) -> None:
    """Checks `module.act_fn`, which the kernels do not call."""
    if not isinstance(module.act_fn, nn.SiLU | SiLUActivation):
        found = type(module.act_fn).__name__
        raise UserError(f"this model computes {found}; fine-tune one whose hidden_act is silu")


def _with_aligned_rank(factor_ERI: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """The factor in `dtype`, with zeros added to its rank up to a multiple of 8: grouped_mm takes
    only rows of whole 16 bytes."""
    if factor_ERI is None:
        return None
    if missing := -factor_ERI.shape[1] % 8:
        factor_ERI = F.pad(factor_ERI, (0, 0, 0, missing))
    return factor_ERI.to(dtype, memory_format=torch.contiguous_format).contiguous()


def compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    """The dtype of products with `hidden`: autocast's, or its own."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


for name in (GROUPED, RECOMPUTED):
    ALL_EXPERTS_FUNCTIONS.register(name, grouped_experts_forward)
