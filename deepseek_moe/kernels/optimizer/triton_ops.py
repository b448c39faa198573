"""The kernel of the optimizer, under the name of its twin in torch_ops.py."""

# ruff: noqa: F401

from .adamw import adamw
