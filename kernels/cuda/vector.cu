// SPDX-License-Identifier: MIT
/*
 * vector: products of a few float32 lines (timestep, conditioning) with many weights; above all the one product that gives every
 * modulation vector: [R x 1152] x [1152 x 195,840] for XL, 451 MB of weights in 16 bits.
 *
 * Weights and activations are rounded to float16 (11 bits; a layer with a weight outside its range is not taken), sums are
 * float32: an eighth of bfloat16's error for the same bytes, and reading the weights is the cost. (A second float16 number for
 * the rest of each activation, so that only the weights are rounded, was tried: 1.01e-3 over 50 steps of XL where this gives
 * 0.93e-3, and 65 us more at 64 rows.)
 *
 * Weights are the rows of mma's A, lines the columns of B: KERN_VEC lines are just one 8-wide tile, and a column's bits know
 * nothing of its neighbours. A block takes 128 outputs, keeps
 * STAGES steps of 64 k on their way, and writes whole cache lines through shared memory.
 */
#include "kernels/cuda/linear.cuh"

#define STEP 64
#define LINE (STEP + 8) // halves a line in shared memory: an odd number of 16-byte pieces
#define STAGES 4
#define WARPS 4
#define OUTS (WARPS * 32)
#define THREADS (WARPS * 32)
#define MOST 64 // lines a launch

__global__ static void to_half(__half *half, const float *x, size_t n) {
    size_t i = (size_t)blockIdx.x * 256 + threadIdx.x;
    if (i < n) half[i] = __float2half_rn(x[i]);
}

// Lines [first, first + count) x k [k0, k0 + STEP); outside: zeros
__device__ __forceinline__ void copy_tile(__half *dst, const __half *src, int count, int first, int lines, int k0, int K) {
    for (int i = threadIdx.x; i < count * (STEP / 8); i += THREADS) {
        int line = i / (STEP / 8), k = i % (STEP / 8) * 8;
        bool inside = first + line < lines && k0 + k < K;
        copy_async(dst + line * LINE + k, src + (inside ? (size_t)(first + line) * K + k0 + k : 0), inside ? 16 : 0);
    }
}

#define STAGE_HALVES ((OUTS + TILES * 8) * LINE)

template <int TILES>
__global__ void __launch_bounds__(THREADS)
    vector_kernel(float *y, const __half *w, const __half *x, const float *bias, int N, int K, int lines, enum kern_act act) {
    extern __shared__ __align__(16) __half shared[];
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, n0 = blockIdx.x * OUTS, steps = (K + STEP - 1) / STEP;
    float acc[2][TILES][4] = {};
    auto fetch = [&](int i) {
        if (i < steps) {
            __half *s = shared + i % STAGES * STAGE_HALVES;
            copy_tile(s, w, OUTS, n0, N, i * STEP, K);
            copy_tile(s + OUTS * LINE, x, TILES * 8, 0, lines, i * STEP, K);
        }
        copy_commit();
    };
    for (int i = 0; i < STAGES - 1; i++) fetch(i);
    for (int i = 0; i < steps; i++) {
        copy_wait<STAGES - 2>();
        __syncthreads();
        fetch(i + STAGES - 1);
        const __half *sw = shared + i % STAGES * STAGE_HALVES, *sx = sw + OUTS * LINE;
#pragma unroll
        for (int k = 0; k < STEP; k += 16) {
            unsigned a[2][4];
#pragma unroll
            for (int m = 0; m < 2; m++) ldmatrix4(a[m], sw + (warp * 32 + m * 16 + (lane & 15)) * LINE + k + lane / 16 * 8);
#pragma unroll
            for (int n = 0; n < TILES; n++) {
                unsigned b[2];
                ldmatrix2(b, sx + (n * 8 + (lane & 7)) * LINE + k + (lane / 8 & 1) * 8);
#pragma unroll
                for (int m = 0; m < 2; m++) mma_f16_k16(acc[m][n], a[m], b[0], b[1]);
            }
        }
    }
    __syncthreads();
    copy_wait<0>();
    float *out = (float *)shared; // [TILES*8][OUTS + 4]
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int n = 0; n < TILES; n++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                out[(n * 8 + (lane & 3) * 2 + (i & 1)) * (OUTS + 4) + warp * 32 + m * 16 + i / 2 * 8 + lane / 4] = acc[m][n][i];
    __syncthreads();
    for (int i = threadIdx.x; i < TILES * 8 * OUTS; i += THREADS) {
        int line = i / OUTS, n = n0 + i % OUTS;
        if (line < lines && n < N) y[(size_t)line * N + n] = activate(act, out[line * (OUTS + 4) + i % OUTS] + bias[n]);
    }
}

template <int TILES>
static int launch(struct kern *k, float *y, const __half *w, const __half *x, const float *bias, int N, int K, int lines,
                  enum kern_act act) {
    constexpr int BYTES = STAGES * STAGE_HALVES * 2;
    static_assert(TILES * 8 * (OUTS + 4) * 4 <= BYTES, "the results fit where the factors were");
    int rc = cuda_check(k, cudaFuncSetAttribute(vector_kernel<TILES>, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES),
                        "linear of vectors");
    if (rc < 0) return rc;
    vector_kernel<TILES>
        <<<(unsigned)((N + OUTS - 1) / OUTS), THREADS, BYTES, cuda_of(k)->stream>>>(y, w, x, bias, N, K, lines, act);
    return cuda_launched(k, "linear of vectors");
}

int vector_linear(struct kern *k, float *y, const float *x, const __half *w, const float *bias, __half *half, int N, int K,
                  int lines, enum kern_act act) {
    int rc = KERN_OK;
    for (int at = 0; at < lines && rc == KERN_OK; at += MOST) {
        int n = lines - at < MOST ? lines - at : MOST;
        size_t count = (size_t)n * K;
        float *to = y + (size_t)at * N;
        to_half<<<(unsigned)((count + 255) / 256), 256, 0, cuda_of(k)->stream>>>(half, x + (size_t)at * K, count);
        rc = cuda_launched(k, "linear of vectors");
        if (rc < 0) break;
        if (n <= 8) rc = launch<1>(k, to, w, half, bias, N, K, n, act);
        else if (n <= 16) rc = launch<2>(k, to, w, half, bias, N, K, n, act);
        else if (n <= 32) rc = launch<4>(k, to, w, half, bias, N, K, n, act);
        else rc = launch<8>(k, to, w, half, bias, N, K, n, act);
    }
    return rc;
}
