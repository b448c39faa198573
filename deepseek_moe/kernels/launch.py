"""How kernels are launched, how they follow each other, and how the programs of one meet.

Kernels are launched with programmatic dependence (PDL) where the GPU has it (Hopper and later): a
kernel's programs start, and load weights, while the kernel before is still running, and wait for
its results at `wait`. Before that they may read weights, what earlier steps left, and what the
kernel before the last wrote: the last one let this one start only after it had waited itself.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .int_weights import Weight


@triton.jit
def swiglu(gate, up):
    return gate * tl.sigmoid(gate) * up


def scale_of(weight: Weight) -> torch.Tensor:
    """A pointer to give to a kernel, which does not read it where there are no scales."""
    return weight.data if weight.scale is None else weight.scale


def padded_tokens(T: int) -> int:
    """Columns of a tile that holds T tokens: tensor cores take no fewer than 16."""
    return 1 if T == 1 else max(16, triton.next_power_of_2(T))


class Tile(NamedTuple):
    """How a kernel cuts its work: rows and words a program reads at once, its warps, and how many
    reads ahead it makes where it loops."""

    rows: int
    block: int
    warps: int = 4
    stages: int = 4


TILES = {
    ("qkv", 1, 16): Tile(4, 1024, 4),
    ("o", 1, 16): Tile(4, 2048, 4),
    ("head", 1, 16): Tile(4, 2048, 4),
    ("route", 1, 16): Tile(4, 1024, 4),
    ("gate_up", 1, 16): Tile(4, 2048, 8),
    ("down", 1, 16): Tile(2, 1024, 4),
    ("qkv", 1, 8): Tile(16, 512, 4),
    ("o", 1, 8): Tile(8, 512, 4),
    ("route", 1, 8): Tile(16, 512, 4),
    ("gate_up", 1, 8): Tile(16, 512, 4),
    ("head", 1, 8): Tile(16, 512, 4),
    ("down", 1, 8): Tile(8, 512, 8),
    ("qkv", 1, 4): Tile(16, 256, 2),
    ("o", 1, 4): Tile(4, 256, 2),
    ("route", 1, 4): Tile(16, 256, 4),
    ("gate_up", 1, 4): Tile(16, 256, 2),
    ("down", 1, 4): Tile(8, 256, 4),
    ("few", 2, 16): Tile(64, 128, 4, 5),
    ("few", 2, 8): Tile(64, 64, 4, 3),
    ("few", 2, 4): Tile(64, 64, 4, 3),
    ("grouped", 2, 16): Tile(64, 128, 4, 4),
    ("grouped", 2, 8): Tile(64, 64, 4, 3),
    ("grouped", 2, 4): Tile(64, 32, 4, 3),
}
"""Measured on an H200: the kernel, one token or several, bits."""


def tile_of(kernel: str, T: int, bits: int, words: int) -> Tile:
    """The measured tile, no wider than a row."""
    tile = TILES.get((kernel, min(T, 2), bits)) or TILES["few" if T > 1 else "o", min(T, 2), bits]
    return tile._replace(block=max(16, min(tile.block, triton.next_power_of_2(words))))


@functools.cache
def has_dependent_launch() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


def launch_options(warps: int) -> dict[str, int | bool]:
    """num_warps, and programmatic dependent launch where the GPU has it."""
    if not has_dependent_launch():
        return {"num_warps": warps, "PDL": False}
    return {"num_warps": warps, "PDL": True, "launch_pdl": True}


@triton.jit
def wait(PDL: tl.constexpr):
    """Until the kernels before this one are complete and their results can be read."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def arrive_last(counter_ptr, count):
    """True in the last of `count` programs to come here, which sees what the others have written
    (read with cache_modifier=".cg": the first-level cache may hold what was there before). The
    counter is 0 again afterwards."""
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == count - 1
    if last:
        tl.store(counter_ptr, 0)
    tl.debug_barrier()
    return last
