// SPDX-License-Identifier: MIT
/*
 * exp: e^x in float32 with the same bits everywhere.
 *
 * For the learned variance of row_update, where libm would differ between CPU and GPU. As in philox.h: explicit fma, compiled with
 * -ffp-contract=off (nvcc: products meet sums only inside fmaf), no table, no division. x = n ln 2 + r with |r| <= ln(2)/2; e^r is its
 * Taylor series to r^7, whose remainder is 5e-9; the error of the whole is below 1.2e-7 relative. Above 88 the result is infinite,
 * below -87 it is 0; a NaN stays one.
 */
#ifndef KERN_EXP_H
#define KERN_EXP_H
#include "kernels/philox.h"

PHILOX_FN float kern_expf(float x) {
    const float magic = 0x1.8p23f; // adding it rounds to a whole number, which then stands in the low bits
    float z = fmaf(x, 0x1.715476p0f, magic), n = z - magic;
    float r = fmaf(n, -0x1.62e430p-1f, x); // ln 2 = 0x1.62e430p-1 - 0x1.05c610p-29
    r = fmaf(n, 0x1.05c610p-29f, r);
    float p = 0x1.a01a02p-13f; // 1/5040
    p = fmaf(p, r, 0x1.6c16c2p-10f);
    p = fmaf(p, r, 0x1.111112p-7f);
    p = fmaf(p, r, 0x1.555556p-5f);
    p = fmaf(p, r, 0x1.555556p-3f);
    p = fmaf(p, r, 0.5f);
    p = fmaf(p, r, 1.0f);
    p = fmaf(p, r, 1.0f);
    p *= philox_bits_float((philox_float_bits(z) << 23) + 0x3f800000u); // 2^n
    return x > 88.0f ? INFINITY : x < -87.0f ? 0.0f : p;
}

#endif
