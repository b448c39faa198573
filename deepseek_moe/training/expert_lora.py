"""LoRA on the routed experts in PEFT's format, computed as x A B for the experts of each token.

PEFT has no public way to compute adapters of a stacked tensor differently. The names of PEFT 0.21
that this file relies on, and nothing else in this package:

- `LoraConfig._register_custom_module` (tuners/lora/config.py), which PEFT calls experimental.
- `ParamWrapper._get_in_out_features` and `_param_ndim` (tuners/lora/layer.py).
- The name "ParamWrapper": `BaseTuner._inject_parameters` (tuners/tuners_utils.py) compares the name
  of a wrapper's class to see whether it may wrap a second parameter of the same module.

tests/training/test_expert_lora.py fails if one of them changes.
"""

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import layer as peft_layer
from torch import nn

from ..model.modeling_deepseek import DeepseekExperts
from .compute.grouped_experts import LowRank, grouped_experts_forward
from .quantized_base import full_shape


def register_expert_lora(config: LoraConfig) -> None:
    """Makes PEFT wrap the routed experts that `config` targets by the class below."""
    config._register_custom_module({DeepseekExperts: ParamWrapper})


class ParamWrapper(peft_layer.ParamWrapper):
    """PEFT's wrapper of one stacked expert tensor, but it computes x A B instead of W + B A.

    lora_A [E*R, I] has the experts slowest and lora_B [O, R*E] has them fastest. A module with two
    adapted tensors is wrapped twice.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any):
        self.dropout_p = config.lora_dropout
        config = LoraConfig(**(config.to_dict() | {"lora_dropout": 0.0}))  # PEFT refuses it here
        super().__init__(base_layer, adapter_name, config=config, **kwargs)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        # PEFT would take the shape of the tensor, which is another one in 4 bits. PEFT swaps the
        # two numbers afterwards.
        self.num_experts, out_features, in_features = full_shape(self.get_param())
        self._param_ndim = 3
        return out_features, in_features

    def low_rank(self) -> LowRank | None:
        """The active adapters as one, whose rank is the sum of theirs; None if there is none."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        if not names:
            return None
        as_, bs = [], []
        for name in names:
            a, b = self.lora_A[name].weight, self.lora_B[name].weight
            as_.append(a.view(self.num_experts, -1, a.shape[1]) * self.scaling[name])
            bs.append(b.view(b.shape[0], -1, self.num_experts).permute(2, 1, 0))
        a_ERI, b_ERO = torch.cat(as_, 1), torch.cat(bs, 1)
        return LowRank(a_ERI, b_ERO, self.dropout_p if self.training else 0.0)

    def forward(self, hidden_TD: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters or self.merged:
            return super().forward(hidden_TD, *args, **kwargs)
        adapters, module = {}, self
        while isinstance(module, ParamWrapper):
            if (low_rank := module.low_rank()) is not None:
                adapters[module.parameter_name] = low_rank
            module = module.base_layer
        return grouped_experts_forward(module, hidden_TD, *args, adapters=adapters, **kwargs)
