"""Triton kernels. Each has a twin in torch of the same name and signature in a file torch_ops.py,
which says what both compute. `decode/` holds those of the engine, `training/` those of fine-tuning,
`optimizer/` that of its optimizer, and what serves several of them stands beside them.
"""

import functools

import torch


@functools.cache
def has_triton() -> bool:
    """Whether kernels can be compiled. Triton comes with PyTorch for NVIDIA GPUs on Linux."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def runs_triton(device: torch.device) -> bool:
    """Whether kernels can be compiled for `device`: an NVIDIA GPU."""
    return device.type == "cuda" and torch.version.hip is None and has_triton()
