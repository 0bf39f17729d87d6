// SPDX-License-Identifier: MIT
/*
 * attention_back_head: attention's backward by Hopper's wgmma where a whole head fits a multiprocessor's shared memory: 129 to
 * 256 tokens, head dimensions 64 and 72.
 *
 * A block is one head of one row, and reads q, k, v and dO once. Each of its four warpgroups owns 64 keys and walks the queries,
 * 32 at a time: scores, then dP, keys in rows, become P and dS where they are, the register operands of dv and dk. dS also goes
 * to shared memory, 64 queries of all keys; with k it makes dq, which warpgroup i does for the queries from 64 i on while the
 * others go on to the next 64. So there are five products, no sum crosses blocks, and the order of every sum is fixed.
 *
 * Shared memory holds 256 lines an operand (wgmma.cuh), two buffers of dS, and little else: one block a multiprocessor.
 */
#include "kernels/cuda/train.cuh"
#include "kernels/cuda/wgmma.cuh"

#define LOG2E 1.4426950408889634f
#define GROUPS 4
#define TOKENS (GROUPS * TILE)
#define THREADS (GROUPS * 128)
#define STEP 32 // queries
#define WARPS (THREADS / 32)

template <int D> struct head_shape {
    static constexpr int ONE = OPERAND(D, TOKENS), TAIL = TOKENS * 128,
                         DS = TILE * 128; // TAIL: where D's last 8 begin; DS: of one group's keys
    static constexpr int STATS = 4 * ONE + 2 * GROUPS * DS, ZEROS = STATS + 2 * TOKENS * 4, SUMS = ZEROS + TILE * 16,
                         BYTES = SUMS + 3 * WARPS * D * 4;
};

#ifdef HOPPER

__device__ __forceinline__ void multiply(float (&d)[16], uint64_t a, uint64_t b, int add) { // m64n32k16, both K-major
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, %16, %17, p, 1, 1, 0, 0;\n}"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
                   "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
                 : "l"(a), "l"(b), "r"(add));
}

// m64n32k16 and m64n8k16, A M-major, B N-major, both in shared memory
__device__ __forceinline__ void multiply_across(float (&d)[16], uint64_t a, uint64_t b, int add) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, %16, %17, p, 1, 1, 1, 1;\n}"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
                   "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
                 : "l"(a), "l"(b), "r"(add));
}
__device__ __forceinline__ void multiply_across(float (&d)[4], uint64_t a, uint64_t b, int add) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %6, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %5, p, 1, 1, 1, 1;\n}"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "l"(a), "l"(b), "r"(add));
}

// Descriptors (wgmma.cuh) from addresses in sixteens: one addition each, so that no more than the addresses is kept in registers
__device__ __forceinline__ uint64_t words(unsigned low, unsigned high) { return low | (uint64_t)high << 32; }
__device__ __forceinline__ uint64_t swizzled16(unsigned at) { return words(at + (1 << 16), 1024 / 16 | 1 << 30); }
__device__ __forceinline__ uint64_t last8(unsigned at, unsigned leading) { return words(at + (leading << 16), 128 / 16); }

struct sums { // a warpgroup's results: of D 0 .. 63 and 64 .. 71
    float o[32], tail[4];
};

// s = 64 lines of a times 32 lines of b, which begin at a0 and b0
template <int D> __device__ __forceinline__ void scores(float (&s)[16], unsigned a, int a0, unsigned b, int b0, unsigned zeros) {
    const unsigned ta = a + head_shape<D>::TAIL / 16 + a0, tb = b + head_shape<D>::TAIL / 16 + b0;
#pragma unroll
    for (int i = 0; i < 4; i++) multiply(s, swizzled16(a + a0 * 8 + i * 2), swizzled16(b + b0 * 8 + i * 2), i > 0);
    if (D > 64) multiply(s, last8(ta, zeros - ta), last8(tb, zeros - tb), 1);
}

// r += w times 32 lines of `other` from line `first` on
template <int D> __device__ __forceinline__ void gather(sums &r, const unsigned (&w)[2][4], unsigned other, int first) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        multiply(r.o, w[i], swizzled16(other + first * 8 + i * 16 * 8));
        if (D > 64) multiply(r.tail, w[i], last8(other + head_shape<D>::TAIL / 16 + first + i * 16, 128 / 16));
    }
}

// factor*r to pieces of this thread's lines of an operand
template <int N>
__device__ __forceinline__ void stage(char *operand, int line, int piece, const float (&r)[4 * N], float factor) {
#pragma unroll
    for (int g = 0; g < 2; g++)
#pragma unroll
        for (int n = 0; n < N; n++)
            *(unsigned *)(operand + place<TOKENS>(line + g * 8, piece + n) + (threadIdx.x & 3) * 4) =
                pack<bf16>(r[4 * n + 2 * g] * factor, r[4 * n + 2 * g + 1] * factor);
}

// 16 lines of an operand to memory, and the sums of their columns to `sum` [D]
template <int D> __device__ __forceinline__ void flush(bf16 *dst, int ld, int first, int T, const char *operand, float *sum) {
    const int lane = threadIdx.x & 31;
    __syncwarp();
#pragma unroll 1
    for (int i = lane; i < 16 * (D / 8); i += 32) {
        const int line = first + i / (D / 8), piece = i % (D / 8);
        if (line < T) *(uint4 *)(dst + (size_t)line * ld + piece * 8) = *(const uint4 *)(operand + place<TOKENS>(line, piece));
    }
#pragma unroll 1
    for (int pair = lane; pair < D / 2; pair += 32) {
        float2 total = make_float2(0, 0);
#pragma unroll
        for (int i = 0; i < 16; i++) {
            const float2 x =
                __bfloat1622float2(*(const __nv_bfloat162 *)(operand + place<TOKENS>(first + i, pair / 4) + (pair & 3) * 4));
            if (first + i < T) total.x += x.x, total.y += x.y;
        }
        *(float2 *)(sum + pair * 2) = total;
    }
    __syncwarp();
}

// 64 queries' dq from their dS of all keys, 32 columns at a time (registers), to their lines of q
template <int D> __device__ __forceinline__ void make_dq(char *q, int line, float scale, unsigned ds, unsigned k) {
#pragma unroll 1
    for (int half = 0; half < 2; half++) {
        float r[16];
        products_begin();
#pragma unroll
        for (int i = 0; i < TOKENS / 16; i++) // the groups' dS lie one behind the other
            multiply_across(r, swizzled16(ds + i * 16 * 8), swizzled16(k + i * 16 * 8 + half * 4), i > 0);
        products_end();
        stage<4>(q, line, half * 4, r, scale);
    }
    if (D == 64) return;
    float r[4];
    products_begin();
#pragma unroll
    for (int i = 0; i < TOKENS / 16; i++)
        multiply_across(r, swizzled16(ds + i * 16 * 8), last8(k + head_shape<D>::TAIL / 16 + i * 16, 128 / 16), i > 0);
    products_end();
    stage<1>(q, line, 8, r, scale);
}

// Among all threads of the block: arrive does not wait, sync does
__device__ __forceinline__ void barrier_arrive(int id) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "n"(THREADS) : "memory"); }
__device__ __forceinline__ void barrier_sync(int id) { asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(THREADS) : "memory"); }
enum { DS_READY = 1, DS_FREE = DS_READY + GROUPS, GROUP = DS_FREE + GROUPS - 2 }; // of step i; GROUP: of one warpgroup alone

#endif

// part [R, 3*H*D]: sums of dqkv over a row's tokens
template <int D>
__global__ void __launch_bounds__(THREADS, 1) back_head(bf16 *dqkv, float *part, const bf16 *d_o, const bf16 *qkv, const bf16 *o,
                                                        const float *lse, int T, int H, float scale) {
#ifdef HOPPER
    typedef head_shape<D> S;
    extern __shared__ __align__(1024) char shared[];
    char *const own = shared, *const ds = shared + 4 * S::ONE; // q, k, v, dO
    float *const lse2 = (float *)(shared + S::STATS), *const delta = lse2 + TOKENS, *const column = (float *)(shared + S::SUMS);
    const int thread = threadIdx.x, lane = thread & 31, group = __shfl_sync(0xffffffffu, thread / 128, 0), warp = thread / 32,
              C = H * D, ld = 3 * C;
    const size_t row = blockIdx.y, head = row * H + blockIdx.x;
    const bf16 *in = qkv + row * T * ld + (size_t)blockIdx.x * D;
    const float scale2 = scale * LOG2E;
#pragma unroll 1
    for (int i = 0; i < 4; i++)
        copy_lines<D, TOKENS, TOKENS, THREADS>(
            own + i * S::ONE, 0, i < 3 ? in + i * C : d_o + row * T * C + (size_t)blockIdx.x * D, i < 3 ? ld : C, 0, T, thread);
    copy_commit();
    { // dO * O of a line by two threads
        const int line = thread / 2;
        const bf16 *mine = o + (row * T + line) * C + (size_t)blockIdx.x * D;
        uint4 a[(D / 8 + 1) / 2];
#pragma unroll
        for (int i = 0; i < (D / 8 + 1) / 2; i++)
            a[i] = line < T && 2 * i + (thread & 1) < D / 8 ? *(const uint4 *)(mine + (2 * i + (thread & 1)) * 8)
                                                            : make_uint4(0, 0, 0, 0);
        if (thread < TOKENS)
            lse2[thread] = thread < T ? lse[head * T + thread] * LOG2E : INFINITY; // no weights of queries that are not there
        clear_column<THREADS>(shared + S::ZEROS, TILE);
        copy_wait<0>();
        visible_to_products();
        __syncthreads();
        float sum = 0;
#pragma unroll
        for (int i = 0; i < (D / 8 + 1) / 2; i++) {
            if (2 * i + (thread & 1) >= D / 8) continue;
            const uint4 b = *(const uint4 *)(own + 3 * S::ONE + place<TOKENS>(line, 2 * i + (thread & 1)));
            const __nv_bfloat162 *x = (const __nv_bfloat162 *)&a[i], *y = (const __nv_bfloat162 *)&b;
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const float2 l = __bfloat1622float2(x[e]), r = __bfloat1622float2(y[e]);
                sum = fmaf(l.x, r.x, fmaf(l.y, r.y, sum));
            }
        }
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        if (!(thread & 1)) delta[line] = sum;
        __syncthreads();
    }
    const unsigned q = shared_address(own) / 16, k = q + S::ONE / 16, v = k + S::ONE / 16, g = v + S::ONE / 16,
                   z = q + S::ZEROS / 16;
    const int keys = group * TILE, my_key = keys + (warp & 3) * 16 + lane / 4;
    const bool there[2] = {my_key < T, my_key + 8 < T};
    bf16 *out = dqkv + row * T * ld + (size_t)blockIdx.x * D;
    float *my_column = column + warp * D;
    sums dk, dv;
#pragma unroll
    for (int i = 0; i < 32; i++) dk.o[i] = dv.o[i] = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) dk.tail[i] = dv.tail[i] = 0;
#pragma unroll 1
    for (int i = 0; i < GROUPS; i++) {
        char *buffer = ds + (i & 1) * GROUPS * S::DS;
        if (i >= 2 && group != i - 2) barrier_sync(DS_FREE + i - 2);
#pragma unroll 1
        for (int half = 0; half < 2; half++) {
            const int first = i * TILE + half * STEP;
            const float *l = lse2 + first + (lane & 3) * 2, *t = delta + first + (lane & 3) * 2;
            char *mine = buffer + group * S::DS + place<TILE>((warp & 3) * 16 + lane / 4, 0);
            float s[16];
            unsigned weights[2][4], slopes[2][4];
            products_begin();
            scores<D>(s, k, keys, q, first, z);
            products_end();
#pragma unroll
            for (int n = 0; n < 4; n++) {
                const float2 ln = *(const float2 *)(l + n * 8);
#pragma unroll
                for (int j = 0; j < 2; j++)
                    weights[n / 2][(n & 1) * 2 + j] = there[j] ? pack<bf16>(power_of_2(fmaf(s[4 * n + 2 * j], scale2, -ln.x)),
                                                                            power_of_2(fmaf(s[4 * n + 2 * j + 1], scale2, -ln.y)))
                                                               : 0;
            }
            products_begin();
            scores<D>(s, v, keys, g, first, z);
            gather<D>(dv, weights, g, first);
            products_end();
#pragma unroll
            for (int n = 0; n < 4; n++) {
                const float2 tn = *(const float2 *)(t + n * 8);
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    const float2 p = __bfloat1622float2(*(__nv_bfloat162 *)&weights[n / 2][(n & 1) * 2 + j]);
                    slopes[n / 2][(n & 1) * 2 + j] =
                        pack<bf16>(p.x * (s[4 * n + 2 * j] - tn.x), p.y * (s[4 * n + 2 * j + 1] - tn.y));
                    // lines lie 128 bytes apart and their pieces are permuted by the line's last three bits, the same in j's two
                    *(unsigned *)((char *)((size_t)mine ^ (size_t)((half * 4 + n) * 16)) + j * 8 * 128 + (lane & 3) * 4) =
                        slopes[n / 2][(n & 1) * 2 + j];
                }
            }
            products_begin();
            gather<D>(dk, slopes, q, first);
            products_end();
        }
        visible_to_products();
        if (group != i) barrier_arrive(DS_READY + i);
        else {
            barrier_sync(DS_READY + i);
            make_dq<D>(own, my_key, scale, q + (unsigned)(buffer - own) / 16, k); // these queries are read no more
            if (i < GROUPS - 2) barrier_arrive(DS_FREE + i);
            flush<D>(out, ld, my_key - lane / 4, T, own, my_column);
        }
    }
    asm volatile("bar.sync %0, 128;" ::"r"(GROUP + group) : "memory"); // nor this group's values
    char *staging = own + 2 * S::ONE;
    stage<8>(staging, my_key, 0, dk.o, scale);
    if (D > 64) stage<1>(staging, my_key, 8, dk.tail, scale);
    flush<D>(out + C, ld, my_key - lane / 4, T, staging, my_column + WARPS * D);
    stage<8>(staging, my_key, 0, dv.o, 1);
    if (D > 64) stage<1>(staging, my_key, 8, dv.tail, 1);
    flush<D>(out + 2 * C, ld, my_key - lane / 4, T, staging, my_column + 2 * WARPS * D);
    __syncthreads();
    if (thread < 3 * D) {
        const int which = thread / D, d = thread % D;
        float sum = 0;
        for (int w = 0; w < WARPS; w++) sum += column[(which * WARPS + w) * D + d];
        part[row * ld + which * C + blockIdx.x * D + d] = sum;
    }
#endif
}

template <int D>
static int launch(struct kern *k, bf16 *dqkv, float *part, const bf16 *d_o, const bf16 *qkv, const bf16 *o, const float *lse,
                  int R, int T, int H) {
    constexpr int BYTES = head_shape<D>::BYTES;
    int rc = cuda_check(k, cudaFuncSetAttribute(back_head<D>, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES),
                        "attention_backward");
    if (rc < 0) return rc;
    back_head<D><<<dim3((unsigned)H, (unsigned)R), THREADS, BYTES, cuda_of(k)->stream>>>(dqkv, part, d_o, qkv, o, lse, T, H,
                                                                                         1 / sqrtf((float)D));
    return cuda_launched(k, "attention_backward");
}

bool attention_back_head(struct kern *k, void *dqkv, float *part, const void *d_o, const void *qkv, const void *o,
                         const float *lse, int R, int T, int H, int D, int *rc) {
    if (!cuda_of(k)->hopper || T <= TOKENS / 2 || T > TOKENS || (D != 64 && D != 72)) return false;
    *rc = (D == 64 ? launch<64> : launch<72>)(k, (bf16 *)dqkv, part, (const bf16 *)d_o, (const bf16 *)qkv, (const bf16 *)o, lse,
                                              R, T, H);
    return true;
}
