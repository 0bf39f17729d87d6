// SPDX-License-Identifier: MIT
// The vectorised loops of picture.h, once for every width; the including file defines what simd_body.h lists, and PICTURE, the
// table's name.
#include "kernels/cpu/picture.h"
#include "kernels/cpu/simd_math.h"

#include <math.h>

INLINE void prepare_lines(float *y, const float *x, const float *coef, size_t n, int C, bool silu) {
    size_t width = (size_t)C;
    for (size_t i = 0; i < n; i++, x += width, y += width)
        for (size_t c = 0; c < width; c += W) {
            int w = c + W <= width ? W : C % W;
            vf v = w == W ? v_load(x + c) : v_load_n(x + c, w);
            if (coef)
                v = w == W ? V_FMA(v, v_load(coef + c), v_load(coef + width + c))
                           : V_FMA(v, v_load_n(coef + c, w), v_load_n(coef + width + c, w));
            if (silu) v = v_silu(v);
            if (w == W) v_store(y + c, v);
            else v_store_n(y + c, v, w);
        }
}

static void prepare(float *y, const float *x, const float *coef, size_t n, int C, bool silu) {
    if (!coef && !silu) memcpy(y, x, n * (size_t)C * sizeof *y);
    else if (!coef) prepare_lines(y, x, NULL, n, C, true);
    else if (silu) prepare_lines(y, x, coef, n, C, true);
    else prepare_lines(y, x, coef, n, C, false);
}

typedef double vd __attribute__((vector_size(W * 8)));

static void sums(double *sum, double *squares, const float *x, size_t n, int C) {
    size_t width = (size_t)C, whole = width / W * W;
    memset(sum, 0, width * sizeof *sum);
    memset(squares, 0, width * sizeof *squares);
    for (size_t i = 0; i < n; i++, x += width) {
        for (size_t c = 0; c < whole; c += W) {
            vd v = __builtin_convertvector(v_load(x + c), vd), s, q;
            memcpy(&s, sum + c, sizeof s);
            memcpy(&q, squares + c, sizeof q);
            s += v;
            q += v * v;
            memcpy(sum + c, &s, sizeof s);
            memcpy(squares + c, &q, sizeof q);
        }
        for (size_t c = whole; c < width; c++) {
            sum[c] += (double)x[c];
            squares[c] += (double)x[c] * (double)x[c];
        }
    }
}

static void softmax(float *x, size_t n, float scale) {
    vf top = v_all(-INFINITY), sum = {0};
    float most = -INFINITY, total = 0, k = scale * 1.44269504f;
    size_t whole = n / W * W, rest = n - whole;
    for (size_t i = 0; i < whole; i += W) top = V_MAX(top, v_load(x + i)); // a NaN on the way is met again in the sum
    if (whole) most = V_TOP(top);
    for (size_t i = whole; i < n; i++) most = x[i] > most ? x[i] : most;
    for (size_t i = 0; i < whole; i += W) {
        vf v = v_exp2((v_load(x + i) - most) * k);
        v_store(x + i, v);
        sum += v;
    }
    if (rest) {
        vf v = v_exp2((v_load_n(x + whole, (int)rest) - most) * k);
        v_store_n(x + whole, v, (int)rest);
        for (size_t i = 0; i < rest; i++) total += x[whole + i];
    }
    total += V_SUM(sum);
    for (size_t i = 0; i < n; i++) x[i] /= total;
}

const struct picture_simd PICTURE = {.prepare = prepare, .sums = sums, .softmax = softmax};
