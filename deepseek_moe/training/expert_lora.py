"""LoRA on the routed experts, in PEFT's format: x A B for each token's experts."""

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from .compute.grouped_experts import LowRank, grouped_experts_forward
from .quantized_base import full_shape


class ExpertsLora(ParamWrapper):
    """PEFT's wrapper of one stacked expert tensor, computing x A B instead of W + B A.

    As in PEFT, lora_A [E*R, I] has the experts slowest and lora_B [O, R*E] has them fastest, and a
    module with two adapted tensors is wrapped twice.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any):
        self.dropout_p = config.lora_dropout
        config = LoraConfig(**(config.to_dict() | {"lora_dropout": 0.0}))  # PEFT's cannot
        super().__init__(base_layer, adapter_name, config=config, **kwargs)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        # PEFT looks at the tensor, which is packed in 4 bits; it swaps the two by itself.
        self.num_experts, out_features, in_features = full_shape(self.get_param())
        self._param_ndim = 3
        return out_features, in_features

    def low_rank(self) -> list[LowRank]:
        """The active adapters."""
        found = []
        for name in self.active_adapters:
            if name in self.lora_A:
                a, b = self.lora_A[name].weight, self.lora_B[name].weight
                a_ERI = a.view(self.num_experts, -1, a.shape[1])
                b_ERO = b.view(b.shape[0], -1, self.num_experts).permute(2, 1, 0)
                dropout = self.dropout_p if self.training else 0.0
                found.append(LowRank(a_ERI * self.scaling[name], b_ERO, dropout))
        return found

    def forward(self, hidden_TD: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters or self.merged:
            return super().forward(hidden_TD, *args, **kwargs)
        adapters, module = {}, self
        while isinstance(module, ExpertsLora):
            adapters[module.parameter_name] = module.low_rank()
            module = module.base_layer
        return grouped_experts_forward(module, hidden_TD, *args, adapters=adapters, **kwargs)


ExpertsLora.__name__ = "ParamWrapper"  # PEFT knows by this name which wrappers it may wrap again
