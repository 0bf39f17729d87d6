// SPDX-License-Identifier: MIT
/*
 * sampler: gather, row_update and row_norm.
 *
 * One kernel moves all rows, each by its own table of coefficients, four elements a thread because one Philox counter gives four
 * normals. The sums are the reference's very operations in the reference's order (this file is compiled with -fmad=false,
 * products and sums meet only in fmaf), so that an image's noise and its moves are the same bits on the CPU and on every GPU.
 * row_norm is a fixed tree of double sums: the same for a slot wherever it stands.
 */
#include "kernels/cuda/device.cuh"
#include "kernels/exp.h"
#include "kernels/philox.h"

#define THREADS 128

__global__ static void gather(float *in, const float *cols, size_t numel, const struct kern_gather *table) {
    const struct kern_gather g = table[blockIdx.y];
    const float *col = cols + ((size_t)g.slot * KERN_COLS + (size_t)g.col) * numel;
    size_t e = (size_t)blockIdx.x * THREADS + threadIdx.x;
    if (e < numel) in[(size_t)blockIdx.y * numel + e] = g.scale * col[e];
}

// Tables longer than this go in several launches
static int most_entries(size_t size) { return (int)(RING_BYTES / 4 / size); }

int cuda_gather(struct kern *k, float *in, const float *cols, size_t numel, const struct kern_gather *g, int n) {
    int most = most_entries(sizeof *g), rc = KERN_OK;
    for (int at = 0; at < n && rc == KERN_OK && numel; at += most) {
        int m = n - at < most ? n - at : most;
        void *table;
        rc = cuda_stage(k, g + at, (size_t)m * sizeof *g, &table);
        if (rc < 0) break;
        dim3 grid((unsigned)((numel + THREADS - 1) / THREADS), (unsigned)m);
        gather<<<grid, THREADS, 0, cuda_of(k)->stream>>>(in + (size_t)at * numel, cols, numel, (const struct kern_gather *)table);
        rc = cuda_launched(k, "gather");
    }
    return rc;
}

__device__ static float guided_out(const struct kern_row_update &u, const float *out, size_t ld, size_t e, size_t ch) {
    if (u.row_u < 0 || ch >= (size_t)u.guided) return out[(size_t)u.row_rest * ld + e];
    float without = out[(size_t)u.row_u * ld + e], with = out[(size_t)u.row_c * ld + e];
    return fmaf(u.scale, with - without, without);
}

__device__ static float combined(const float *c, float c_out, const float *cols, size_t numel, size_t e, float F) {
    float v = 0;
    for (int j = 0; j < KERN_COLS; j++)
        if (c[j] != 0) v = fmaf(c[j], cols[(size_t)j * numel + e], v);
    return c_out != 0 ? fmaf(c_out, F, v) : v;
}

__device__ static float assigned(const struct kern_assign &a, const float *cols, size_t numel, size_t e, float F, float D, float Z) {
    float v = combined(a.c, a.c_out, cols, numel, e, F);
    if (a.c_clip != 0) v = fmaf(a.c_clip, D, v);
    if (a.c_noise != 0) v = fmaf(a.c_noise, Z, v);
    return v;
}

__device__ static float clipped(const struct kern_clip &c, const float *cols, size_t numel, size_t e, float F) {
    float v = combined(c.c, c.c_out, cols, numel, e, F);
    return v < -1 ? -1 : v > 1 ? 1 : v; // a NaN stays one
}

__device__ static float learned_scale(const struct kern_row_update &u, const float *out, size_t ld, size_t e, size_t ch) {
    float f = fmaf(0.5f, guided_out(u, out, ld, e, ch), 0.5f);
    return kern_expf(fmaf(f, u.log_span, u.log_lo));
}

__global__ static void row_update(float *all, size_t numel, size_t plane, const float *out, size_t ld, const float *noise,
                                  const struct kern_row_update *table) {
    __shared__ struct kern_row_update u;
    for (unsigned i = threadIdx.x; i < sizeof u / 4; i += THREADS)
        ((uint32_t *)&u)[i] = ((const uint32_t *)(table + blockIdx.y))[i];
    __syncthreads();
    float *cols = all + (size_t)u.slot * KERN_COLS * numel;
    size_t e0 = ((size_t)blockIdx.x * THREADS + threadIdx.x) * 4;
    bool reads_out = false, reads_noise = false, reads_clip = false;
    for (int i = 0; i < u.n; i++) {
        reads_out |= u.assign[i].c_out != 0;
        reads_clip |= u.assign[i].c_clip != 0;
        reads_noise |= u.assign[i].c_noise != 0;
    }
    reads_out |= reads_clip && u.clip.c_out != 0;
    float z[4] = {0, 0, 0, 0};
    if (reads_noise && !noise) philox_normal4(u.seed, u.image, u.draw, (uint32_t)(e0 / 4), z);
    for (size_t i = 0; i < 4 && e0 + i < numel; i++) {
        size_t e = e0 + i;
        float F = reads_out ? guided_out(u, out, ld, e, e / plane) : 0, v[KERN_ASSIGN];
        float D = reads_clip ? clipped(u.clip, cols, numel, e, F) : 0;
        float Z = reads_noise && noise ? noise[(size_t)u.slot * numel + e] : z[i];
        if (reads_noise && u.learned) Z *= learned_scale(u, out, ld, numel + e, (numel + e) / plane);
        for (int a = 0; a < u.n; a++) v[a] = assigned(u.assign[a], cols, numel, e, F, D, Z);
        for (int a = 0; a < u.n; a++) cols[(size_t)u.assign[a].dst * numel + e] = v[a];
    }
}

int cuda_row_update(struct kern *k, float *cols, size_t numel, size_t plane, const float *out, size_t out_ld, const float *noise,
                    const struct kern_row_update *u, int n) {
    int most = most_entries(sizeof *u), rc = KERN_OK;
    for (int at = 0; at < n && rc == KERN_OK && numel; at += most) {
        int m = n - at < most ? n - at : most;
        void *table;
        rc = cuda_stage(k, u + at, (size_t)m * sizeof *u, &table);
        if (rc < 0) break;
        dim3 grid((unsigned)((numel + 4 * THREADS - 1) / (4 * THREADS)), (unsigned)m);
        row_update<<<grid, THREADS, 0, cuda_of(k)->stream>>>(cols, numel, plane, out, out_ld, noise,
                                                             (const struct kern_row_update *)table);
        rc = cuda_launched(k, "row_update");
    }
    return rc;
}

#define NORM_THREADS 256

__global__ static void row_norm(double *norms, const float *cols, size_t numel, const struct kern_norm *table) {
    const struct kern_norm *m = &table[blockIdx.x];
    const float *slot = cols + (size_t)m->slot * KERN_COLS * numel;
    __shared__ double sums[NORM_THREADS];
    double sum = 0;
    for (size_t e = threadIdx.x; e < numel; e += NORM_THREADS) {
        double err = 0, a = fabs((double)slot[(size_t)m->a * numel + e]), b = fabs((double)slot[(size_t)m->b * numel + e]);
        for (int j = 0; j < KERN_COLS; j++)
            if (m->c[j] != 0) err += (double)m->c[j] * (double)slot[(size_t)j * numel + e];
        err /= m->atol + m->rtol * (a > b ? a : b);
        sum += err * err;
    }
    sums[threadIdx.x] = sum;
    for (unsigned half = NORM_THREADS / 2; half; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    if (threadIdx.x == 0) norms[blockIdx.x] = sqrt(sums[0] / (double)numel);
}

// The results lie in staging memory (its contents before are the caller's array and do not matter): no buffer is needed for them
int cuda_row_norm(struct kern *k, double *norms, const float *cols, size_t numel, const struct kern_norm *norm, int n) {
    int most = most_entries(sizeof *norm), rc = KERN_OK;
    for (int at = 0; at < n && rc == KERN_OK; at += most) {
        int m = n - at < most ? n - at : most;
        void *table, *results;
        rc = cuda_stage(k, norm + at, (size_t)m * sizeof *norm, &table);
        if (rc == KERN_OK) rc = cuda_stage(k, norms + at, (size_t)m * sizeof *norms, &results);
        if (rc < 0) break;
        row_norm<<<(unsigned)m, NORM_THREADS, 0, cuda_of(k)->stream>>>((double *)results, cols, numel,
                                                                       (const struct kern_norm *)table);
        rc = cuda_launched(k, "row_norm");
        if (rc == KERN_OK) rc = k->download(k, norms + at, results, (size_t)m * sizeof *norms);
    }
    return rc;
}
