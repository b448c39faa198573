"""Packages that need not be there."""

import functools


@functools.cache
def has_triton() -> bool:
    """Whether kernels can be compiled: Triton comes with PyTorch for NVIDIA GPUs on Linux."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True
