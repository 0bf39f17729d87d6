// SPDX-License-Identifier: MIT
/*
 * fp8: numbers in e4m3 (4 bits of exponent, 3 of mantissa; Micikevicius et al., 2022) for products behind norms and in MLPs.
 *
 * Two ways of scaling. A scale a token: its largest number becomes 448, the largest that e4m3 has. Or fixed scales: powers of two
 * that a few passes at load find for each layer (kern.h, calibrate), with which cuBLASLt writes e4m3 itself, so that fc1's results
 * need no pass of their own. Neither looks at other rows. As a floating point format e4m3 is as fine at a hundredth of its range
 * as at the top, so a fixed scale may leave room: eight times what was seen.
 */
#include "kernels/cuda/linear.cuh"

#define ROOM 8.0f
#define THREADS 256
#define GELU_THREADS 192
#define PIECES 4 // of 8 numbers a thread: lines of up to 6144

// The largest over the block, in all its threads
template <int N> __device__ static float block_most(float most) {
    __shared__ float part[N / 32];
    for (int i = 16; i; i /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, i));
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = most;
    __syncthreads();
    for (int i = 0; i < N / 32; i++) most = fmaxf(most, part[i]);
    return most;
}

__device__ static float scale_of(float most) { return most > 0 ? most / FP8_MOST : 1; }

// ---- weights ----

// A line of w, its scale from itself
__global__ static void __launch_bounds__(THREADS) quantise_lines(__nv_fp8_e4m3 *q, float *scales, const float *w, int K) {
    const float *line = w + (size_t)blockIdx.x * K;
    float most = 0;
    for (int i = threadIdx.x; i < K; i += THREADS) most = fmaxf(most, fabsf(line[i]));
    const float scale = scale_of(block_most<THREADS>(most));
    for (int i = threadIdx.x; i < K; i += THREADS) q[(size_t)blockIdx.x * K + i] = __nv_fp8_e4m3(line[i] / scale);
    if (threadIdx.x == 0) scales[blockIdx.x] = scale;
}

__global__ static void __launch_bounds__(THREADS) find_most(float *most, const float *w, size_t n) { // most: 0 or more
    float here = 0;
    for (size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x; i < n; i += (size_t)gridDim.x * THREADS) here = fmaxf(here, fabsf(w[i]));
    here = block_most<THREADS>(here);
    if (threadIdx.x == 0) atomicMax((int *)most, __float_as_int(here)); // floats of one sign are ordered as integers
}
__global__ static void to_scale(float *most) { *most = scale_of(*most); }
__global__ static void __launch_bounds__(THREADS) quantise_all(__nv_fp8_e4m3 *q, const float *scale, const float *w, size_t n) {
    const size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x;
    if (i < n) q[i] = __nv_fp8_e4m3(w[i] / *scale);
}

static int fixed_new(struct kern *k, struct fixed_scale **out) {
    const float first = 0x1p-9f; // numbers up to 0.875: what is larger widens it
    const struct fixed_scale begin = {.scale = first, .inverse = 1 / first};
    int rc = cuda_check(k, cudaMalloc((void **)out, sizeof **out), "a scale");
    return rc < 0 ? rc : cuda_check(k, cudaMemcpy(*out, &begin, sizeof begin, cudaMemcpyHostToDevice), "a scale");
}

int fp8_weights(struct kern *k, struct cuda_linear *l) {
    const struct kern_linear_spec *s = &l->spec;
    const size_t n = (size_t)s->out * (size_t)s->in;
    const bool fixed = cuda_of(k)->fp8_fixed;
    __nv_fp8_e4m3 *q = NULL;
    cudaStream_t stream = cuda_of(k)->stream;
    int rc = cuda_check(k, cudaMalloc((void **)&q, n), "weights");
    if (rc == KERN_OK) rc = cuda_check(k, cudaMalloc((void **)&l->scales, (size_t)s->out * 4), "scales of weights");
    if (rc == KERN_OK) rc = cuda_check(k, cudaMemsetAsync(l->scales, 0, 4, stream), "scales of weights");
    if (rc == KERN_OK && fixed) rc = fixed_new(k, &l->fixed);
    if (rc == KERN_OK && fixed) {
        find_most<<<512, THREADS, 0, stream>>>(l->scales, (const float *)l->w, n);
        to_scale<<<1, 1, 0, stream>>>(l->scales);
        quantise_all<<<(unsigned)((n + THREADS - 1) / THREADS), THREADS, 0, stream>>>(q, l->scales, (const float *)l->w, n);
    } else if (rc == KERN_OK) quantise_lines<<<(unsigned)s->out, THREADS, 0, stream>>>(q, l->scales, (const float *)l->w, s->in);
    if (rc == KERN_OK) rc = cuda_launched(k, "quantising weights");
    if (rc == KERN_OK) rc = cuda_check(k, cudaStreamSynchronize(stream), "quantising weights");
    cudaFree(l->w);
    l->w = q;
    return rc;
}

// ---- activations ----

__device__ __forceinline__ float gelu(float u) { // the instruction's tanh is good to 11 bits
    float t;
    asm("tanh.approx.f32 %0, %1;" : "=f"(t) : "f"(0.7978845608028654f * fmaf(0.044715f * u * u, u, u)));
    return 0.5f * fmaf(u, t, u);
}

__global__ static void __launch_bounds__(GELU_THREADS) gelu_lines(__nv_fp8_e4m3 *y, float *scales, const __nv_bfloat16 *pre, int N) {
    const size_t at = (size_t)blockIdx.x * N;
    float v[PIECES][8], most = 0;
    wait_for_previous();
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        const int first = (i * GELU_THREADS + (int)threadIdx.x) * 8;
        if (first >= N) continue;
        __align__(16) __nv_bfloat162 h[4];
        *(uint4 *)h = *(const uint4 *)(pre + at + first);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float2 u = __bfloat1622float2(h[j]);
            v[i][2 * j] = gelu(u.x), v[i][2 * j + 1] = gelu(u.y);
            most = fmaxf(most, fmaxf(fabsf(v[i][2 * j]), fabsf(v[i][2 * j + 1])));
        }
    }
    const float scale = scale_of(block_most<GELU_THREADS>(most)), up = 1 / scale;
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        const int first = (i * GELU_THREADS + (int)threadIdx.x) * 8;
        if (first >= N) continue;
        __nv_fp8x4_e4m3 q[2];
        for (int j = 0; j < 2; j++)
            q[j] = __nv_fp8x4_e4m3(make_float4(v[i][4 * j] * up, v[i][4 * j + 1] * up, v[i][4 * j + 2] * up, v[i][4 * j + 3] * up));
        *(uint2 *)(y + at + first) = make_uint2(q[0].__x, q[1].__x);
    }
    if (threadIdx.x == 0) scales[blockIdx.x] = scale;
}

int fp8_gelu(struct kern *k, void *y, const void *pre, long lines, int N) {
    if (N > PIECES * GELU_THREADS * 8 || N % 8) return cuda_fail(k, KERN_EUNSUPPORTED, "fp8 of an MLP of width %d", N);
    launch_early(k, gelu_lines, dim3((unsigned)lines), GELU_THREADS, 0, (__nv_fp8_e4m3 *)y, fp8_token_scales(y, lines, N),
                 (const __nv_bfloat16 *)pre, N);
    return cuda_launched(k, "GELU to fp8");
}

// ---- fixed scales ----

__global__ static void __launch_bounds__(THREADS) observe(struct fixed_scale *f, const __nv_fp8_e4m3 *x, size_t n) {
    float here = 0;
    for (size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x; i < n; i += (size_t)gridDim.x * THREADS) here = fmaxf(here, fabsf((float)x[i]));
    here = block_most<THREADS>(here) * f->scale;
    if (threadIdx.x == 0) atomicMax((int *)&f->most, __float_as_int(here));
}
__global__ static void widen(struct fixed_scale *f) {
    const float want = exp2f(ceilf(log2f(fmaxf(ROOM * f->most, 0x1p-60f) / FP8_MOST)));
    if (!(want > f->scale)) return;
    f->scale = want, f->inverse = 1 / want;
}

int fp8_observe(struct kern *k, struct fixed_scale *f, const void *x, size_t n) {
    observe<<<256, THREADS, 0, cuda_of(k)->stream>>>(f, (const __nv_fp8_e4m3 *)x, n);
    widen<<<1, 1, 0, cuda_of(k)->stream>>>(f);
    return cuda_launched(k, "looking for scales");
}

int cuda_calibrate(struct kern *k, bool on) {
    int rc = cuda_not_recorded(k, "calibrate");
    if (rc == KERN_OK) cuda_of(k)->calibrating = on;
    return rc;
}
