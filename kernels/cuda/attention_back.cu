// SPDX-License-Identifier: MIT
/*
 * attention_back: what attention passes on, in bfloat16 by mma.sync, the T x T matrix never in memory (Dao, FlashAttention-2,
 * 2023): the weights are made again from q, k and the saved log-sum-exp.
 *
 *   P = exp(q k^T / sqrt(D) - lse), dP = dO v^T, delta = rowsum(P * dP) / rowsum(P), dS = P * (dP - delta)
 *   dq = dS k / sqrt(D), dk = dS^T q / sqrt(D), dv = P^T dO
 *
 * delta is known when a query has met all keys. FlashAttention takes rowsum(dO * O), the same number but for the rounding of O to
 * bfloat16; where a query sees little but one key dP - delta is nearly nothing, and that rounding all that is left of it, one
 * sign for all keys. So the first pass takes it as an estimate e, and sums P and P * (dP - e) on the way: their quotient is
 * delta - e, and dq = (sum P (dP - e) k - (delta - e) sum P k) / sqrt(D). The second pass has delta itself.
 *
 * Two passes of one kernel: in the first a block owns queries and walks the keys (dq), in the second it owns keys and walks the
 * queries (dk, dv). Both multiply own lines with the others' twice (scores and dP, own lines in rows), turn the results into A
 * operands where they are, in registers, and multiply them with the others' lines again. Scores are made twice, eight products
 * instead of five, but no sum is shared between blocks: no atomics, no dq in float32, the same order whatever R. A warp takes 32
 * own lines (16 for wide heads), 32 others at a time.
 */
#include "kernels/cuda/train.cuh"

#define BC 64  // other lines a copy
#define SUB 32 // and a step
#define WARPS 4
#define THREADS (WARPS * 32)

typedef __nv_bfloat16 bf16;

__device__ __forceinline__ float2 unpack(unsigned v) { return __bfloat1622float2(*(__nv_bfloat162 *)&v); }

__device__ __forceinline__ float power_of_2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

struct lines { // one head's lines in memory
    const bf16 *p;
    size_t ld;
};

// Lines [first, first + COUNT) into shared memory; lines from T on are zeros
template <int D, int COUNT> __device__ __forceinline__ void copy_lines(bf16 *dst, lines src, int first, int T) {
    constexpr int PIECES = D / 8, STRIDE = (D / 8 | 1) * 8;
#pragma unroll 3
    for (int i = threadIdx.x; i < COUNT * PIECES; i += THREADS) {
        int line = i / PIECES, piece = i % PIECES;
        bool inside = first + line < T;
        copy_async(dst + line * STRIDE + piece * 8, src.p + (size_t)(inside ? first + line : 0) * src.ld + piece * 8,
                   inside ? 16 : 0);
    }
}

// [first, first + BC) of two vectors of T floats
__device__ __forceinline__ void copy_stats(float *dst, const float *a, const float *b, int first, int T) {
    int i = threadIdx.x % BC;
    bool inside = first + i < T;
    const float *src = (threadIdx.x < BC ? a : b) + (inside ? first + i : 0);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(dst + threadIdx.x)), "l"(src),
                 "r"(inside ? 4 : 0));
}

// s = own other^T over MT tiles of 16 own lines and SUB other lines
template <int D, int MT> __device__ __forceinline__ void scores(float (&s)[MT][SUB / 8][4], const bf16 *own, const bf16 *other) {
    constexpr int STRIDE = (D / 8 | 1) * 8, STEPS = D / 16;
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int n = 0; n < SUB / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) s[m][n][i] = 0;
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
        unsigned a[MT][4];
#pragma unroll
        for (int m = 0; m < MT; m++) ldmatrix4(a[m], own + (m * 16 + (lane & 15)) * STRIDE + i * 16 + lane / 16 * 8);
#pragma unroll
        for (int n = 0; n < SUB / 16; n++) {
            unsigned b[4];
            ldmatrix4(b, other + (n * 16 + lane / 16 * 8 + (lane & 7)) * STRIDE + i * 16 + (lane / 8 & 1) * 8);
#pragma unroll
            for (int m = 0; m < MT; m++) {
                mma_k16<bf16>(s[m][2 * n], a[m], b[0], b[1]);
                mma_k16<bf16>(s[m][2 * n + 1], a[m], b[2], b[3]);
            }
        }
    }
    if (D % 16) {
        unsigned a[MT][2], b[4];
#pragma unroll
        for (int m = 0; m < MT; m++) ldmatrix2(a[m], own + (m * 16 + (lane & 15)) * STRIDE + STEPS * 16);
        ldmatrix4(b, other + lane * STRIDE + STEPS * 16);
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int m = 0; m < MT; m++) mma_k8<bf16>(s[m][i], a[m], b[i]);
    }
}

// acc += w other, w the packed weights of SUB other lines
template <int D, int MT>
__device__ __forceinline__ void gather(float (&acc)[MT][D / 8][4], const unsigned (&w)[MT][SUB / 16][4], const bf16 *other) {
    constexpr int STRIDE = (D / 8 | 1) * 8, TILES = D / 8;
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int i = 0; i < SUB / 16; i++) {
        const bf16 *line = other + (i * 16 + (lane & 15)) * STRIDE;
#pragma unroll
        for (int n = 0; n + 1 < TILES; n += 2) {
            unsigned b[4];
            ldmatrix4_trans(b, line + n * 8 + lane / 16 * 8);
#pragma unroll
            for (int m = 0; m < MT; m++) {
                mma_k16<bf16>(acc[m][n], w[m][i], b[0], b[1]);
                mma_k16<bf16>(acc[m][n + 1], w[m][i], b[2], b[3]);
            }
        }
        if (TILES % 2) {
            unsigned b[2];
            ldmatrix2_trans(b, line + (TILES - 1) * 8);
#pragma unroll
            for (int m = 0; m < MT; m++) mma_k16<bf16>(acc[m][TILES - 1], w[m][i], b[0], b[1]);
        }
    }
}

// factor*acc to the warp's lines of dst, through shared lines that only this warp uses
template <int D, int MT>
__device__ __forceinline__ void write(bf16 *dst, size_t ld, int first, int T, const float (&acc)[MT][D / 8][4], float factor,
                                      bf16 *through) {
    constexpr int STRIDE = (D / 8 | 1) * 8, TILES = D / 8;
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int g = 0; g < 2; g++)
#pragma unroll
            for (int n = 0; n < TILES; n++)
                *(unsigned *)(through + (m * 16 + g * 8 + lane / 4) * STRIDE + n * 8 + (lane & 3) * 2) =
                    pack<bf16>(acc[m][n][2 * g] * factor, acc[m][n][2 * g + 1] * factor);
    __syncwarp();
    for (int i = lane; i < MT * 16 * TILES; i += 32) {
        const int line = i / TILES, piece = i % TILES;
        if (first + line < T)
            *(uint4 *)(dst + (size_t)(first + line) * ld + piece * 8) = *(const uint4 *)(through + line * STRIDE + piece * 8);
    }
}

template <int D, int MT> struct shape {
    static constexpr int BR = WARPS * MT * 16, STRIDE = (D / 8 | 1) * 8, BYTES = (2 * BR + 4 * BC) * STRIDE * 2 + 4 * BC * 4;
};

// KEYS: own lines are keys. delta [R, H, T]: written when they are queries, read when they are keys
template <int D, int MT, bool KEYS>
__global__ void __launch_bounds__(THREADS, 2)
    back(bf16 *dqkv, const bf16 *d_o, const bf16 *qkv, const bf16 *o, const float *lse, float *delta, int T, int H, float scale) {
    typedef shape<D, MT> S;
    constexpr int STRIDE = S::STRIDE, BR = S::BR, TILES = D / 8;
    extern __shared__ __align__(16) bf16 shared[];
    bf16 *own1 = shared, *own2 = own1 + BR * STRIDE, *other1 = own2 + BR * STRIDE, *other2 = other1 + 2 * BC * STRIDE;
    float *stats = (float *)(other2 + 2 * BC * STRIDE); // [2][lse, delta][BC]
    const int lane = threadIdx.x & 31, mine = threadIdx.x / 32 * MT * 16, first = blockIdx.x * BR, blocks = (T + BC - 1) / BC;
    const size_t C = (size_t)H * D, row = blockIdx.z, head = row * H + blockIdx.y;
    const bf16 *base = qkv + row * T * 3 * C + (size_t)blockIdx.y * D;
    const lines q = {base, 3 * C}, k = {base + C, 3 * C}, v = {base + 2 * C, 3 * C},
                g = {d_o + row * T * C + (size_t)blockIdx.y * D, C};
    const float scale2 = scale * 1.4426950408889634f; // exp(x) = exp2(x log2 e)
    lse += head * T;
    delta += head * T;

    auto fetch = [&](int j) {
        if (j < blocks) {
            copy_lines<D, BC>(other1 + (j & 1) * BC * STRIDE, KEYS ? q : k, j * BC, T);
            copy_lines<D, BC>(other2 + (j & 1) * BC * STRIDE, KEYS ? g : v, j * BC, T);
            if (KEYS) copy_stats(stats + (j & 1) * 2 * BC, lse, delta, j * BC, T);
        }
        copy_commit();
    };
    copy_lines<D, BR>(own1, KEYS ? k : q, first, T);
    copy_lines<D, BR>(own2, KEYS ? v : g, first, T);
    copy_commit();
    fetch(0);
    own1 += mine * STRIDE, own2 += mine * STRIDE;
    float own_lse[MT][2], own_delta[MT][2];         // of this thread's queries, lse times log2 e and the estimate
    float total[MT][2] = {}, along[MT][2] = {};     // of their weights, and of those times dP - estimate
    if (!KEYS) {
        copy_wait<1>();
        __syncthreads();
        const int t = first + mine + (lane & (MT * 16 - 1));
        float sum = 0;
        if (t < T)
#pragma unroll
            for (int i = 0; i < TILES; i++) {
                uint4 a = *(const uint4 *)(own2 + (lane & (MT * 16 - 1)) * STRIDE + i * 8),
                      b = *(const uint4 *)(o + (row * T + t) * C + (size_t)blockIdx.y * D + i * 8);
                const unsigned *x = (const unsigned *)&a, *y = (const unsigned *)&b;
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    float2 l = unpack(x[e]), r = unpack(y[e]);
                    sum = fmaf(l.x, r.x, fmaf(l.y, r.y, sum));
                }
            }
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int line = m * 16 + i * 8 + lane / 4;
                own_delta[m][i] = __shfl_sync(0xffffffffu, sum, line);
                own_lse[m][i] = first + mine + line < T ? lse[first + mine + line] * 1.4426950408889634f : 0;
            }
    }

    float acc[MT][TILES][4] = {}, acc2[MT][TILES][4] = {}; // sums of dS and of P
    for (int j = 0; j < blocks; j++) {
        fetch(j + 1);
        copy_wait<1>();
        __syncthreads();
#pragma unroll 1
        for (int sub = 0; sub < BC; sub += SUB) {
            const bf16 *b1 = other1 + ((j & 1) * BC + sub) * STRIDE, *b2 = other2 + ((j & 1) * BC + sub) * STRIDE;
            const float *st = stats + (j & 1) * 2 * BC + sub + (lane & 3) * 2;
            float s[MT][SUB / 8][4];
            unsigned p[MT][SUB / 16][4];
            scores<D, MT>(s, own1, b1);
            if (!KEYS && j * BC + sub + SUB > T)
                for (int m = 0; m < MT; m++)
                    for (int n = 0; n < SUB / 8; n++)
                        for (int i = 0; i < 4; i++)
                            if (j * BC + sub + n * 8 + (lane & 3) * 2 + (i & 1) >= T) s[m][n][i] = -INFINITY;
#pragma unroll
            for (int n = 0; n < SUB / 8; n++) {
                const float l0 = KEYS ? st[n * 8] * 1.4426950408889634f : 0, l1 = KEYS ? st[n * 8 + 1] * 1.4426950408889634f : 0;
#pragma unroll
                for (int m = 0; m < MT; m++)
#pragma unroll
                    for (int i = 0; i < 2; i++)
                        p[m][n / 2][(n & 1) * 2 + i] =
                            pack<bf16>(power_of_2(fmaf(s[m][n][2 * i], scale2, -(KEYS ? l0 : own_lse[m][i]))),
                                       power_of_2(fmaf(s[m][n][2 * i + 1], scale2, -(KEYS ? l1 : own_lse[m][i]))));
            }
            gather<D, MT>(acc2, p, KEYS ? b2 : b1);
            scores<D, MT>(s, own2, b2);
#pragma unroll
            for (int n = 0; n < SUB / 8; n++) {
                const float d0 = KEYS ? st[BC + n * 8] : 0, d1 = KEYS ? st[BC + n * 8 + 1] : 0;
#pragma unroll
                for (int m = 0; m < MT; m++)
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        unsigned &w = p[m][n / 2][(n & 1) * 2 + i];
                        const float2 weight = unpack(w);
                        const float x = weight.x * (s[m][n][2 * i] - (KEYS ? d0 : own_delta[m][i])),
                                    y = weight.y * (s[m][n][2 * i + 1] - (KEYS ? d1 : own_delta[m][i]));
                        w = pack<bf16>(x, y);
                        if (!KEYS) total[m][i] += weight.x + weight.y, along[m][i] += x + y;
                    }
            }
            gather<D, MT>(acc, p, b1);
        }
        __syncthreads();
    }
    if (!KEYS)
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int line = first + mine + m * 16 + i * 8 + lane / 4;
                const float off = quad_sum(along[m][i]) / quad_sum(total[m][i]); // of the estimate
                if (line < T && !(lane & 3)) delta[line] = own_delta[m][i] + off;
#pragma unroll
                for (int n = 0; n < TILES; n++)
#pragma unroll
                    for (int e = 2 * i; e < 2 * i + 2; e++) acc[m][n][e] = fmaf(-off, acc2[m][n][e], acc[m][n][e]);
            }
    bf16 *out = dqkv + row * T * 3 * C + (size_t)blockIdx.y * D;
    write<D, MT>(out + (KEYS ? C : 0), 3 * C, first + mine, T, acc, scale, own1);
    if constexpr (KEYS) write<D, MT>(out + 2 * C, 3 * C, first + mine, T, acc2, 1, own2);
}

template <int D, int MT>
static int launch(struct kern *k, bf16 *dqkv, const bf16 *d_o, const bf16 *qkv, const bf16 *o, const float *lse, float *delta,
                  int R, int T, int H) {
    typedef shape<D, MT> S;
    int rc = cuda_check(k, cudaFuncSetAttribute(back<D, MT, false>, cudaFuncAttributeMaxDynamicSharedMemorySize, S::BYTES),
                        "attention_backward");
    if (rc == KERN_OK)
        rc = cuda_check(k, cudaFuncSetAttribute(back<D, MT, true>, cudaFuncAttributeMaxDynamicSharedMemorySize, S::BYTES),
                        "attention_backward");
    if (rc < 0) return rc;
    dim3 grid((unsigned)((T + S::BR - 1) / S::BR), (unsigned)H, (unsigned)R);
    float scale = 1 / sqrtf((float)D);
    back<D, MT, false><<<grid, THREADS, S::BYTES, cuda_of(k)->stream>>>(dqkv, d_o, qkv, o, lse, delta, T, H, scale);
    back<D, MT, true><<<grid, THREADS, S::BYTES, cuda_of(k)->stream>>>(dqkv, d_o, qkv, o, lse, delta, T, H, scale);
    return cuda_launched(k, "attention_backward");
}

// Two tiles a warp do not fit the registers from head dimension 88 on, and 64 tokens do not fill them
template <int D>
static int run(struct kern *k, bf16 *dqkv, const bf16 *d_o, const bf16 *qkv, const bf16 *o, const float *lse, float *delta, int R,
               int T, int H) {
    if constexpr (D <= 80)
        if (T > 64) return launch<D, 2>(k, dqkv, d_o, qkv, o, lse, delta, R, T, H);
    return launch<D, 1>(k, dqkv, d_o, qkv, o, lse, delta, R, T, H);
}

static int any_length(struct kern *k, void *dqkv, const void *d_o, const void *qkv, const void *o, const float *lse, void *delta,
                      int R, int T, int H, int D) {
    int rc;
    if (k->act == KERN_F32)
        return attention_back_f32(k, (float *)dqkv, (const float *)d_o, (const float *)qkv, (const float *)o, lse, (float *)delta,
                                  R, T, H, D);
    if (attention_back_sm90(k, dqkv, d_o, qkv, o, lse, (float *)delta, R, T, H, D, &rc)) return rc;
    switch (D) {
#define CASE(d)                                                                                                                  \
    case d:                                                                                                                      \
        return run<d>(k, (bf16 *)dqkv, (const bf16 *)d_o, (const bf16 *)qkv, (const bf16 *)o, lse, (float *)delta, R, T, H)
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

int cuda_attention_backward(struct kern *k, void *dqkv, float *dqkv_sum, const void *d_o, const void *qkv, const void *o,
                            const float *lse, int R, int T, int H, int D, bool add) {
    const size_t deltas = KERN_ROUND_UP((size_t)R * (size_t)H * (size_t)T * 4, (size_t)256);
    const long lines = (long)R * T;
    const int N = 3 * H * D;
    void *scratch;
    int rc = cuda_of(k)->host->check_attention(k, T, H, D);
    if (rc < 0 || R == 0) return rc;
    if (R > 65535 || H > 65535) return cuda_fail(k, KERN_EUNSUPPORTED, "attention_backward of %d rows and %d heads", R, H);
    rc = cuda_scratch(k, deltas + column_scratch(lines, N), &scratch);
    if (rc < 0) return rc;
    rc = any_length(k, dqkv, d_o, qkv, o, lse, scratch, R, T, H, D);
    if (rc < 0 || !dqkv_sum) return rc;
    return column_sums(k, dqkv_sum, (float *)((char *)scratch + deltas), dqkv, k->act == KERN_F32, lines, N, N, add);
}
