"""How kernels follow each other, and how the programs of one meet.

Kernels are launched with programmatic dependence (PDL) where the GPU has it (Hopper and later): a
kernel's programs start, and load weights, while the kernel before is still running, and wait for
its results at `wait`. Before that they may read weights, what earlier steps left, and what the
kernel before the last wrote: the last one let this one start only after it had waited itself.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


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
