"""Triton kernels, each beside a twin in torch of the same name and signature.

`decode/` holds those of the engine, `training/` those of fine-tuning. `launch`, `dispatch` and
`int_weights` serve both, and `torch_ops` holds the twins of the first two.
"""

import functools


@functools.cache
def has_triton() -> bool:
    """Whether kernels can be compiled. Triton comes with PyTorch for NVIDIA GPUs on Linux."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True
