// SPDX-License-Identifier: MIT
/*
 * attention_back_sm90: attention_back.cu's two passes by Hopper's wgmma, for the head dimensions that serve (64 and 72).
 *
 * A block is one warpgroup with 64 own lines (queries for dq, keys for dk and dv) and walks the others 64 at a time, the next
 * ones on their way. A step makes scores and dP together (64 registers a thread), turns them into P and dS where they are, which
 * packed are the register operands of the products with the others' lines: of P too with queries of their own. At most 168 registers, so three blocks share a
 * multiprocessor and one's exponentials hide behind another's products.
 */
#include "kernels/cuda/train.cuh"
#include "kernels/cuda/wgmma.cuh"

#define LOG2E 1.4426950408889634f

template <int D> struct back_shape {
    static constexpr int ONE = OPERAND(D, TILE),
                         BYTES = 6 * ONE + TILE * 16 + 4 * TILE * 4; // own, two pairs of others, zeros, statistics
};

#ifdef HOPPER

// s = 64 lines of a times 64 lines of b; addresses in units of 16 bytes
template <int D> __device__ __forceinline__ void scores(float (&s)[32], unsigned a, unsigned b, unsigned zeros) {
#pragma unroll
    for (int i = 0; i < 4; i++) multiply(s, swizzled(a + i * 2), swizzled(b + i * 2), i > 0);
    const unsigned ta = a + TILE * 8, tb = b + TILE * 8;
    if (D > 64) multiply(s, column(ta, zeros - ta), column(tb, zeros - tb), 1);
}

struct sums { // a warpgroup's results: of D 0 .. 63 and 64 .. 71
    float o[32], tail[4];
};

template <int D> __device__ __forceinline__ void gather(sums &r, const unsigned (&w)[4][4], unsigned other) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        multiply(r.o, w[i], swizzled(other + i * 16 * 8));
        if (D > 64) multiply(r.tail, w[i], column(other + TILE * 8 + i * 16, 128 / 16));
    }
}

// factor*r to the warp's 16 lines of memory, through those of an operand
template <int D>
__device__ __forceinline__ void write(bf16 *dst, int ld, int first, int T, const sums &r, float factor, char *operand) {
    const int lane = threadIdx.x & 31, mine = threadIdx.x / 32 * 16;
#pragma unroll
    for (int g = 0; g < 2; g++) {
        const int line = mine + g * 8 + lane / 4;
#pragma unroll
        for (int n = 0; n < 8; n++)
            *(unsigned *)(operand + place<TILE>(line, n) + (lane & 3) * 4) =
                pack<bf16>(r.o[4 * n + 2 * g] * factor, r.o[4 * n + 2 * g + 1] * factor);
        if (D > 64)
            *(unsigned *)(operand + place<TILE>(line, 8) + (lane & 3) * 4) =
                pack<bf16>(r.tail[2 * g] * factor, r.tail[2 * g + 1] * factor);
    }
    __syncwarp();
#pragma unroll
    for (int i = lane; i < 16 * (D / 8); i += 32) {
        const int line = mine + i / (D / 8), piece = i % (D / 8);
        if (first + line < T)
            *(uint4 *)(dst + (size_t)(first + line) * ld + piece * 8) = *(const uint4 *)(operand + place<TILE>(line, piece));
    }
}

// Two of this warp's 64 queries' sums of dO * O; thread/2 is the line. dO from its operand
template <int D> __device__ __forceinline__ float row_sum(const char *operand, const bf16 *o, bool inside) {
    const int line = threadIdx.x / 2;
    float sum = 0;
    for (int i = threadIdx.x & 1; inside && i < D / 8; i += 2) {
        const uint4 a = *(const uint4 *)(operand + place<TILE>(line, i)), b = *(const uint4 *)(o + i * 8);
        const __nv_bfloat162 *x = (const __nv_bfloat162 *)&a, *y = (const __nv_bfloat162 *)&b;
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const float2 l = __bfloat1622float2(x[e]), r = __bfloat1622float2(y[e]);
            sum = fmaf(l.x, r.x, fmaf(l.y, r.y, sum));
        }
    }
    return sum + __shfl_xor_sync(0xffffffffu, sum, 1);
}

#endif

// KEYS: own lines are keys. delta [R, H, T]: written when they are queries, read when they are keys
template <int D, bool KEYS>
__global__ void __launch_bounds__(128, 3) back_sm90(bf16 *dqkv, const bf16 *d_o, const bf16 *qkv, const bf16 *o, const float *lse,
                                                    float *delta, int T, int H, float scale) {
#ifdef HOPPER
    typedef back_shape<D> S;
    extern __shared__ __align__(1024) char shared[];
    char *own1 = shared, *own2 = own1 + S::ONE, *other1 = own2 + S::ONE, *other2 = other1 + 2 * S::ONE,
         *zeros = other2 + 2 * S::ONE;
    float *stats = (float *)(zeros + TILE * 16); // [2][lse, delta][TILE]
    const int thread = threadIdx.x, lane = thread & 31, first = blockIdx.x * TILE, steps = (T + TILE - 1) / TILE, C = H * D,
              ld = 3 * C;
    const size_t row = blockIdx.z, head = row * H + blockIdx.y;
    const bf16 *q = qkv + row * T * ld + (size_t)blockIdx.y * D, *g = d_o + row * T * C + (size_t)blockIdx.y * D;
    const float scale2 = scale * LOG2E;
    lse += head * T;
    delta += head * T;
    auto copy = [&](char *to, const bf16 *src, int ld_src, int at) {
        copy_lines<D>(to, src + (size_t)at * ld_src, ld_src, T - at);
    };
    auto fetch = [&](int j) {
        if (j < steps) {
            const int at = j * TILE;
            copy(other1 + (j & 1) * S::ONE, KEYS ? q : q + C, ld, at);
            copy(other2 + (j & 1) * S::ONE, KEYS ? g : q + 2 * C, KEYS ? C : ld, at);
            if (KEYS) {
                const bool inside = at + thread % TILE < T;
                const float *src = (thread < TILE ? lse : delta) + (inside ? at + thread % TILE : 0);
                asm volatile(
                    "cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(stats + (j & 1) * 2 * TILE + thread)),
                    "l"(src), "r"(inside ? 4 : 0));
            }
        }
        copy_commit();
    };
    copy(own1, KEYS ? q + C : q, ld, first);
    copy(own2, KEYS ? q + 2 * C : g, KEYS ? ld : C, first);
    copy_commit();
    fetch(0);
    clear_column<128>(zeros, TILE);
    float own_lse[2] = {0, 0}, own_delta[2] = {0, 0}; // of this thread's two queries, lse times log2 e and the estimate
    float total[2] = {0, 0}, along[2] = {0, 0};       // of their weights, and of those times dP - estimate
    if (!KEYS) {
        copy_wait<1>();
        __syncthreads();
        const int t = first + thread / 2, line = first + thread / 32 * 16 + lane / 4;
        const float sum = row_sum<D>(own2, o + (row * T + t) * C + (size_t)blockIdx.y * D, t < T);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            own_delta[i] = __shfl_sync(0xffffffffu, sum, 2 * (i * 8 + lane / 4));
            if (line + i * 8 < T) own_lse[i] = lse[line + i * 8] * LOG2E;
        }
    }
    const unsigned a1 = shared_address(own1) / 16, a2 = a1 + S::ONE / 16, o1 = a2 + S::ONE / 16, o2 = o1 + 2 * S::ONE / 16,
                   z = o2 + 2 * S::ONE / 16;
    sums r1, r2; // of dS and of P: with keys of their own dk and dv, with queries what the estimate makes of dq, and the mean key
#pragma unroll
    for (int i = 0; i < 32; i++) r1.o[i] = r2.o[i] = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) r1.tail[i] = r2.tail[i] = 0;
#pragma unroll 1
    for (int j = 0; j < steps; j++) {
        fetch(j + 1);
        copy_wait<1>();
        visible_to_products();
        __syncthreads();
        const unsigned b1 = o1 + (j & 1) * (S::ONE / 16), b2 = o2 + (j & 1) * (S::ONE / 16);
        const float *st = stats + (j & 1) * 2 * TILE + (lane & 3) * 2;
        float s[32], dp[32];
        unsigned p[4][4], ds[4][4];
        products_begin();
        scores<D>(s, a1, b1, z);
        scores<D>(dp, a2, b2, z);
        products_end();
        if (!KEYS && (j + 1) * TILE > T)
#pragma unroll
            for (int i = 0; i < 32; i++)
                if (j * TILE + i / 4 * 8 + (lane & 3) * 2 + (i & 1) >= T) s[i] = -INFINITY;
#pragma unroll
        for (int n = 0; n < 8; n++) {
            const float2 l = KEYS ? *(const float2 *)(st + n * 8) : make_float2(0, 0),
                         d = KEYS ? *(const float2 *)(st + TILE + n * 8) : make_float2(0, 0);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float x = power_of_2(fmaf(s[4 * n + 2 * i], scale2, -(KEYS ? l.x * LOG2E : own_lse[i]))),
                            y = power_of_2(fmaf(s[4 * n + 2 * i + 1], scale2, -(KEYS ? l.y * LOG2E : own_lse[i])));
                const float dx = x * (dp[4 * n + 2 * i] - (KEYS ? d.x : own_delta[i])),
                            dy = y * (dp[4 * n + 2 * i + 1] - (KEYS ? d.y : own_delta[i]));
                p[n / 2][(n & 1) * 2 + i] = pack<bf16>(x, y);
                ds[n / 2][(n & 1) * 2 + i] = pack<bf16>(dx, dy);
                if (!KEYS) total[i] += x + y, along[i] += dx + dy;
            }
        }
        products_begin();
        gather<D>(r2, p, KEYS ? b2 : b1);
        gather<D>(r1, ds, b1);
        products_end();
        __syncthreads();
    }
    if (!KEYS) {
        const int line = first + thread / 32 * 16 + lane / 4;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float off = quad_sum(along[i]) / quad_sum(total[i]); // of the estimate
            if (line + i * 8 < T && !(lane & 3)) delta[line + i * 8] = own_delta[i] + off;
#pragma unroll
            for (int n = 0; n < 8; n++)
#pragma unroll
                for (int e = 4 * n + 2 * i; e < 4 * n + 2 * i + 2; e++) r1.o[e] = fmaf(-off, r2.o[e], r1.o[e]);
#pragma unroll
            for (int e = 2 * i; e < 2 * i + 2; e++) r1.tail[e] = fmaf(-off, r2.tail[e], r1.tail[e]);
        }
    }
    bf16 *out = dqkv + row * T * ld + (size_t)blockIdx.y * D;
    write<D>(out + (KEYS ? C : 0), ld, first, T, r1, scale, own1);
    if (KEYS) write<D>(out + 2 * C, ld, first, T, r2, 1, own2);
#endif
}

template <int D>
static int launch(struct kern *k, bf16 *dqkv, const bf16 *d_o, const bf16 *qkv, const bf16 *o, const float *lse, float *delta,
                  int R, int T, int H) {
    constexpr int BYTES = back_shape<D>::BYTES;
    int rc = cuda_check(k, cudaFuncSetAttribute(back_sm90<D, false>, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES),
                        "attention_backward");
    if (rc == KERN_OK)
        rc = cuda_check(k, cudaFuncSetAttribute(back_sm90<D, true>, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES),
                        "attention_backward");
    if (rc < 0) return rc;
    dim3 grid((unsigned)((T + TILE - 1) / TILE), (unsigned)H, (unsigned)R);
    float scale = 1 / sqrtf((float)D);
    back_sm90<D, false><<<grid, 128, BYTES, cuda_of(k)->stream>>>(dqkv, d_o, qkv, o, lse, delta, T, H, scale);
    back_sm90<D, true><<<grid, 128, BYTES, cuda_of(k)->stream>>>(dqkv, d_o, qkv, o, lse, delta, T, H, scale);
    return cuda_launched(k, "attention_backward");
}

bool attention_back_sm90(struct kern *k, void *dqkv, const void *d_o, const void *qkv, const void *o, const float *lse,
                         float *delta, int R, int T, int H, int D, int *rc) {
    if (!cuda_of(k)->hopper || (D != 64 && D != 72)) return false;
    *rc = D == 64 ? launch<64>(k, (bf16 *)dqkv, (const bf16 *)d_o, (const bf16 *)qkv, (const bf16 *)o, lse, delta, R, T, H)
                  : launch<72>(k, (bf16 *)dqkv, (const bf16 *)d_o, (const bf16 *)qkv, (const bf16 *)o, lse, delta, R, T, H);
    return true;
}
