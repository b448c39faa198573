"""The chosen experts of some layers train with their full weights; the other experts are frozen.

The stacks of such a layer hold the experts in another order: the chosen first. So the picks, sorted
by expert, begin with those of the chosen, and the gradient of these is one product over a part of
the picks. Memory for gradients and optimizer states is taken for the chosen only.

Letters: T tokens, K experts a token, E experts, C chosen experts of a layer, D hidden, F expert
width.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from ..model.layout import EXPERT_STACKS, official_parts
from ..model.modeling_deepseek import DeepseekExperts
from .compute.grouped_experts import grouped_experts_forward
from .quantized_base import full_shape, is_divided, is_quantized

CHOSEN = "chosen_"
"""How the name of a trained stack begins, beside the frozen stack of the rest of the name."""


class ChosenExperts(nn.Module):
    """Takes the place of a layer's `DeepseekExperts`, of which it has the stacks, now frozen.

    `chosen_gate_up_proj` [C, 2F, D] and `chosen_down_proj` [C, D, F] train. What the stacks have in
    their first C places means nothing. Where it can be, the trained weights are these places.
    """

    def __init__(self, experts: DeepseekExperts, chosen: Sequence[int]) -> None:
        super().__init__()
        self.num_experts, self.act_fn = experts.num_experts, experts.act_fn
        self.config = experts.config  # it says how `grouped_experts_forward` computes
        self.chosen = list(chosen)
        order_E = order_of_experts(self.chosen, self.num_experts)
        for name in EXPERT_STACKS:
            stack = getattr(experts, name).requires_grad_(False)
            trained = _first_in_order(stack, order_E, len(chosen))
            self.register_parameter(name, stack)
            self.register_parameter(CHOSEN + name, nn.Parameter(trained))
        place_E = torch.empty(self.num_experts + 1, dtype=torch.long)
        place_E[order_E] = torch.arange(self.num_experts)
        place_E[-1] = self.num_experts  # a pick that another rank computes
        self.register_buffer("place_E", place_E.to(stack.device), persistent=False)

    def forward(
        self, hidden_TD: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """What `DeepseekExperts` computes. `index_TK` has the official numbers."""
        trained = {name: getattr(self, CHOSEN + name) for name in EXPERT_STACKS}
        place_TK = self.place_E[index_TK]
        return grouped_experts_forward(self, hidden_TD, place_TK, weights_TK, trained=trained)


def order_of_experts(chosen: Sequence[int], num_experts: int) -> torch.Tensor:
    """The official numbers [E] of a layer's experts in the order of its stacks."""
    return torch.tensor([*chosen, *(e for e in range(num_experts) if e not in chosen)])


def _first_in_order(stack: nn.Parameter, order_E: torch.Tensor, count: int) -> torch.Tensor:
    """Brings the experts of `stack` into order, and returns the first `count` of them: a view, or
    a copy if ZeRO-3 has divided the stack.

    A quantised stack was brought into order before; its experts are to be filled in.
    """
    if is_quantized(stack):
        shape = (count, *full_shape(stack)[1:])
        return torch.empty(shape, dtype=torch.bfloat16, device=stack.device)
    if is_divided(stack):
        import deepspeed

        with deepspeed.zero.GatheredParameters(stack, modifier_rank=0):
            return _first_in_whole_order(stack, order_E, count).clone()
    return _first_in_whole_order(stack, order_E, count)


def _first_in_whole_order(stack: nn.Parameter, order_E: torch.Tensor, count: int) -> torch.Tensor:
    stack.data.copy_(stack.data[order_E.to(stack.device)])
    return stack.data[:count]


def train_chosen_experts(model: PreTrainedModel, chosen: Mapping[int, Sequence[int]]) -> None:
    """Lets the experts `chosen` of each layer train; layers that have none stay as they are."""
    for number, experts in chosen.items():
        mlp = model.model.layers[number].mlp
        mlp.experts = ChosenExperts(mlp.experts, experts)
    if chosen:
        model.register_state_dict_post_hook(_drop_frozen)
        model.register_load_state_dict_post_hook(_miss_only_trained)


def _drop_frozen(
    model: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, metadata: Any
) -> None:
    """Leaves in `state_dict`, which DeepSpeed saves, only what trains. Of quantised weights it has
    scales too, which `load_state_dict` would not take."""
    trained = {prefix + name for name, one in model.named_parameters() if one.requires_grad}
    for name in state_dict.keys() - trained:
        del state_dict[name]


def _miss_only_trained(model: nn.Module, incompatible: Any) -> None:
    """Lets `load_state_dict` do without what `_drop_frozen` has left out."""
    frozen = {name for name, one in model.named_parameters() if not one.requires_grad}
    missing = incompatible.missing_keys
    missing[:] = [name for name in missing if name not in frozen]


def has_chosen_experts(model: nn.Module) -> bool:
    return any(isinstance(module, ChosenExperts) for module in model.modules())


def is_of_chosen(name: str) -> bool:
    """Whether the parameter `name` stands for a part of a frozen stack, which counts already."""
    return f".experts.{CHOSEN}" in name


def trained_parts(model: nn.Module) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """Yields the official name of each tensor that trains, the name of the parameter in memory that
    holds it, and its index there."""
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        prefix, _, own = name.rpartition(".")
        if not parameter.requires_grad:
            continue
        if not is_of_chosen(name):
            for official, where in official_parts(name, tuple(full_shape(parameter))):
                yield official, name, where
            continue
        places = {expert: place for place, expert in enumerate(modules[prefix].chosen)}
        shape = (modules[prefix].num_experts, *full_shape(parameter)[1:])
        for official, (expert, rows) in official_parts(f"{prefix}.{own[len(CHOSEN) :]}", shape):
            if expert in places:
                yield official, name, (places[expert], rows)


def read_trained(model: nn.Module, files: Sequence[Path]) -> None:
    """Fills what trains with the numbers that it has in safetensors `files`. Dtypes stay.

    Raises:
        ValueError: a tensor is not there.
    """
    opened = [safe_open(file, framework="pt") for file in files]
    places = {name: file for file in opened for name in file.keys()}  # noqa: SIM118 - not a dict
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for official, name, where in trained_parts(model):
            if official not in places:
                raise ValueError(f"{files[0].parent} lacks {official}")
            parameters[name][where].copy_(places[official].get_tensor(official))
