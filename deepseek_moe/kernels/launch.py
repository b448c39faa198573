"""How kernels are launched, how they follow each other, and how the programs of one meet.

Where the GPU has it (Hopper and later), kernels are launched with programmatic dependence (PDL). A
kernel's programs then start, and load weights, while the kernel before is still running, and wait
for its results at `wait`. Before that they may read weights, what earlier steps left, and what the
kernel before the last wrote, since the last one let this one start after its own `wait`.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .int_weights import Weight


@triton.jit
def swiglu(gate, up):
    return gate * tl.sigmoid(gate) * up


def scale_of(weight: Weight) -> Tensor:
    """The scales as a kernel takes them; without scales something that it does not read."""
    return weight.data if weight.scale is None else weight.scale


def padded_tokens(T: int) -> int:
    """Columns of a tile that holds T tokens. Tensor cores take no fewer than 16."""
    return 1 if T == 1 else max(16, triton.next_power_of_2(T))


class Tile(NamedTuple):
    """How a kernel cuts its work: the rows and words that a program reads at once, its warps, and
    how many reads ahead it makes in a loop."""

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
"""By kernel, one token or several (2), and bits: measured on an H200."""


def tile_of(kernel: str, T: int, bits: int, words: int) -> Tile:
    """The measured tile, no wider than a row."""
    tile = TILES.get((kernel, min(T, 2), bits)) or TILES["few" if T > 1 else "o", min(T, 2), bits]
    return tile._replace(block=max(16, min(tile.block, triton.next_power_of_2(words))))


def product_options(kernel: str, T: int, weight: Weight) -> dict[str, int | bool]:
    """What every kernel is told that multiplies with a weight: how it is stored, and its tile."""
    words = weight.data.shape[-1]
    tile = tile_of(kernel, T, weight.bits, words)
    stored = {"W": words, "GROUPS": weight.groups, "BITS": weight.bits}
    cut = {"R": tile.rows, "BLOCK": tile.block, "STAGES": tile.stages}
    return stored | cut | launch_options(tile.warps)


@functools.cache
def launch_options(warps: int) -> dict[str, int | bool]:
    """num_warps, and programmatic dependent launch where the GPU has it."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0):
        return {"num_warps": warps, "PDL": True, "launch_pdl": True}
    return {"num_warps": warps, "PDL": False}


@triton.jit
def wait(PDL: tl.constexpr):
    """Waits until the kernels before this one are complete and their results can be read."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def arrive_last(counter_ptr, count):
    """True in the last of `count` programs that come here. The counter is 0 again afterwards.

    The last program sees what the others have written, if it reads with cache_modifier=".cg": the
    first-level cache may hold what was there before.
    """
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == count - 1
    if last:
        tl.store(counter_ptr, 0)
    tl.debug_barrier()
    return last
