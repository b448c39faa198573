"""The modules of a model in int8 or int4. They are exact and slow: the reference of every kernel.

kernels/int_weights.py describes the format.

Letters: O out, I in, W words a row, G groups a row, T tokens, K picks a token, D hidden.
"""

import torch
from torch import nn
from torch.nn import functional as F

from ..kernels.int_weights import dequantize, words_and_groups
from ..model.layout import EXPERT_STACKS
from ..model.modeling_deepseek import DeepseekExperts, loop_over_experts


class _Quantized(nn.Module):
    """Takes the place of `module`, whose `weights` become words [..., O, W] when the checkpoint is
    read. Beside each is a parameter of its scales [..., O, G]."""

    def __init__(self, module: nn.Module, weights: tuple[str, ...], bits: int) -> None:
        super().__init__()
        self.bits = bits
        for name in weights:
            weight = getattr(module, name)
            _, groups = words_and_groups(weight.shape[-1], bits)
            scale = weight.new_empty(*weight.shape[:-1], groups)
            # transformers casts what it reads to the dtype of the parameter that is there, which
            # must not be int32 yet.
            setattr(self, name, weight)
            setattr(self, f"{name}_scale", nn.Parameter(scale, requires_grad=False))


class QuantizedLinear(_Quantized):
    def __init__(self, linear: nn.Linear, bits: int) -> None:
        super().__init__(linear, ("weight",), bits)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = dequantize(self.weight, self.weight_scale, self.bits, x.dtype)
        return F.linear(x, weight, self.bias)


class QuantizedExperts(_Quantized):
    """It always loops over the experts: transformers' other ways through them
    (`experts_implementation`) cannot read words, so they do not apply."""

    def __init__(self, experts: DeepseekExperts, bits: int) -> None:
        super().__init__(experts, tuple(EXPERT_STACKS), bits)
        self.num_experts, self.act_fn = experts.num_experts, experts.act_fn

    def forward(
        self, hidden_TD: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """As `DeepseekExperts.forward`."""
        return loop_over_experts(self, hidden_TD, index_TK, weights_TK)

    def matrices(self, expert: int) -> tuple[torch.Tensor, ...]:
        """As `DeepseekExperts.matrices`; only these two are ever held in full."""
        stacks = [(getattr(self, name), getattr(self, f"{name}_scale")) for name in EXPERT_STACKS]
        return tuple(
            dequantize(words[expert], scale[expert], self.bits, scale.dtype)
            for words, scale in stacks
        )
