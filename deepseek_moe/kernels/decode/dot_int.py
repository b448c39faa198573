"""Products with int8 or int4 weights, whose format int_weights.py describes: P = 32 // BITS values
in a word, column j * W + w in word w of the W words of a row, a scale for each GROUP words.

For several tokens the values are made floats for the tensor cores. For one token that would take
longer than reading them. There the token's vector becomes integers of 16 bits instead, and the
products are of bytes, four an instruction.

Parameters in capitals are constants at compile time, as in dot.py.
"""

import triton
import triton.language as tl
from triton import knobs

from ..launch import wait

INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def int_value(words, j, BITS):
    """Value j of each word less its offset, fp32. Its bits are put into the mantissa of 2^23, which
    costs half of what converting an integer does."""
    if BITS == 4:
        return (((words >> (4 * j)) & 0xF) | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0
    else:
        return (((words >> (8 * j)) & 0xFF) | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0


@triton.jit
def dot_bytes(words, x, acc):
    """acc plus four products of the unsigned bytes of `words` and the signed ones of `x`, int32."""
    if INTERPRETED:
        for i in tl.static_range(4):
            acc += ((words >> (8 * i)) & 0xFF) * ((x << (24 - 8 * i)) >> 24)
        return acc
    return tl.inline_asm_elementwise(
        "dp4a.u32.s32 $0, $1, $2, $3;",
        "=r,r,r,r",
        [words, x, acc],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def fixed_point(square_QB, x_Q, g_ptr, column_QB, inside_QB, W, BITS, NORM, Q, BLOCK):
    """x (times g if NORM) of one token as integers of 16 bits, with a step for each column group.

    `x_Q` points to the first column of each of Q vectors, and the columns are words. What 16 bits
    lose is a hundredth of what bf16 has lost already.

    Returns the upper and lower bytes that meet the even values of each word, those that meet the
    odd ones (int4), the sums of x that the weights' offset multiplies, the steps [Q, groups], and
    `square` plus x^2.
    """
    P: tl.constexpr = 32 // BITS
    GROUP: tl.constexpr = 64 // P
    top_QB = tl.zeros([Q, BLOCK], tl.float32)
    for j in tl.static_range(P):
        x_QB = tl.load(x_Q[:, None] + j * W + column_QB, mask=inside_QB, other=0.0).to(tl.float32)
        if NORM:
            square_QB += x_QB * x_QB
            x_QB *= tl.load(g_ptr + j * W + column_QB, mask=inside_QB, other=0.0).to(tl.float32)
        top_QB = tl.maximum(top_QB, tl.abs(x_QB))
    top_QG = tl.max(tl.reshape(top_QB, [Q, BLOCK // GROUP, GROUP]), 2)
    steps_QG = 32639.0 / tl.maximum(top_QG, 1e-30)  # 127 * 257: both bytes fit
    steps_QGW = tl.broadcast_to(steps_QG[:, :, None], [Q, BLOCK // GROUP, GROUP])
    steps_QB = tl.reshape(steps_QGW, [Q, BLOCK])
    even_upper = tl.zeros([Q, BLOCK], tl.int32)
    even_lower = tl.zeros([Q, BLOCK], tl.int32)
    odd_upper = tl.zeros([Q, BLOCK], tl.int32)
    odd_lower = tl.zeros([Q, BLOCK], tl.int32)
    sum_QB = tl.zeros([Q, BLOCK], tl.int32)
    for j in tl.static_range(P):
        x_QB = tl.load(x_Q[:, None] + j * W + column_QB, mask=inside_QB, other=0.0).to(tl.float32)
        if NORM:
            x_QB *= tl.load(g_ptr + j * W + column_QB, mask=inside_QB, other=0.0).to(tl.float32)
        # 1.5 * 2^23 leaves no bits for fractions: the low ones are now the rounded integer's.
        bits_QB = (x_QB * steps_QB + 12582912.0).to(tl.int32, bitcast=True)
        sum_QB += bits_QB - 0x4B400000
        upper_QB = ((bits_QB + 128) >> 8) & 0xFF  # the lower byte counts from -128 to 127
        if BITS == 8:
            even_upper |= upper_QB << (8 * j)
            even_lower |= (bits_QB & 0xFF) << (8 * j)
        elif j % 2 == 0:
            even_upper |= upper_QB << (4 * j)
            even_lower |= (bits_QB & 0xFF) << (4 * j)
        else:
            odd_upper |= upper_QB << (4 * j - 4)
            odd_lower |= (bits_QB & 0xFF) << (4 * j - 4)
    steps_QG = top_QG / 32639.0
    return even_upper, even_lower, odd_upper, odd_lower, sum_QB, steps_QG, square_QB


@triton.jit
def dot_words(words, even_upper, even_lower, odd_upper, odd_lower, sum_x, BITS):
    """The sum of (value - offset) x of each word, int32. The vectors are broadcast to the words."""
    OFFSET: tl.constexpr = 2 ** (BITS - 1)
    even_upper, words = tl.broadcast(even_upper, words)
    even_lower = tl.broadcast_to(even_lower, words.shape)
    upper = tl.zeros(words.shape, tl.int32)
    lower = tl.broadcast_to(-OFFSET * sum_x, words.shape)
    if BITS == 4:
        odd = (words >> 4) & 0x0F0F0F0F
        words = words & 0x0F0F0F0F
        upper = dot_bytes(odd, tl.broadcast_to(odd_upper, words.shape), upper)
        lower = dot_bytes(odd, tl.broadcast_to(odd_lower, words.shape), lower)
    upper = dot_bytes(words, even_upper, upper)
    lower = dot_bytes(words, even_lower, lower)
    return upper * 256 + lower


@triton.jit
def dot_picks(x_Q, times_Q, ok_Q, w_QR, s_QR, W, BITS, Q, R, BLOCK, PDL):
    """sum_q times[q] * w[q, r] . x[q], fp32 [R], for the activations [P * W] of Q picks.

    `w_QR` and `s_QR` point to each row of each pick's expert. BLOCK is at least W. Unlike `dot_one`
    this reads the words of several experts at once, and begins before the activations are ready.
    """
    P: tl.constexpr = 32 // BITS
    GROUP: tl.constexpr = 64 // P
    column_B = tl.arange(0, BLOCK)[None, None, :]
    inside_QB = (column_B < W) & ok_Q[:, None, None]
    words_QRB = tl.load(w_QR[:, :, None] + column_B, mask=inside_QB, other=0)
    group_G = tl.arange(0, BLOCK // GROUP)[None, None, :]
    there_QG = (group_G < (W + GROUP - 1) // GROUP) & ok_Q[:, None, None]
    scale_QRG = tl.load(s_QR[:, :, None] + group_G, mask=there_QG, other=0.0).to(tl.float32)
    wait(PDL)
    square_QB = tl.zeros([Q, BLOCK], tl.float32)
    column_1B = tl.arange(0, BLOCK)[None, :]
    in_QB = (column_1B < W) & ok_Q[:, None]
    eu, el, ou, ol, sum_QB, steps_QG, square_QB = fixed_point(
        square_QB, x_Q, x_Q, column_1B, in_QB, W, BITS, False, Q, BLOCK
    )
    part_QRB = dot_words(
        words_QRB, eu[:, None, :], el[:, None, :], ou[:, None, :], ol[:, None, :],
        sum_QB[:, None, :], BITS,
    )  # fmt: skip
    part_QRG = tl.sum(tl.reshape(part_QRB, [Q, R, BLOCK // GROUP, GROUP]), 3).to(tl.float32)
    times_QG = steps_QG * times_Q[:, None]
    return tl.sum(tl.sum(part_QRG * scale_QRG * times_QG[:, None, :], 2), 0)
