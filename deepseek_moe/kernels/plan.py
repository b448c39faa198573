"""Kernels of decoding are launched, or noted in a plan, by which they are compiled ahead."""

from contextvars import ContextVar
from typing import Any

Launch = tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]
"""A kernel, its grid, and its arguments by position and by name."""
planned: ContextVar[list[Launch] | None] = ContextVar("planned", default=None)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launches a kernel. If `planned` holds a list, it is noted there instead."""
    if (notes := planned.get()) is None:
        kernel[grid](*args, **options)
    else:
        notes.append((kernel, grid, args, options))
