"""The kernel of the optimizer of --single_gpu_full."""

from types import ModuleType

import torch

from .. import runs_triton
from . import torch_ops


def ops_for(device: torch.device) -> ModuleType:
    """triton_ops on an NVIDIA GPU, elsewhere torch_ops."""
    if not runs_triton(device):
        return torch_ops
    from . import triton_ops

    return triton_ops
