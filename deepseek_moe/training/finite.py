"""Whether what a step has changed is finite: the weights that train, and the optimizer's states."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils import get_total_norm


def names_of_trained(model: nn.Module) -> dict[nn.Parameter, str]:
    """The weights that train. The walk to them takes longer than to look through them."""
    return {weight: name for name, weight in model.named_parameters() if weight.requires_grad}


def has_broken(names: Mapping[nn.Parameter, str], optimizer: Any) -> torch.Tensor:
    """1 if a number of this process's part is NaN or inf, else 0: one int on the device.

    It reads all numbers once, and waits for nothing.
    """
    largest = get_total_norm([numbers for _, numbers in stepped(names, optimizer)], math.inf)
    return (~largest.isfinite()).int()


def broken_names(names: Mapping[nn.Parameter, str], optimizer: Any) -> list[str]:
    """Names what holds NaN or inf. It waits for the device."""
    return [name for name, x in stepped(names, optimizer) if not x.isfinite().all()]


def stepped(
    names: Mapping[nn.Parameter, str], optimizer: Any
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields what a step changes, with names. Under ZeRO it is this process's part of it.

    States that are offloaded to the host are left out: looking through them would take long. The
    weights that are made of them are not.
    """
    devices = {weight.device for weight in names}
    for weight, name in names.items():
        numbers = getattr(weight, "ds_tensor", weight)  # ZeRO-3 leaves the weight itself empty
        if numbers.numel():
            yield name, numbers.detach()
    for weight, states in optimizer.state.items():
        for key, state in states.items():
            usable = torch.is_tensor(state) and state.is_floating_point() and state.numel()
            if usable and state.device in devices:
                yield f"{key} of {names.get(weight, 'the divided weights')}", state
