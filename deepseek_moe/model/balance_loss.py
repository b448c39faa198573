"""The balance loss of DeepSeekMoE, which keeps the router from always picking the same experts.

Letters that suffix locals: G sequences, T tokens, K experts a token, E experts.
"""

from typing import Any, NamedTuple

import torch
from torch import distributed as dist


class Sequences(NamedTuple):
    """Which tokens of a batch the balance loss counts together, the same for all layers."""

    number_T: torch.Tensor | None = None  # from 0, -1 for padding; None: each row is a sequence
    count: int = 0
    aux_loss_scale: float = 1.0  # multiplies the gradient of the balance loss
    weight_G: torch.Tensor | None = None  # how much each counts; None: alike, 1 in sum


def weights_of_rows(
    tokens: torch.Tensor,
    labels: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    num_items_in_batch: torch.Tensor | int | None,
) -> torch.Tensor | None:
    """How much the balance loss of each row counts under a trainer other than this package's.

    transformers' Trainer gives the number of labels in all batches of a step, of all processes, and
    then multiplies the loss by the number of processes. A row counts as its labels do, without the
    first, which no token predicts. Trainer keeps the labels back where the loss is computed outside
    of the model. A row then counts as its tokens do, but the rows of a batch no more than 1 in sum,
    since some of their tokens may have no label.
    """
    if num_items_in_batch is None:
        return None
    world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if labels is not None:
        return (labels[:, 1:] != -100).sum(dim=1) * (world / num_items_in_batch)
    if attention_mask is None or attention_mask.shape != tokens.shape[:2]:
        attention_mask = tokens.new_ones(tokens.shape[:2])
    weights_B = (attention_mask[:, 1:] != 0).sum(dim=1) * (world / num_items_in_batch)
    return weights_B / weights_B.sum().clamp(min=1)


def balance_loss(
    scores_TE: torch.Tensor,
    index_TK: torch.Tensor,
    sequence_T: torch.Tensor,
    num_sequences: int,
    weight_G: torch.Tensor | None = None,
) -> torch.Tensor:
    """How unevenly the experts are used: 1 if all are used alike, up to E if all tokens pick one.

    sum_e f_e * P_e, where f_e is the number of picks of expert e over its even share, and P_e its
    mean score (equations 12 to 14 of the paper), in each sequence, averaged over the sequences, or
    weighted by `weight_G`. Only P carries gradient. `sequence_T` numbers the sequence of each token
    from 0 to `num_sequences` - 1; tokens of a negative number do not count.
    """
    if weight_G is None:
        weight_G = scores_TE.new_full((num_sequences,), 1 / num_sequences)
    with torch.autocast(scores_TE.device.type, enabled=False):
        return _BalanceLoss.apply(scores_TE, index_TK, sequence_T, weight_G)


class _BalanceLoss(torch.autograd.Function):
    """Keeps one number for each sequence and expert. Autograd would keep which token is in which
    sequence: with many short ones in a batch, that is more than all else that is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        scores_TE: torch.Tensor,
        index_TK: torch.Tensor,
        sequence_T: torch.Tensor,
        weight_G: torch.Tensor,
    ) -> torch.Tensor:
        E, K = scores_TE.shape[-1], index_TK.shape[-1]
        numbers_G1 = torch.arange(len(weight_G), device=scores_TE.device)[:, None]
        member_GT = (sequence_T == numbers_G1).to(scores_TE.dtype)
        length_G1 = member_GT.sum(dim=1, keepdim=True).clamp(min=1)  # all may be padding
        picked_TE = torch.zeros_like(scores_TE).scatter_(1, index_TK, 1.0)
        f_GE = member_GT @ picked_TE * (E / K) / length_G1
        P_GE = member_GT @ scores_TE / length_G1
        ctx.save_for_backward(f_GE * weight_G[:, None] / length_G1, sequence_T)
        return (f_GE * P_GE).sum(dim=1) @ weight_G

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        share_GE, sequence_T = ctx.saved_tensors
        share_TE = share_GE[sequence_T.clamp(min=0)]
        return grad * share_TE * (sequence_T >= 0)[:, None], None, None, None


class AddLossGradient(torch.autograd.Function):
    """Returns `hidden`, and gives `loss` the gradient that it would have as a part of the model's
    loss. So the published model trains its router from inside the layer."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        ctx.loss_dtype = loss.dtype
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return grad, torch.ones((), dtype=ctx.loss_dtype, device=grad.device)
