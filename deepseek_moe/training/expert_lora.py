"""LoRA on the routed experts in PEFT's format, computed as x A B for the experts of each token.

PEFT has no public way to compute adapters of a stacked tensor differently. The names of PEFT 0.21
that this file relies on, and nothing else in this package:

- `LoraConfig._register_custom_module` (tuners/lora/config.py), which PEFT calls experimental.
- `ParamWrapper._get_in_out_features` and `_param_ndim` (tuners/lora/layer.py).
- The name "ParamWrapper": `BaseTuner._inject_parameters` (tuners/tuners_utils.py) compares the name
  of a wrapper's class to see whether it may wrap a second parameter of the same module.

tests/training/test_expert_lora.py fails if one of them changes.

Adapters may train for chosen experts only. Then lora_A and lora_B hold nothing of the others, whose
adapters are zero. On disk they have PEFT's layout for all experts.

Letters: E experts, C chosen ones, R rank, I in, O out.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
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


def keep_experts(model: nn.Module, chosen: Mapping[int, Sequence[int]]) -> None:
    """Leaves only the adapters of the `chosen` experts of each layer.

    Raises:
        ValueError: other layers have adapters of experts.
    """
    found = list(_wrappers(model))
    if (layers := {layer for _, layer, _ in found}) != set(chosen):
        raise ValueError(f"its experts have adapters in layers {sorted(layers)}")
    for _, layer, wrapper in found:
        wrapper.keep_experts(chosen[layer])


def chosen_in(model: nn.Module) -> dict[int, list[int]]:
    """The experts that `keep_experts` left in `model`, by layer; empty if it left all."""
    found = _wrappers(model)
    return {layer: one.chosen_C.tolist() for _, layer, one in found if one.chosen_C is not None}


def with_all_experts(
    model: nn.Module, state: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """`state`, which has the trained parameters of `model` by their names, in PEFT's layout: with
    zeros as the adapters of experts that were not chosen."""
    whole = dict(state)
    for name, _, wrapper in _wrappers(model):
        for key in [key for key in whole if key.startswith(f"{name}.lora_")]:
            whole[key] = wrapper.with_zeros(whole[key], is_a=".lora_A." in key)
    return whole


def zeros_left_out(model: nn.Module) -> int:
    """How many numbers `with_all_experts` would add."""
    added = 0
    for _, _, wrapper in _wrappers(model):
        factors = [*wrapper.lora_A.parameters(), *wrapper.lora_B.parameters()]
        if wrapper.chosen_C is not None:
            kept, missing = len(wrapper.chosen_C), wrapper.num_experts - len(wrapper.chosen_C)
            added += sum(factor.numel() for factor in factors) // kept * missing
    return added


def _wrappers(model: nn.Module) -> Iterator[tuple[str, int, "ParamWrapper"]]:
    """The name of each wrapper, the number of its layer, and itself."""
    for name, module in model.named_modules():
        if isinstance(module, ParamWrapper):
            yield name, int(re.search(r"layers\.(\d+)\.", name)[1]), module


class ParamWrapper(peft_layer.ParamWrapper):
    """PEFT's wrapper of one stacked expert tensor, but it computes x A B instead of W + B A.

    lora_A [E*R, I] has the experts slowest and lora_B [O, R*E] has them fastest; of chosen experts
    they are [C*R, I] and [O, R*C]. A module with two adapted tensors is wrapped twice.
    """

    chosen_C: torch.Tensor | None
    """The experts that have an adapter; None: all of them."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any):
        self.dropout_p = config.lora_dropout
        config = LoraConfig(**(config.to_dict() | {"lora_dropout": 0.0}))  # PEFT refuses it here
        super().__init__(base_layer, adapter_name, config=config, **kwargs)
        self.register_buffer("chosen_C", None, persistent=False)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        # PEFT would take the shape of the tensor, which is another one in 4 bits. PEFT swaps the
        # two numbers afterwards.
        self.num_experts, out_features, in_features = full_shape(self.get_param())
        self._param_ndim = 3
        return out_features, in_features

    def keep_experts(self, experts: Sequence[int]) -> None:
        """Leaves only the adapters of these experts."""
        self.chosen_C = torch.tensor(experts, device=next(self.lora_A.parameters()).device)
        for factors, is_a in ((self.lora_A, True), (self.lora_B, False)):
            for linear in factors.values():
                linear.weight = nn.Parameter(self._without_zeros(linear.weight.detach(), is_a))
        self.register_load_state_dict_pre_hook(_take_chosen)

    def with_zeros(self, factor: torch.Tensor, is_a: bool) -> torch.Tensor:
        """lora_A or lora_B of the chosen experts -> that of all, zero for the others."""
        if self.chosen_C is None:
            return factor
        C, E = len(self.chosen_C), self.num_experts
        stack = factor.unflatten(0, (C, -1)) if is_a else factor.unflatten(1, (-1, C))
        shape = (E, *stack.shape[1:]) if is_a else (*stack.shape[:2], E)
        index = self.chosen_C.to(stack.device)
        whole = stack.new_zeros(shape).index_copy(0 if is_a else 2, index, stack)
        return whole.flatten(0, 1) if is_a else whole.flatten(1)

    def _without_zeros(self, factor: torch.Tensor, is_a: bool) -> torch.Tensor:
        """lora_A or lora_B of all experts -> that of the chosen ones."""
        E, index = self.num_experts, self.chosen_C.to(factor.device)
        if is_a:
            return factor.unflatten(0, (E, -1)).index_select(0, index).flatten(0, 1)
        return factor.unflatten(1, (-1, E)).index_select(2, index).flatten(1)

    def low_rank(self) -> LowRank | None:
        """The active adapters as one, whose rank is the sum of theirs; None if there is none."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        if not names:
            return None
        as_, bs = [], []
        for name in names:
            a = self.with_zeros(self.lora_A[name].weight, is_a=True)
            b = self.with_zeros(self.lora_B[name].weight, is_a=False)
            as_.append(a.view(self.num_experts, -1, a.shape[1]) * self.scaling[name])
            bs.append(b.view(b.shape[0], -1, self.num_experts).permute(2, 1, 0))
        a_ERI, b_ERO = torch.cat(as_, 1), torch.cat(bs, 1)
        dropout, seed = (
            self.dropout_p if self.training else 0.0,
            getattr(self, "dropout_seed", None),
        )
        return LowRank(a_ERI, b_ERO, dropout, seed)

    def forward(self, hidden_TD: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters or self.merged:
            return super().forward(hidden_TD, *args, **kwargs)
        adapters, module = {}, self
        while isinstance(module, ParamWrapper):
            if (low_rank := module.low_rank()) is not None:
                adapters[module.parameter_name] = low_rank
            module = module.base_layer
        return grouped_experts_forward(module, hidden_TD, *args, adapters=adapters, **kwargs)


def _take_chosen(
    module: ParamWrapper,
    state: dict[str, torch.Tensor],
    prefix: str,
    _metadata: Any,
    _strict: bool,
    _missing: list[str],
    _unexpected: list[str],
    errors: list[str],
) -> None:
    """Takes the adapters of the chosen experts from a saved state that has those of all."""
    for name, parameter in module.named_parameters():
        key = f"{prefix}{name}"
        if name.startswith("lora_") and key in state and state[key].shape != parameter.shape:
            saved, is_a = state[key], name.startswith("lora_A.")
            state[key] = module._without_zeros(saved, is_a)
            if state[key].count_nonzero() != saved.count_nonzero():
                errors.append(f"{key} has adapters of experts that were not chosen")
