"""Frozen linear layers with adapters, in few passes over memory.

They compute what PEFT does, and keep little for the backward pass:

- The As of layers that share an input are one matrix, and the input drops out once for all of them.
- Every sum is added in place by a product.
- Dropout keeps nothing: each pass drops again what the seed says.
- The input is kept, as by other layers anyway.
- Frozen weights, which may be in 4 bits, are dequantised in each of the two passes.

The plain twin is PEFT's own forward of each layer, where the input drops out for each by itself.

Letters: T tokens, I in, O out, R rank.
"""

from typing import Any, NamedTuple

import bitsandbytes as bnb
import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from torch.nn import functional as F

from ...kernels.training.torch_ops import Seed
from ..quantized_base import dequantize, is_divided
from .grouped_experts import compute_dtype, new_seed, ops_of


class Adapted(NamedTuple):
    """A frozen layer and its adapter."""

    weight_OI: torch.Tensor  # 4 bits or more
    a_RI: torch.Tensor
    b_OR: torch.Tensor
    scaling: float
    dropout: float
    seed: Seed | None  # of the dropout; None: drawn


def linears(x: torch.Tensor, *layers: nn.Module) -> list[torch.Tensor]:
    """The output [..., O] of each layer for x [..., I]: together if their adapters have the same
    scale and dropout, else one by one, by their own forward where `FusedLinears` cannot."""
    adapted = [_adapted(layer) for layer in layers]
    if len(layers) == 1 and adapted[0] is None:
        return [layers[0](x)]
    if None in adapted or len({(one.scaling, one.dropout) for one in adapted}) > 1:
        return [out for layer in layers for out in linears(x, layer)]
    weights, as_, bs, (scaling, *_), (dropout, *_), (seed, *_) = zip(*adapted, strict=True)
    x_TI = x.flatten(0, -2).to(compute_dtype(x))
    seed = seed or (new_seed(x.device) if dropout else None)
    outs = FusedLinears.apply(scaling, (dropout, seed), weights, x_TI, *as_, *bs)
    return [out_TO.view(*x.shape[:-1], -1) for out_TO in outs]


def _adapted(layer: nn.Module) -> Adapted | None:
    """The parts of `layer`, or None if `FusedLinears` does not compute it."""
    if not isinstance(layer, LoraLayer) or layer.disable_adapters or layer.merged:
        return None
    base, names = layer.base_layer, [n for n in layer.active_adapters if n in layer.lora_A]
    if len(names) != 1 or layer.lora_variant or not isinstance(base, nn.Linear):
        return None
    a, b, dropout = (part[names[0]] for part in (layer.lora_A, layer.lora_B, layer.lora_dropout))
    if base.bias is not None or b.bias is not None or base.weight.requires_grad:
        return None
    # Products with 8-bit weights are in 8 bits too.
    if isinstance(base.weight, bnb.nn.Int8Params) or is_divided(base.weight):
        return None
    p = dropout.p if isinstance(dropout, nn.Dropout) and layer.training else 0.0
    seed = getattr(layer, "dropout_seed", None)
    return Adapted(base.weight, a.weight, b.weight, layer.scaling[names[0]], p, seed)


class FusedLinears(torch.autograd.Function):
    """x W^T + dropout(x) A^T B^T * scaling, [T, O], for each of `weights`.

    x [T, I] has the dtype of the products. `factors` are all As, then all Bs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        scaling: float,
        dropout: tuple[float, Seed | None],
        weights: tuple[torch.Tensor, ...],
        x_TI: torch.Tensor,
        *factors: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        as_, bs = factors[: len(weights)], factors[len(weights) :]
        ranks = [len(a_RI) for a_RI in as_]
        a_RI = (torch.cat(as_) * scaling).to(x_TI.dtype)
        bs = [b_OR.to(x_TI.dtype) for b_OR in bs]
        low_TR = ops_of(x_TI.device, x_TI.dtype).drop_out(x_TI, *dropout) @ a_RI.T
        ctx.save_for_backward(x_TI, low_TR, a_RI, *bs)
        ctx.scaling, ctx.dropout, ctx.ranks = scaling, dropout, ranks
        ctx.weights = weights  # the parameters themselves, not copies
        return tuple(
            F.linear(x_TI, dequantize(weight_OI, x_TI.dtype)).addmm_(low, b_OR.T)
            for weight_OI, low, b_OR in zip(weights, low_TR.split(ranks, 1), bs, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        x_TI, low_TR, a_RI, *bs = ctx.saved_tensors
        drop_out = ops_of(x_TI.device, x_TI.dtype).drop_out
        lows = low_TR.split(ctx.ranks, 1)
        grad_bs = [grad_TO.T @ low for grad_TO, low in zip(grads, lows, strict=True)]
        low_grads = [grad_TO @ b_OR for grad_TO, b_OR in zip(grads, bs, strict=True)]
        low_grad_TR = torch.cat(low_grads, 1) if len(grads) > 1 else low_grads[0]
        grad_a_RI = (low_grad_TR.T @ drop_out(x_TI, *ctx.dropout)).float() * ctx.scaling
        grad_TI = None
        if ctx.needs_input_grad[3]:
            grad_TI = drop_out(low_grad_TR @ a_RI, *ctx.dropout)
            for grad_TO, weight_OI in zip(grads, ctx.weights, strict=True):
                grad_TI.addmm_(grad_TO, dequantize(weight_OI, grad_TI.dtype))
        return None, None, None, grad_TI, *grad_a_RI.split(ctx.ranks), *grad_bs
