// SPDX-License-Identifier: MIT
/*
 * step: a training step outside the network: noised images, loss, the optimiser.
 *
 * Noise and parameters get the CPU's bits: the same text (kernels/philox.h, kernels/adamw.h), compiled with -fmad=false so that
 * products meet sums only inside fmaf. The optimiser is one pass over memory: 36 bytes a parameter with one EMA (p, m, v, e read
 * and written, g read), 24.3 GB for XL/2.
 */
#include "kernels/adamw.h"
#include "kernels/cuda/train.cuh"
#include "kernels/philox.h"

#define THREADS 256

static int most_entries(size_t size) { return (int)(RING_BYTES / 4 / size); } // of a staged table

__global__ static void mixed(float *xt, float *x0, const float *x1, size_t numel, const struct kern_mix *table) {
    const struct kern_mix m = table[blockIdx.y];
    const size_t e0 = ((size_t)blockIdx.x * THREADS + threadIdx.x) * 4, row = (size_t)blockIdx.y * numel;
    if (e0 >= numel) return;
    float z[4];
    philox_normal4(m.seed, m.image, m.draw, (uint32_t)(e0 / 4), z);
    for (size_t i = 0; i < 4 && e0 + i < numel; i++) {
        x0[row + e0 + i] = z[i];
        xt[row + e0 + i] = fmaf(m.a0, z[i], m.a1 * x1[row + e0 + i]);
    }
}

int cuda_mix(struct kern *k, float *xt, float *x0, const float *x1, size_t numel, const struct kern_mix *mix, int R) {
    int most = most_entries(sizeof *mix), rc = KERN_OK;
    for (int at = 0; at < R && rc == KERN_OK && numel; at += most) {
        int n = R - at < most ? R - at : most;
        const size_t first = (size_t)at * numel;
        void *table;
        rc = cuda_stage(k, mix + at, (size_t)n * sizeof *mix, &table);
        if (rc < 0) break;
        dim3 grid((unsigned)((numel + 4 * THREADS - 1) / (4 * THREADS)), (unsigned)n);
        mixed<<<grid, THREADS, 0, cuda_of(k)->stream>>>(xt + first, x0 + first, x1 + first, numel,
                                                        (const struct kern_mix *)table);
        rc = cuda_launched(k, "mix");
    }
    return rc;
}

/* ---- sums: always the same tree ---- */

// The block's sum, in thread 0
__device__ static double block_sum(double v) {
    __shared__ double parts[THREADS / 32];
    for (int i = 16; i; i /= 2) v += __shfl_xor_sync(0xffffffffu, v, i);
    __syncthreads();
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = v;
    __syncthreads();
    for (int i = 1; i < THREADS / 32 && threadIdx.x == 0; i++) v += parts[i];
    return v;
}

__global__ static void add_up(double *sum, const double *part, int n) {
    double v = 0;
    for (int i = threadIdx.x; i < n; i += THREADS) v += part[i];
    v = block_sum(v);
    if (threadIdx.x == 0) *sum += v;
}

#define SUM_BLOCKS 1024

__global__ static void squares(double *part, const float *x, size_t n) {
    double v = 0;
    const size_t step = (size_t)gridDim.x * THREADS * 4;
    for (size_t i = ((size_t)blockIdx.x * THREADS + threadIdx.x) * 4; i < n; i += step) {
        if (i + 4 <= n && ((size_t)x & 15) == 0) {
            float4 a = *(const float4 *)(x + i);
            v += (double)a.x * a.x + (double)a.y * a.y + ((double)a.z * a.z + (double)a.w * a.w);
        } else
            for (size_t j = i; j < n && j < i + 4; j++) v += (double)x[j] * x[j];
    }
    v = block_sum(v);
    if (threadIdx.x == 0) part[blockIdx.x] = v;
}

int cuda_sum_squares(struct kern *k, double *sum, const float *x, size_t n) {
    void *part;
    int rc = cuda_scratch(k, SUM_BLOCKS * sizeof(double), &part);
    if (rc < 0) return rc;
    squares<<<SUM_BLOCKS, THREADS, 0, cuda_of(k)->stream>>>((double *)part, x, n);
    add_up<<<1, THREADS, 0, cuda_of(k)->stream>>>(sum, (const double *)part, SUM_BLOCKS);
    return cuda_launched(k, "sum_squares");
}

/* ---- loss: a block an image, in double as the reference ---- */

#define BITS 1.4426950408889634 // 1/ln 2

// Normal CDF, DiT's approximation, and its slope
__device__ static double cdf(double x, double *slope) {
    double t = tanh(0.79788456080286536 * (x + 0.044715 * x * x * x));
    *slope = 0.5 * (1 - t * t) * 0.79788456080286536 * (1 + 0.134145 * x * x);
    return 0.5 * (1 + t);
}

// -log2 of the probability of x1's level, d = x1 - mean, and its slope in lv
__device__ static double level_bits(double x1, double d, double lv, double *slope) {
    double scale = exp(-0.5 * lv), above = scale * (d + 1.0 / 255), below = scale * (d - 1.0 / 255), sa, sb;
    double p = cdf(above, &sa), q = cdf(below, &sb);
    if (x1 > 0.999) p = 1, sa = 0; // the last level reaches to infinity, the first one down to it
    if (x1 < -0.999) q = 0, sb = 0;
    double mass = p - q, least = 1e-12;
    *slope = mass < least ? 0 : 0.5 * BITS * (sa * above - sb * below) / mass;
    return -BITS * log(mass < least ? least : mass);
}

// Variational bound of one element in bits, and its slope in lv
__device__ static double bound_bits(const struct kern_loss &l, double x1, double xt, double out, double lv, double *slope) {
    double d = (double)l.posterior * (x1 - ((double)l.recip * xt - (double)l.recip_m1 * out));
    if (l.first) return level_bits(x1, d, lv, slope);
    double ratio = exp((double)l.lv_true - lv), far = d * d * exp(-lv);
    *slope = 0.5 * BITS * (1 - ratio - far);
    return 0.5 * BITS * (lv - (double)l.lv_true - 1 + ratio + far);
}

__global__ static void losses(float *dout, float *loss, const float *out, size_t out_ld, const float *x1, const float *x0,
                              const float *xt, size_t numel, const struct kern_loss *table) {
    const struct kern_loss l = table[blockIdx.x];
    const size_t row = blockIdx.x;
    double sum = 0, bits = 0, slope, n = (double)numel;
    dout += row * out_ld, out += row * out_ld;
    x1 += row * numel, x0 += row * numel, xt += row * numel;
    for (size_t e = threadIdx.x; e < numel; e += THREADS) {
        double r = (double)l.c_out * out[e] + (double)l.c1 * x1[e] + (double)l.c0 * x0[e];
        sum += r * r;
        dout[e] = (float)((double)l.grad * (double)l.weight * 2 * (double)l.c_out * r / n);
        if (!l.hybrid) continue;
        double lv = (double)l.log_lo + ((double)out[numel + e] + 1) / 2 * (double)l.log_span;
        bits += bound_bits(l, x1[e], xt[e], out[e], lv, &slope);
        dout[numel + e] = (float)((double)l.grad * slope * (double)l.log_span / 2 / n);
    }
    for (size_t e = (l.hybrid ? 2 * numel : numel) + threadIdx.x; e < out_ld; e += THREADS) dout[e] = 0;
    sum = block_sum(sum);
    bits = block_sum(bits);
    if (threadIdx.x == 0) loss[2 * row] = (float)((double)l.weight * sum / n), loss[2 * row + 1] = (float)(bits / n);
}

int cuda_loss(struct kern *k, float *dout, float *loss, const float *out, size_t out_ld, const float *x1, const float *x0,
              const float *xt, size_t numel, const struct kern_loss *l, int R) {
    int most = most_entries(sizeof *l), rc = KERN_OK;
    for (int at = 0; at < R && rc == KERN_OK; at += most) {
        int n = R - at < most ? R - at : most;
        const size_t first = (size_t)at * numel, line = (size_t)at * out_ld;
        void *table;
        rc = cuda_stage(k, l + at, (size_t)n * sizeof *l, &table);
        if (rc < 0) break;
        losses<<<(unsigned)n, THREADS, 0, cuda_of(k)->stream>>>(dout + line, loss + 2 * at, out + line, out_ld, x1 + first,
                                                                x0 + first, xt + first, numel, (const struct kern_loss *)table);
        rc = cuda_launched(k, "loss");
    }
    return rc;
}

/* ---- optimiser ---- */

struct step_args {
    float *p, *m, *v, *e[KERN_MAX_EMA];
    const float *g;
    size_t n;
    struct kern_adamw a;
    struct adamw s; // its g comes from norm2
    const double *norm2;
    double *part; // NULL or one a block: squares of p's change
};

template <int VEC> struct alignas(4 * VEC) floats { float v[VEC]; };
template <int VEC> __device__ __forceinline__ floats<VEC> &at(float *p, size_t i) { return *(floats<VEC> *)(p + i); }

template <int VEC> __global__ void __launch_bounds__(THREADS) optimise(const __grid_constant__ step_args a) {
    __shared__ float scale;
    if (threadIdx.x == 0) scale = adamw_scale(&a.a, a.norm2 ? *a.norm2 : 0);
    __syncthreads();
    struct adamw s = a.s;
    s.g = scale;
    double moved = 0;
    const size_t step = (size_t)gridDim.x * THREADS * VEC;
    for (size_t i = ((size_t)blockIdx.x * THREADS + threadIdx.x) * VEC; i < a.n; i += step) {
        floats<VEC> p = at<VEC>(a.p, i), m = at<VEC>(a.m, i), v = at<VEC>(a.v, i), g = at<VEC>((float *)a.g, i), e[KERN_MAX_EMA];
#pragma unroll
        for (int j = 0; j < KERN_MAX_EMA; j++)
            if (j < s.n_ema) e[j] = at<VEC>(a.e[j], i);
        float change = 0;
#pragma unroll
        for (int c = 0; c < VEC; c++) {
            const float now = adamw_element(&s, p.v[c], &m.v[c], &v.v[c], g.v[c]);
            change = fmaf(now - p.v[c], now - p.v[c], change);
            p.v[c] = now;
#pragma unroll
            for (int j = 0; j < KERN_MAX_EMA; j++)
                if (j < s.n_ema) e[j].v[c] = adamw_ema(&s, j, e[j].v[c], now);
        }
        moved += (double)change;
        at<VEC>(a.p, i) = p, at<VEC>(a.m, i) = m, at<VEC>(a.v, i) = v;
#pragma unroll
        for (int j = 0; j < KERN_MAX_EMA; j++)
            if (j < s.n_ema) at<VEC>(a.e[j], i) = e[j];
    }
    if (!a.part) return;
    moved = block_sum(moved);
    if (threadIdx.x == 0) a.part[blockIdx.x] = moved;
}

int cuda_adamw(struct kern *k, float *p, float *m, float *v, float *const e[], const float *g, size_t n,
               const struct kern_adamw *a, const double *norm2, double *moved2) {
    struct step_args s = {.p = p, .m = m, .v = v, .g = g, .n = n, .a = *a, .s = adamw_begin(a, 0), .norm2 = norm2};
    const int blocks = cuda_of(k)->sms * 8;
    size_t all = (size_t)p | (size_t)m | (size_t)v | (size_t)g | n * 4;
    void *part;
    for (int i = 0; i < a->n_ema; i++) s.e[i] = e[i], all |= (size_t)e[i];
    int rc = cuda_scratch(k, (size_t)blocks * sizeof(double), &part);
    if (rc < 0) return rc;
    if (moved2) s.part = (double *)part;
    if (all % 16 == 0) optimise<4><<<(unsigned)blocks, THREADS, 0, cuda_of(k)->stream>>>(s);
    else optimise<1><<<(unsigned)blocks, THREADS, 0, cuda_of(k)->stream>>>(s);
    if (moved2) add_up<<<1, THREADS, 0, cuda_of(k)->stream>>>(moved2, (const double *)part, blocks);
    return cuda_launched(k, "adamw");
}
