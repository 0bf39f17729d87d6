// SPDX-License-Identifier: MIT
/*
 * attention: softmax(q k^T / sqrt(D)) v in bfloat16 or float16 by mma.sync, the T x T matrix never in memory (Dao et al.,
 * FlashAttention, 2022).
 *
 * A block takes 16 or 32 queries a warp of one head of one row and walks the keys 64 at a time; keys and values of the next 64
 * are copied (cp.async) while these are multiplied, the wait for V apart from the wait for K. Head dimensions are not padded: q
 * k^T runs in steps of 16 over D and one of 8 (m16n8k8) where D is an odd multiple of 8 (72 = 4 x 16 + 8), p v has D/8 column
 * tiles. A shared line is an odd number of 16-byte pieces, which makes ldmatrix free of bank conflicts without swizzling.
 *
 * The order of all sums of a query depends on the number of keys alone: not on the row, on R or on a block's shape. So
 * few rows may run with 64 queries a block (more blocks) and many with 128 (each key fetched for twice the queries).
 */
#include "kernels/cuda/device.cuh"

#define BC 64 // keys a step

__device__ __forceinline__ float power_of_2(float x) { // one instruction; exp2f wraps it in a range fix for subnormal results
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Lines [first, first + LINES) of one head into shared memory; lines from T on are zeros
template <int D, int LINES, int THREADS, typename E>
__device__ __forceinline__ void copy_lines(E *dst, const E *src, size_t ld, int first, int T) {
    constexpr int PIECES = D / 8, STRIDE = (D / 8 | 1) * 8;
#pragma unroll
    for (int i = threadIdx.x; i < LINES * PIECES; i += THREADS) {
        int line = i / PIECES, piece = i % PIECES;
        bool inside = first + line < T;
        copy_async(dst + line * STRIDE + piece * 8, src + (size_t)(inside ? first + line : 0) * ld + piece * 8, inside ? 16 : 0);
    }
}

// MT: tiles of 16 queries a warp
template <typename E, int D, int WARPS, int MT>
__global__ void __launch_bounds__(WARPS * 32, MT == 2   ? 2
                                              : D <= 72 ? 4
                                                        : 2)
    attention(E *o, const E *qkv, int T, int H, float scale, float *lse) {
    constexpr int BR = WARPS * MT * 16, STRIDE = (D / 8 | 1) * 8, STEPS = D / 16, TILES = D / 8, THREADS = WARPS * 32;
    constexpr bool TAIL = D % 16 != 0;
    extern __shared__ __align__(16) char shared[];
    E *sq = (E *)shared, *sk = sq + BR * STRIDE, *sv = sk + 2 * BC * STRIDE;
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, q0 = blockIdx.x * BR, h = blockIdx.y;
    const size_t C = (size_t)H * D, ld = 3 * C, row = blockIdx.z;
    const E *q = qkv + row * T * ld + (size_t)h * D, *k = q + C, *v = k + C;
    const int blocks = (T + BC - 1) / BC;
    const float scale2 = scale * 1.4426950408889634f; // exp(x) = exp2(x log2 e)

    copy_lines<D, BR, THREADS>(sq, q, ld, q0, T);
    copy_lines<D, BC, THREADS>(sk, k, ld, 0, T);
    copy_commit();
    copy_lines<D, BC, THREADS>(sv, v, ld, 0, T);
    copy_commit();

    E *mine = sq + warp * MT * 16 * STRIDE; // this warp's queries, later its results
    unsigned qf[MT][STEPS ? STEPS : 1][4], qt[MT][2];
    float acc[MT][TILES][4] = {}, top[MT][2], sum[MT][2] = {};
    for (int m = 0; m < MT; m++) top[m][0] = top[m][1] = -INFINITY;
    for (int j = 0; j < blocks; j++) {
        const E *kj = sk + (j & 1) * BC * STRIDE, *vj = sv + (j & 1) * BC * STRIDE;
        copy_wait<1>(); // K of this step (and Q) are here
        __syncthreads();
        if (j + 1 < blocks) copy_lines<D, BC, THREADS>(sk + (j + 1 & 1) * BC * STRIDE, k, ld, (j + 1) * BC, T);
        copy_commit();
        if (j == 0)
#pragma unroll
            for (int m = 0; m < MT; m++) {
                const E *p = mine + (m * 16 + (lane & 15)) * STRIDE;
#pragma unroll
                for (int i = 0; i < STEPS; i++) ldmatrix4(qf[m][i], p + i * 16 + lane / 16 * 8);
                if (TAIL) ldmatrix2(qt[m], p + STEPS * 16);
            }
        float s[MT][BC / 8][4] = {};
#pragma unroll
        for (int n = 0; n < BC / 16; n++)
#pragma unroll
            for (int i = 0; i < STEPS; i++) {
                unsigned b[4];
                ldmatrix4(b, kj + (n * 16 + lane / 16 * 8 + (lane & 7)) * STRIDE + i * 16 + (lane / 8 & 1) * 8);
#pragma unroll
                for (int m = 0; m < MT; m++) {
                    mma_k16<E>(s[m][2 * n], qf[m][i], b[0], b[1]);
                    mma_k16<E>(s[m][2 * n + 1], qf[m][i], b[2], b[3]);
                }
            }
        if (TAIL)
#pragma unroll
            for (int n = 0; n < BC / 32; n++) {
                unsigned b[4];
                ldmatrix4(b, kj + (n * 32 + lane) * STRIDE + STEPS * 16);
#pragma unroll
                for (int i = 0; i < 4; i++)
#pragma unroll
                    for (int m = 0; m < MT; m++) mma_k8<E>(s[m][4 * n + i], qt[m], b[i]);
            }
        if ((j + 1) * BC > T)
            for (int m = 0; m < MT; m++)
                for (int n = 0; n < BC / 8; n++)
                    for (int i = 0; i < 4; i++)
                        if (j * BC + n * 8 + (lane & 3) * 2 + (i & 1) >= T) s[m][n][i] = -INFINITY;

        // softmax so far: this thread has the rows lane/4 and lane/4 + 8, two columns in eight; four neighbours share a row
        unsigned p[MT][BC / 16][4];
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int g = 0; g < 2; g++) {
                float best = top[m][g];
#pragma unroll
                for (int n = 0; n < BC / 8; n++) best = fmaxf(best, fmaxf(s[m][n][2 * g], s[m][n][2 * g + 1]));
                best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, 1));
                best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, 2));
                const float shrink = power_of_2((top[m][g] - best) * scale2), offset = best * scale2;
                top[m][g] = best;
                float part = 0;
#pragma unroll
                for (int n = 0; n < BC / 8; n++) {
                    float x = power_of_2(fmaf(s[m][n][2 * g], scale2, -offset)),
                          y = power_of_2(fmaf(s[m][n][2 * g + 1], scale2, -offset));
                    part += x + y;
                    p[m][n / 2][(n & 1) * 2 + g] = pack<E>(x, y);
                }
                sum[m][g] = fmaf(sum[m][g], shrink, part);
#pragma unroll
                for (int n = 0; n < TILES; n++) acc[m][n][2 * g] *= shrink, acc[m][n][2 * g + 1] *= shrink;
            }

        copy_wait<1>(); // V of this step
        __syncthreads();
        if (j + 1 < blocks) copy_lines<D, BC, THREADS>(sv + (j + 1 & 1) * BC * STRIDE, v, ld, (j + 1) * BC, T);
        copy_commit();
#pragma unroll
        for (int i = 0; i < BC / 16; i++) {
            const E *line = vj + (i * 16 + (lane & 15)) * STRIDE;
#pragma unroll
            for (int n = 0; n + 1 < TILES; n += 2) {
                unsigned b[4];
                ldmatrix4_trans(b, line + n * 8 + lane / 16 * 8);
#pragma unroll
                for (int m = 0; m < MT; m++) {
                    mma_k16<E>(acc[m][n], p[m][i], b[0], b[1]);
                    mma_k16<E>(acc[m][n + 1], p[m][i], b[2], b[3]);
                }
            }
            if (TAIL) {
                unsigned b[2];
                ldmatrix2_trans(b, line + (TILES - 1) * 8);
#pragma unroll
                for (int m = 0; m < MT; m++) mma_k16<E>(acc[m][TILES - 1], p[m][i], b[0], b[1]);
            }
        }
    }

    // through this warp's own lines of sq, so that memory is written 16 bytes at a time
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int g = 0; g < 2; g++) {
            const float total = quad_sum(sum[m][g]);
            const float inverse = 1 / total;
            const int line = m * 16 + g * 8 + lane / 4, t = q0 + warp * MT * 16 + line;
#pragma unroll
            for (int n = 0; n < TILES; n++)
                *(unsigned *)(mine + line * STRIDE + n * 8 + (lane & 3) * 2) =
                    pack<E>(acc[m][n][2 * g] * inverse, acc[m][n][2 * g + 1] * inverse);
            if (lse && (lane & 3) == 0 && t < T) lse[(row * H + h) * T + t] = top[m][g] * scale + logf(total);
        }
    __syncwarp();
    for (int i = lane; i < MT * 16 * TILES; i += 32) {
        const int line = i / TILES, piece = i % TILES, t = q0 + warp * MT * 16 + line;
        if (t < T)
            *(uint4 *)(o + (row * T + t) * C + (size_t)h * D + piece * 8) = *(const uint4 *)(mine + line * STRIDE + piece * 8);
    }
}

template <typename E, int D, int WARPS, int MT>
static int launch(struct kern *k, E *o, const E *qkv, int R, int T, int H, float *lse) {
    constexpr int STRIDE = (D / 8 | 1) * 8, BR = WARPS * MT * 16, BYTES = (BR + 4 * BC) * STRIDE * 2;
    int rc = cuda_check(k, cudaFuncSetAttribute(attention<E, D, WARPS, MT>, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES),
                        "attention");
    if (rc < 0) return rc;
    dim3 grid((unsigned)((T + BR - 1) / BR), (unsigned)H, (unsigned)R);
    attention<E, D, WARPS, MT><<<grid, WARPS * 32, BYTES, cuda_of(k)->stream>>>(o, qkv, T, H, 1 / sqrtf((float)D), lse);
    return cuda_launched(k, "attention");
}

// Two tiles a warp halve the reads of shared memory, which bound one tile; from head dimension 96 on they would not fit the
// registers
template <typename E, int D> static int run(struct kern *k, E *o, const E *qkv, int R, int T, int H, float *lse) {
    if constexpr (D <= 80)
        if ((long)R * H * ((T + 127) / 128) >= 2L * cuda_of(k)->sms) return launch<E, D, 4, 2>(k, o, qkv, R, T, H, lse);
    return launch<E, D, 4, 1>(k, o, qkv, R, T, H, lse);
}

template <typename E> static int run_any(struct kern *k, void *o, const void *qkv, int R, int T, int H, int D, float *save_lse) {
    switch (D) {
#define CASE(d)                                                                                                                  \
    case d:                                                                                                                      \
        return run<E, d>(k, (E *)o, (const E *)qkv, R, T, H, save_lse)
        CASE(8);
        CASE(16);
        CASE(24);
        CASE(32);
        CASE(40);
        CASE(48);
        CASE(56);
        CASE(64);
        CASE(72);
        CASE(80);
        CASE(88);
        CASE(96);
        CASE(104);
        CASE(112);
        CASE(120);
        CASE(128);
#undef CASE
    }
    return cuda_fail(k, KERN_EUNSUPPORTED, "head dimension %d", D);
}

int cuda_attention(struct kern *k, void *o, const void *qkv, int R, int T, int H, int D, float *save_lse) {
    int rc = cuda_of(k)->host->check_attention(k, T, H, D);
    if (rc < 0 || R == 0) return rc;
    if (R > 65535 || H > 65535) return cuda_fail(k, KERN_EUNSUPPORTED, "attention of %d rows and %d heads", R, H);
    if (k->act == KERN_F32) return cuda_attention_f32(k, (float *)o, (const float *)qkv, R, T, H, D, save_lse);
    if (cuda_attention_sm90(k, o, qkv, R, T, H, D, save_lse, &rc)) return rc;
    return k->act == KERN_F16 ? run_any<__half>(k, o, qkv, R, T, H, D, save_lse)
                              : run_any<__nv_bfloat16>(k, o, qkv, R, T, H, D, save_lse);
}
