"""Products of rows of a weight with the vectors of one or a few tokens.

A weight is [O, I] in the model's dtype (BITS 16, where a word is a number), or the words of
int_weights.py: P = 32 // BITS columns in each of the W = I // P words of a row, and a scale for
each GROUP words. One token needs no pass of its own for RMSNorm: with h the hidden state, g the
norm's weight and r = rsqrt(mean(h^2) + eps),

    W norm(h) = r * (W (g * h)),

so the sum of squares is gathered beside the product, and r multiplies the result. For several
tokens x must be ready for the tensor cores, so `elementwise.add_norm` makes it before.

Parameters in capitals are constants at compile time. Those that all functions share: W and BITS as
above; R rows; BLOCK words of a row that are read at once; NORM whether norm(x) is multiplied, with
g as the norm's weight, instead of x; PDL whether to `wait` before x is read. `w_R` and `s_R` point
to the first word and the first scale of each row.
"""

import triton
import triton.language as tl

from ..launch import swiglu, wait
from .dot_int import dot_words, fixed_point, int_value


@triton.jit
def _scales(s_R, at, W, GROUP, BLOCK):
    """The scales [R, BLOCK / GROUP] of the words from `at` on."""
    group_G = at // GROUP + tl.arange(0, BLOCK // GROUP)
    there_G = group_G < (W + GROUP - 1) // GROUP
    return tl.load(s_R[:, None] + group_G[None, :], mask=there_G[None, :], other=0.0)


@triton.jit
def dot_one(acc_RA, square_B, x_ptr, g_ptr, w_R, s_R, times, W, BITS, NORM, R, BLOCK, PDL):
    """Adds times * w[r, i] * x[i] to acc[r, .], and x^2 to square, for x [P * W] of one token.

    The caller sums acc over its last axis A, which is BLOCK, or BLOCK over the words of a group.
    """
    P: tl.constexpr = 1 if BITS == 16 else 32 // BITS
    GROUP: tl.constexpr = 64 // P
    for at in tl.static_range(0, W, BLOCK):
        column_B = at + tl.arange(0, BLOCK)
        inside_B = column_B < W
        words_RB = tl.load(w_R[:, None] + column_B[None, :], mask=inside_B[None, :], other=0)
        if BITS != 16:
            scale_RG = _scales(s_R, at, W, GROUP, BLOCK)
        if at == 0:
            wait(PDL)
        if BITS == 16:
            x_B = tl.load(x_ptr + column_B, mask=inside_B, other=0.0).to(tl.float32)
            if NORM:
                square_B += x_B * x_B
                x_B *= tl.load(g_ptr + column_B, mask=inside_B, other=0.0).to(tl.float32)
            acc_RA += words_RB.to(tl.float32) * (x_B * times)[None, :]
        else:
            square_1B = tl.zeros([1, BLOCK], tl.float32)
            x_1 = x_ptr + tl.zeros([1], tl.int32)
            eu, el, ou, ol, sum_1B, steps_1G, square_1B = fixed_point(
                square_1B, x_1, g_ptr, column_B[None, :], inside_B[None, :], W, BITS, NORM, 1, BLOCK
            )
            square_B += tl.reshape(square_1B, [BLOCK])
            part_RB = dot_words(words_RB, eu, el, ou, ol, sum_1B, BITS)
            part_RG = tl.sum(tl.reshape(part_RB, [R, BLOCK // GROUP, GROUP]), 2).to(tl.float32)
            acc_RA += part_RG * (scale_RG.to(tl.float32) * (steps_1G * times))
    return acc_RA, square_B


@triton.jit
def product_one(x_ptr, g_ptr, eps, w_R, s_R, W, BITS, NORM, R, BLOCK, PDL):
    """w x or w norm(x) of one token, fp32 [R]."""
    P: tl.constexpr = 1 if BITS == 16 else 32 // BITS
    A: tl.constexpr = BLOCK * P // (1 if BITS == 16 else 64)
    acc_RA = tl.zeros([R, A], tl.float32)
    square_B = tl.zeros([BLOCK], tl.float32)
    acc_RA, square_B = dot_one(
        acc_RA, square_B, x_ptr, g_ptr, w_R, s_R, 1.0, W, BITS, NORM, R, BLOCK, PDL
    )
    out_R = tl.sum(acc_RA, 1)
    if NORM:
        out_R *= tl.rsqrt(tl.sum(square_B, 0) / (P * W) + eps)
    return out_R


@triton.jit
def dot_few(acc_RT, x_T, ok_T, w_R, s_R, W, BITS, R, BLOCK, STAGES):
    """Adds w x to acc[r, t] on the tensor cores. `x_T` points to the first column of each token."""
    P: tl.constexpr = 1 if BITS == 16 else 32 // BITS
    GROUP: tl.constexpr = 64 // P
    for at in tl.range(0, W, BLOCK, num_stages=STAGES):
        column_B = at + tl.arange(0, BLOCK)
        inside_B = column_B < W
        words_RB = tl.load(w_R[:, None] + column_B[None, :], mask=inside_B[None, :], other=0)
        if BITS != 16:
            scale_RG = _scales(s_R, at, W, GROUP, BLOCK)
            scale_RGB = tl.broadcast_to(scale_RG[:, :, None], [R, BLOCK // GROUP, GROUP])
            scale_RB = tl.reshape(scale_RGB, [R, BLOCK]).to(tl.float32)
        for j in tl.static_range(P):
            ok_BT = inside_B[:, None] & ok_T[None, :]
            x_BT = tl.load(x_T[None, :] + j * W + column_B[:, None], mask=ok_BT, other=0.0)
            if BITS == 16:
                acc_RT = tl.dot(words_RB, x_BT, acc_RT, input_precision="ieee")
            else:
                weight_RB = (int_value(words_RB, j, BITS) * scale_RB).to(x_BT.dtype)
                acc_RT = tl.dot(weight_RB, x_BT, acc_RT, input_precision="ieee")
    return acc_RT


@triton.jit
def product(x_ptr, g_ptr, eps, w_R, s_R, T, TP, W, BITS, NORM, R, BLOCK, STAGES, PDL):
    """The products of w with x [T, P * W], fp32: for one token [R, 1], which NORM applies to; else
    [R, TP], where TP >= T is a power of two."""
    P: tl.constexpr = 1 if BITS == 16 else 32 // BITS
    if T == 1:
        out_RT = product_one(x_ptr, g_ptr, eps, w_R, s_R, W, BITS, NORM, R, BLOCK, PDL)[:, None]
    else:
        wait(PDL)
        t_T = tl.arange(0, TP)
        out_RT = tl.zeros([R, TP], tl.float32)
        out_RT = dot_few(
            out_RT, x_ptr + t_T * (P * W), t_T < T, w_R, s_R, W, BITS, R, BLOCK, STAGES
        )
    return out_RT


@triton.jit
def halves(x_RT, R, TP):
    """The first R / 2 rows, and the others."""
    return tl.split(tl.permute(tl.reshape(x_RT, [2, R // 2, TP]), [1, 2, 0]))


@triton.jit
def swiglu_rows(first, F, R):
    """The rows of a weight [2 * F, .], gate above up, that a program reads: R / 2 of gate, from
    `first` on, and the R / 2 of up that belong to them."""
    r_R = tl.arange(0, R)
    return r_R // (R // 2) * F + tl.minimum(first + r_R % (R // 2), F - 1)


@triton.jit
def store_swiglu(out_ptr, place_T, ok_T, out_RT, first, F, R, TP):
    """Of the products of `swiglu_rows`: silu(gate) * up into out[place[t], first:] of rows of F."""
    gate_RT, up_RT = halves(out_RT, R, TP)
    f_R = first + tl.arange(0, R // 2)
    ok_RT = (f_R < F)[:, None] & ok_T[None, :]
    tl.store(out_ptr + place_T[None, :] * F + f_R[:, None], swiglu(gate_RT, up_RT), mask=ok_RT)
