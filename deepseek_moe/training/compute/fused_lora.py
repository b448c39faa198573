"""Frozen linear layers with adapters, in few passes over memory: what a GPU takes in training.

What PEFT computes, arranged so that little passes through memory and little is kept:

- of layers that read the same input the As are one matrix, and the input drops out once for all
- every sum is made by a product, in place
- of dropout only what is kept is known, not the product; the input itself is kept by others too
- frozen weights, which may be in 4 bits, are unpacked for the backward pass once more

The plain twin is PEFT's own forward of each layer (which drops out for each apart).

Letters: T tokens, I in, O out, R rank.
"""

from typing import Any, NamedTuple

import bitsandbytes as bnb
import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from torch.nn import functional as F

from ..quantized_base import dequantize
from .fused_experts import drop_again, drop_out
from .grouped_experts import compute_dtype


class Adapted(NamedTuple):
    """A frozen layer and its adapter."""

    weight_OI: torch.Tensor  # in 4 bits or not
    a_RI: torch.Tensor
    b_OR: torch.Tensor
    scaling: float
    dropout: float


def linears(x: torch.Tensor, *layers: nn.Module) -> list[torch.Tensor]:
    """What each layer makes of x [..., I]."""
    adapted = [_adapted(layer) for layer in layers]
    alike = None not in adapted and len({one[-2:] for one in adapted}) == 1
    if not alike and len(layers) > 1:
        return [out for layer in layers for out in linears(x, layer)]
    if not alike:
        return [layers[0](x)]
    weights, as_, bs, (scaling, *_), (dropout, *_) = zip(*adapted, strict=True)
    x_TI = x.flatten(0, -2).to(compute_dtype(x))
    outs = FusedLinears.apply(scaling, dropout, weights, x_TI, *as_, *bs)
    return [out_TO.view(*x.shape[:-1], -1) for out_TO in outs]


def _adapted(layer: nn.Module) -> Adapted | None:
    """None: not what `FusedLinears` computes."""
    if not isinstance(layer, LoraLayer) or layer.disable_adapters or layer.merged:
        return None
    base, names = layer.base_layer, [n for n in layer.active_adapters if n in layer.lora_A]
    if len(names) != 1 or layer.lora_variant or not isinstance(base, nn.Linear):
        return None
    a, b, dropout = (part[names[0]] for part in (layer.lora_A, layer.lora_B, layer.lora_dropout))
    if base.bias is not None or b.bias is not None or base.weight.requires_grad:
        return None
    if isinstance(base.weight, bnb.nn.Int8Params):  # whose products are in 8 bits too
        return None
    if hasattr(base.weight, "ds_id"):  # divided by ZeRO-3, and whole only inside its module
        return None
    p = dropout.p if isinstance(dropout, nn.Dropout) and layer.training else 0.0
    return Adapted(base.weight, a.weight, b.weight, layer.scaling[names[0]], p)


class FusedLinears(torch.autograd.Function):
    """Arguments: x [T, I] in the dtype of the products, then all As and all Bs. Gives [T, O] for
    each of `weights`."""

    @staticmethod
    def forward(
        ctx: Any,
        scaling: float,
        dropout: float,
        weights: tuple[torch.Tensor, ...],
        x_TI: torch.Tensor,
        *factors: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        as_, bs = factors[: len(weights)], factors[len(weights) :]
        ranks = [len(a_RI) for a_RI in as_]
        a_RI = (torch.cat(as_) * scaling).to(x_TI.dtype)
        bs = [b_OR.to(x_TI.dtype) for b_OR in bs]
        dropped_TI, kept_TI = drop_out(x_TI, dropout)
        low_TR = dropped_TI @ a_RI.T
        ctx.save_for_backward(x_TI, kept_TI, low_TR, a_RI, *bs)
        ctx.scaling, ctx.dropout, ctx.ranks = scaling, dropout, ranks
        ctx.weights = weights  # the parameters themselves, not copies
        return tuple(
            F.linear(x_TI, dequantize(weight_OI, x_TI.dtype)).addmm_(low, b_OR.T)
            for weight_OI, low, b_OR in zip(weights, low_TR.split(ranks, 1), bs, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        x_TI, kept_TI, low_TR, a_RI, *bs = ctx.saved_tensors
        lows = low_TR.split(ctx.ranks, 1)
        grad_bs = [grad_TO.T @ low for grad_TO, low in zip(grads, lows, strict=True)]
        low_grads = [grad_TO @ b_OR for grad_TO, b_OR in zip(grads, bs, strict=True)]
        low_grad_TR = torch.cat(low_grads, 1) if len(grads) > 1 else low_grads[0]
        dropped_TI = drop_again(x_TI, kept_TI, ctx.dropout)
        grad_a_RI = (low_grad_TR.T @ dropped_TI).float() * ctx.scaling
        del dropped_TI
        grad_TI = None
        if ctx.needs_input_grad[3]:
            grad_TI = drop_again(low_grad_TR @ a_RI, kept_TI, ctx.dropout)
            for grad_TO, weight_OI in zip(grads, ctx.weights, strict=True):
                grad_TI.addmm_(grad_TO, dequantize(weight_OI, grad_TI.dtype))
        return None, None, None, grad_TI, *grad_a_RI.split(ctx.ranks), *grad_bs
