"""The picks of many tokens, put in the order of the experts. Plain twin: `torch_ops.sort_picks`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .plan import launch

PICKS = 128  # that one program places
# Numbers that follow from the length of a prompt are not specialised: kernels are compiled once.


@triton.jit
def _read_picks(index_ptr, picks, BLOCK, E, EP):
    """The numbers of a program's picks, their experts, and for each expert whether it is that."""
    n_N = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    index_N = tl.load(index_ptr + n_N, mask=n_N < picks, other=E)
    e_E = tl.arange(0, EP)
    return n_N, index_N, ((index_N[:, None] == e_E[None, :]) & (e_E < E)[None, :]).to(tl.int32)


@triton.jit(do_not_specialize=["picks"])
def _count(index_ptr, counts_ptr, picks, BLOCK: tl.constexpr, E: tl.constexpr, EP: tl.constexpr):
    _, _, mine_NE = _read_picks(index_ptr, picks, BLOCK, E, EP)
    tl.store(counts_ptr + tl.program_id(0) * EP + tl.arange(0, EP), tl.sum(mine_NE, 0))


@triton.jit(do_not_specialize=["picks", "blocks"])
def _place(
    index_ptr,  # [T * K]
    counts_ptr,  # [blocks, EP]
    token_ptr,  # [T * K]
    place_ptr,  # [T * K]
    ends_ptr,  # [E]
    picks,
    blocks,
    BLOCK: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    K: tl.constexpr,
):
    pid = tl.program_id(0)
    e_E = tl.arange(0, EP)
    before_E = tl.zeros([EP], tl.int32)
    total_E = tl.zeros([EP], tl.int32)
    for b in range(blocks):
        counts_E = tl.load(counts_ptr + b * EP + e_E)
        total_E += counts_E
        before_E += tl.where(b < pid, counts_E, 0)
    ends_E = tl.cumsum(total_E, 0)
    if pid == 0:
        tl.store(ends_ptr + e_E, ends_E, mask=e_E < E)
    n_N, index_N, mine_NE = _read_picks(index_ptr, picks, BLOCK, E, EP)
    rank_NE = tl.cumsum(mine_NE, 0) - 1
    first_E = ends_E - total_E + before_E
    place_N = tl.sum(mine_NE * (rank_NE + first_E[None, :]), 1)  # 0 for picks of no expert
    tl.store(place_ptr + n_N, place_N, mask=n_N < picks)
    tl.store(token_ptr + place_N, n_N // K, mask=index_N < E)


def sort_picks(index_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `torch_ops.sort_picks`."""
    T, K = index_TK.shape
    blocks, padded = triton.cdiv(T * K, PICKS), triton.next_power_of_2(num_experts)
    counts = index_TK.new_empty(blocks, padded)
    token_N = index_TK.new_zeros(T * K)
    place_TK = torch.empty_like(index_TK)
    ends_E = index_TK.new_empty(num_experts)
    launch(_count, (blocks,), index_TK, counts, T * K, BLOCK=PICKS, E=num_experts, EP=padded)
    launch(_place, (blocks,),
        index_TK, counts, token_N, place_TK, ends_E, T * K, blocks,
        BLOCK=PICKS, E=num_experts, EP=padded, K=K, num_warps=4,
    )  # fmt: skip
    return token_N, place_TK, ends_E
