"""Whether what a step has changed is finite: the weights that train, and the optimizer's states."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils import get_total_norm


def has_broken(model: nn.Module, optimizer: Any) -> torch.Tensor:
    """1 if a number of this process's part is NaN or inf, else 0: one int on the device.

    It reads all numbers once, and waits for nothing.
    """
    largest = get_total_norm([numbers for _, numbers in stepped(model, optimizer)], math.inf)
    return (~largest.isfinite()).int()


def broken_names(model: nn.Module, optimizer: Any) -> list[str]:
    """Names what holds NaN or inf. It waits for the device."""
    return [name for name, x in stepped(model, optimizer) if not x.isfinite().all()]


def stepped(model: nn.Module, optimizer: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields what a step changes, with names. Under ZeRO it is this process's part of it.

    States that are offloaded to the host are left out: looking through them would take long. The
    weights that are made of them are not.
    """
    names, devices = {}, set()
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            names[weight] = name
            devices.add(weight.device)
            numbers = getattr(weight, "ds_tensor", weight)  # ZeRO-3 leaves the weight itself empty
            if numbers.numel():
                yield name, numbers.detach()
    for weight, states in optimizer.state.items():
        for key, state in states.items():
            usable = torch.is_tensor(state) and state.is_floating_point() and state.numel()
            if usable and state.device in devices:
                yield f"{key} of {names.get(weight, 'the divided weights')}", state
