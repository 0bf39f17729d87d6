// SPDX-License-Identifier: MIT
/*
 * column_sums: gradients of biases whose dy nobody summed while making it. A block sums some lines, a warp every eighth of them,
 * 8 columns a lane where they are bfloat16; a second kernel adds the blocks' sums.
 */
#include "kernels/cuda/train.cuh"

typedef __nv_bfloat16 bf16;

#define CHUNK 256 // lines a block
#define WARPS 8

template <typename T, int VEC>
__global__ void __launch_bounds__(WARPS * 32) sum_chunk(float *part, const T *dy, long lines, int N, int ld) {
    struct alignas(VEC * sizeof(T)) piece {
        T v[VEC];
    };
    __shared__ float shared[WARPS][32 * VEC];
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, n = (blockIdx.x * 32 + lane) * VEC;
    const long first = (long)blockIdx.y * CHUNK;
    float sum[VEC] = {};
    if (n < N)
#pragma unroll 8
        for (long m = first + warp; m < min(lines, first + CHUNK); m += WARPS) {
            const piece x = *(const piece *)(dy + (size_t)m * ld + n);
#pragma unroll
            for (int i = 0; i < VEC; i++) sum[i] += load_f32(&x.v[i]);
        }
    for (int i = 0; i < VEC; i++) shared[warp][lane * VEC + i] = sum[i];
    __syncthreads();
    for (int c = threadIdx.x; c < 32 * VEC && blockIdx.x * 32 * VEC + c < N; c += WARPS * 32) {
        float total = 0;
        for (int w = 0; w < WARPS; w++) total += shared[w][c];
        part[(size_t)blockIdx.y * N + blockIdx.x * 32 * VEC + c] = total;
    }
}

// sum (+)= the sums of `count` parts
__global__ void __launch_bounds__(WARPS * 32) sum_parts(float *to, const float *part, int count, int N, bool add) {
    __shared__ float shared[WARPS][32];
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, n = blockIdx.x * 32 + lane;
    float sum = 0;
    if (n < N)
#pragma unroll 8
        for (int i = warp; i < count; i += WARPS) sum += part[(size_t)i * N + n];
    shared[warp][lane] = sum;
    __syncthreads();
    if (warp || n >= N) return;
    for (int w = 1; w < WARPS; w++) sum += shared[w][lane];
    to[n] = add ? to[n] + sum : sum;
}

static unsigned chunks_of(long lines) { return (unsigned)((lines + CHUNK - 1) / CHUNK); }

size_t column_scratch(long lines, int N) { return (size_t)chunks_of(lines) * (size_t)N * sizeof(float); }

int column_add(struct kern *k, float *sum, const float *part, int count, int N, bool add) {
    sum_parts<<<(unsigned)((N + 31) / 32), WARPS * 32, 0, cuda_of(k)->stream>>>(sum, part, count, N, add);
    return cuda_launched(k, "sums of columns");
}

int column_sums(struct kern *k, float *sum, float *part, const void *a, bool f32, long lines, int N, int ld, bool add) {
    const unsigned chunks = chunks_of(lines);
    const bool eight = !f32 && N % 8 == 0 && ld % 8 == 0 && (size_t)a % 16 == 0;
    const dim3 grid((unsigned)((N + (eight ? 255 : 31)) / (eight ? 256 : 32)), chunks);
    cudaStream_t s = cuda_of(k)->stream;
    if (chunks > 65535) return cuda_fail(k, KERN_EUNSUPPORTED, "sums of %ld lines", lines);
    if (f32) sum_chunk<float, 1><<<grid, WARPS * 32, 0, s>>>(part, (const float *)a, lines, N, ld);
    else if (eight) sum_chunk<bf16, 8><<<grid, WARPS * 32, 0, s>>>(part, (const bf16 *)a, lines, N, ld);
    else sum_chunk<bf16, 1><<<grid, WARPS * 32, 0, s>>>(part, (const bf16 *)a, lines, N, ld);
    int rc = cuda_launched(k, "sums of columns");
    return rc < 0 ? rc : column_add(k, sum, part, (int)chunks, N, add);
}
