// SPDX-License-Identifier: MIT
/*
 * attention_sm90: attention in bfloat16 by Hopper's wgmma, for the head dimensions that serve (64 and 72). attention.cu says what
 * is computed.
 *
 * mma.sync keeps at best 62 % of Hopper's tensor rate, and its ldmatrix traffic alone costs a quarter of the time; wgmma reads
 * keys and values from shared memory by itself. A warpgroup (4 warps) takes 64 queries and walks the keys 64 at a time: S = Q K^T
 * in 32 registers a thread, softmax so far, P packed to bfloat16 as the register operand of O += P V. Four warpgroups share a
 * multiprocessor, so one's softmax hides behind another's products; with 128 keys a step their registers would not suffice and
 * the compiler would wait between products.
 *
 * In shared memory an operand's first 64 numbers of each line are 128 bytes, their 16-byte pieces permuted by the line's number
 * (wgmma's 128-byte swizzle: piece p of line r at 128 r + 16 (p ^ r mod 8)); the last 8 of a head dimension of 72 are a column of
 * 16 bytes a line behind them (wgmma's layout without swizzle). wgmma wants D in steps of 16, so the fifth step takes that column
 * and one column of zeros that all operands share; as values the column is a product of its own, 8 wide. A first version had
 * columns only: correct, but a copied line then lands in nine places and copying alone took 63 us of a block of XL at 64 rows
 * instead of 42 (SPEED.md). cp.async writes through the generic proxy and wgmma reads through the asynchronous one: every copying
 * thread fences between.
 *
 * As in attention.cu a query's bits depend on the number of keys alone.
 */
#include "kernels/cuda/device.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HOPPER 1
#endif

#define BC 64                               // keys a step
#define TILE 64                             // queries a warpgroup
#define OPERAND(D, lines) ((lines)*2 * (D)) // bytes, a multiple of 1024

typedef __nv_bfloat16 bf16;

#ifdef HOPPER

__device__ __forceinline__ void multiply(float (&d)[32], uint64_t a, uint64_t b,
                                         int add) { // m64n64k16, both in shared memory, K-major
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
                 "%32, %33, p, 1, 1, 0, 0;\n}"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
                   "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
                   "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
                   "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
                 : "l"(a), "l"(b), "r"(add));
}

__device__ __forceinline__ void multiply(float (&d)[32], const unsigned (&a)[4],
                                         uint64_t b) { // m64n64k16, A in registers, B N-major; adds
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
                 "{%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
                   "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
                   "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
                   "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

__device__ __forceinline__ void multiply(float (&d)[4], const unsigned (&a)[4],
                                         uint64_t b) { // m64n8k16, A in registers, B N-major; adds
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, {%4, %5, %6, %7}, %8, 1, 1, 1, 1;"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_end() { // and waits for them
    asm volatile("wgmma.commit_group.sync.aligned;\n wgmma.wait_group.sync.aligned 0;" ::: "memory");
}
__device__ __forceinline__ void visible_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// leading, stride: see the PTX manual, "strides"; swizzled operands have 1024 bytes from 8 lines to the next 8 and no other
// stride
__device__ __forceinline__ uint64_t descriptor(unsigned address, unsigned leading, unsigned stride) {
    return (uint64_t)((address & 0x3ffff) >> 4) | (uint64_t)(leading >> 4) << 16 | (uint64_t)(stride >> 4) << 32;
}
__device__ __forceinline__ uint64_t swizzled(unsigned address) { return descriptor(address, 16, 1024) | (uint64_t)1 << 62; }

__device__ __forceinline__ unsigned pack(float lo, float hi) {
    __nv_bfloat162 v = __floats2bfloat162_rn(lo, hi);
    return *(unsigned *)&v;
}

__device__ __forceinline__ float power_of_2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Where piece p of a line of an operand of LINES lines lies
template <int LINES> __device__ __forceinline__ int place(int line, int piece) {
    return piece < 8 ? line * 128 + (piece ^ (line & 7)) * 16 : LINES * 128 + line * 16;
}

// Lines [0, COUNT) of one head to the lines from `at` on of an operand; src is the row's line `first`; from line T on: zeros
template <int D, int COUNT, int LINES, int THREADS>
__device__ __forceinline__ void copy_lines(char *operand, int at, const bf16 *src, int ld, int first, int T, int thread) {
#pragma unroll 3
    for (int i = thread; i < COUNT * (D / 8); i += THREADS) {
        int line = i / (D / 8), piece = i % (D / 8);
        bool inside = first + line < T;
        copy_async(operand + place<LINES>(at + line, piece), src + (inside ? line * ld + piece * 8 : -first * ld),
                   inside ? 16 : 0);
    }
}

template <int THREADS> __device__ __forceinline__ void clear_column(char *column, int lines) {
    for (int i = threadIdx.x; i < lines; i += THREADS) *(uint4 *)(column + i * 16) = make_uint4(0, 0, 0, 0);
}

// What a thread has of its warpgroup's results: lines lane/4 and lane/4 + 8 of its warp's 16, two numbers in eight; four
// neighbours share a line
template <int D> struct results {
    float o[32], tail[4]; // of D 0 .. 63 and 64 .. 71
    float top[2], sum[2];
};
template <int D> __device__ __forceinline__ void clear(results<D> &r) {
#pragma unroll
    for (int i = 0; i < 32; i++) r.o[i] = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) r.tail[i] = 0;
    r.top[0] = r.top[1] = -INFINITY, r.sum[0] = r.sum[1] = 0;
}

/*
 * One step: scores of the 64 queries from line q0 of an operand of QL lines with the BC keys from line k0 of one of KL lines (in
 * the row: from key `first`), then the softmax so far. p: what the values are to be weighted with.
 */
template <int D, int QL, int KL>
__device__ __forceinline__ void weigh(unsigned (&p)[BC / 16][4], results<D> &r, const char *q, int q0, const char *k, int k0,
                                      const char *zeros, int first, int T, float scale2) {
    const int lane = threadIdx.x & 31;
    const unsigned aq = shared_address(q), ak = shared_address(k), tq = aq + QL * 128 + q0 * 16, tk = ak + KL * 128 + k0 * 16;
    float s[BC / 2];
    products_begin();
#pragma unroll
    for (int i = 0; i < 4; i++) multiply(s, swizzled(aq + q0 * 128 + i * 32), swizzled(ak + k0 * 128 + i * 32), i > 0);
    if (D > 64) multiply(s, descriptor(tq, shared_address(zeros) - tq, 128), descriptor(tk, shared_address(zeros) - tk, 128), 1);
    products_end();
    if (first + BC > T)
#pragma unroll
        for (int i = 0; i < BC / 2; i++)
            if (first + i / 4 * 8 + (lane & 3) * 2 + (i & 1) >= T) s[i] = -INFINITY;
#pragma unroll
    for (int g = 0; g < 2; g++) {
        float best = r.top[g];
#pragma unroll
        for (int n = 0; n < BC / 8; n++) best = fmaxf(best, fmaxf(s[4 * n + 2 * g], s[4 * n + 2 * g + 1]));
        best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, 1));
        best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, 2));
        const float shrink = power_of_2((r.top[g] - best) * scale2), offset = best * scale2;
        r.top[g] = best;
        float part = 0;
#pragma unroll
        for (int n = 0; n < BC / 8; n++) {
            float x = power_of_2(fmaf(s[4 * n + 2 * g], scale2, -offset)),
                  y = power_of_2(fmaf(s[4 * n + 2 * g + 1], scale2, -offset));
            part += x + y;
            p[n / 2][(n & 1) * 2 + g] = pack(x, y);
        }
        r.sum[g] = fmaf(r.sum[g], shrink, part);
#pragma unroll
        for (int n = 0; n < 8; n++) r.o[4 * n + 2 * g] *= shrink, r.o[4 * n + 2 * g + 1] *= shrink;
        r.tail[2 * g] *= shrink, r.tail[2 * g + 1] *= shrink;
    }
}

// Adds p times the BC values from line v0 of an operand of VL lines
template <int D, int VL>
__device__ __forceinline__ void add_values(results<D> &r, const unsigned (&p)[BC / 16][4], const char *v, int v0) {
    const unsigned av = shared_address(v);
    products_begin();
#pragma unroll
    for (int i = 0; i < BC / 16; i++) {
        multiply(r.o, p[i], swizzled(av + (v0 + i * 16) * 128));
        if (D > 64) multiply(r.tail, p[i], descriptor(av + VL * 128 + (v0 + i * 16) * 16, 128, 128));
    }
    products_end();
}

/*
 * Divides by the sums and writes the warp's 16 lines through the lines `at` + 0 .. 15 of an operand of LINES lines that nobody
 * else uses, so that memory is written a line's 2 D bytes in a row. o: the first of the 16 lines, C apart; t: its place in the
 * row.
 */
template <int D, int LINES>
__device__ __forceinline__ void write(bf16 *o, size_t C, int t, int T, const results<D> &r, char *operand, int at, float scale,
                                      float *lse) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int g = 0; g < 2; g++) {
        float total = r.sum[g];
        total += __shfl_xor_sync(0xffffffffu, total, 1);
        total += __shfl_xor_sync(0xffffffffu, total, 2);
        const float inverse = 1 / total;
        const int line = g * 8 + lane / 4;
        if (lse && (lane & 3) == 0 && t + line < T) lse[t + line] = r.top[g] * scale + logf(total);
#pragma unroll
        for (int n = 0; n < 8; n++)
            *(unsigned *)(operand + place<LINES>(at + line, n) + (lane & 3) * 4) =
                pack(r.o[4 * n + 2 * g] * inverse, r.o[4 * n + 2 * g + 1] * inverse);
        if (D > 64)
            *(unsigned *)(operand + place<LINES>(at + line, 8) + (lane & 3) * 4) =
                pack(r.tail[2 * g] * inverse, r.tail[2 * g + 1] * inverse);
    }
    __syncwarp();
#pragma unroll
    for (int i = lane; i < 16 * (D / 8); i += 32) {
        const int line = i / (D / 8), piece = i % (D / 8);
        if (t + line < T)
            *(uint4 *)(o + (unsigned)(line * (int)C + piece * 8)) = *(const uint4 *)(operand + place<LINES>(at + line, piece));
    }
    __syncwarp();
}

#endif

/* ---- any number of keys: a block takes GROUPS x 64 queries of one head of one row ---- */

template <int D, int GROUPS> struct walk_shape {
    static constexpr int BR = GROUPS * TILE, Q = OPERAND(D, BR), KV = OPERAND(D, BC), BYTES = Q + 4 * KV + BR * 16;
};

template <int D, int GROUPS>
__global__ void __launch_bounds__(GROUPS * 128, 4 / GROUPS)
    attention_walk(bf16 *o, const bf16 *qkv, int T, int H, float scale, float *lse) {
#ifdef HOPPER
    typedef walk_shape<D, GROUPS> S;
    constexpr int THREADS = GROUPS * 128, BR = S::BR;
    extern __shared__ __align__(1024) char shared[];
    char *sq = shared, *sk = sq + S::Q, *sv = sk + 2 * S::KV, *zeros = sv + 2 * S::KV;
    const int thread = threadIdx.x, q0 = blockIdx.x * BR, h = blockIdx.y, ld = 3 * H * D, blocks = (T + BC - 1) / BC;
    const size_t C = (size_t)H * D, row = blockIdx.z;
    const bf16 *q = qkv + row * T * ld + (size_t)h * D, *k = q + C, *v = k + C;
    const float scale2 = scale * 1.4426950408889634f; // exp(x) = exp2(x log2 e)

    wait_for_previous();
    copy_lines<D, BR, BR, THREADS>(sq, 0, q + (size_t)q0 * ld, ld, q0, T, thread);
    for (int j = 0; j < 2; j++) {
        if (j < blocks) copy_lines<D, BC, BC, THREADS>(sk + j * S::KV, 0, k + (size_t)(j * BC) * ld, ld, j * BC, T, thread);
        copy_commit();
        if (j < blocks) copy_lines<D, BC, BC, THREADS>(sv + j * S::KV, 0, v + (size_t)(j * BC) * ld, ld, j * BC, T, thread);
        copy_commit();
    }
    clear_column<THREADS>(zeros, BR);
    unsigned p[BC / 16][4];
    results<D> r;
    clear(r);
    for (int j = 0; j < blocks; j++) {
        char *kj = sk + (j & 1) * S::KV, *vj = sv + (j & 1) * S::KV;
        const bool more = j + 2 < blocks;
        const size_t next = (size_t)((j + 2) * BC) * ld;
        copy_wait<3>(); // K of this step (and Q) are here
        visible_to_products();
        __syncthreads();
        weigh<D, BR, BC>(p, r, sq, thread / 128 * TILE, kj, 0, zeros, j * BC, T, scale2);
        copy_wait<2>(); // V of this step
        visible_to_products();
        __syncthreads();
        if (more) copy_lines<D, BC, BC, THREADS>(kj, 0, k + next, ld, (j + 2) * BC, T, thread);
        copy_commit();
        add_values<D, BC>(r, p, vj, 0);
        if (more) {
            __syncthreads(); // both warpgroups have done with V
            copy_lines<D, BC, BC, THREADS>(vj, 0, v + next, ld, (j + 2) * BC, T, thread);
        }
        copy_commit();
    }
    const int mine = thread / 32 * 16,
              t = q0 + mine; // the warp's queries; all products that read them ended before the last barrier
    write<D, BR>(o + (row * T + t) * C + (size_t)h * D, C, t, T, r, sq, mine, scale, lse ? lse + (row * H + h) * T : NULL);
#endif
}

/*
 * ---- 65 to 256 keys and many heads: the size that serves ----
 *
 * There the copies are the cost (113 MB of qkv at 64 rows of XL, 50 us) and a head's products take as long, so they must overlap:
 * one block a multiprocessor stays and takes head after head, four warpgroups its 256 queries, while the next head's keys and
 * values are copied into the other pair of buffers, and each warpgroup's next queries as soon as its last scores are made. One
 * barrier a head.
 */
template <int D> struct whole_shape {
    static constexpr int LINES = 4 * TILE, THREADS = 512, ONE = OPERAND(D, LINES),
                         BYTES = 6 * ONE + LINES * 16; // Q, 2 K, 2 V, results, zeros
};

template <int D>
__global__ void __launch_bounds__(whole_shape<D>::THREADS, 1)
    attention_whole(bf16 *o, const bf16 *qkv, int heads, int T, int H, float scale, float *lse) {
#ifdef HOPPER
    typedef whole_shape<D> S;
    constexpr int LINES = S::LINES, THREADS = S::THREADS;
    extern __shared__ __align__(1024) char shared[];
    char *sq = shared, *sk = sq + S::ONE, *sv = sk + 2 * S::ONE, *so = sv + 2 * S::ONE, *zeros = so + S::ONE;
    const int group = threadIdx.x / 128, q0 = group * TILE, mine = threadIdx.x / 32 * 16, steps = (T + BC - 1) / BC,
              ld = 3 * H * D;
    const size_t C = (size_t)H * D;
    const float scale2 = scale * 1.4426950408889634f;
    auto copy_queries = [&](int head) { // this warpgroup's
        const bf16 *q = qkv + (size_t)(head / H) * T * ld + (size_t)(head % H) * D;
        copy_lines<D, TILE, LINES, 128>(sq, q0, q + (size_t)q0 * ld, ld, q0, T, threadIdx.x & 127);
    };
    auto copy_keys = [&](int head, int buffer) {
        const bf16 *k = qkv + (size_t)(head / H) * T * ld + (size_t)(head % H) * D + C;
        copy_lines<D, LINES, LINES, THREADS>(sk + buffer * S::ONE, 0, k, ld, 0, T, threadIdx.x);
        copy_lines<D, LINES, LINES, THREADS>(sv + buffer * S::ONE, 0, k + C, ld, 0, T, threadIdx.x);
    };
    wait_for_previous();
    copy_queries(blockIdx.x);
    copy_keys(blockIdx.x, 0);
    copy_commit();
    clear_column<THREADS>(zeros, LINES);
    for (int head = blockIdx.x, buffer = 0; head < heads; head += gridDim.x, buffer ^= 1) {
        const int next = head + gridDim.x;
        const char *k = sk + buffer * S::ONE, *v = sv + buffer * S::ONE;
        unsigned p[BC / 16][4];
        results<D> r;
        clear(r);
        copy_wait<0>();
        visible_to_products();
        __syncthreads(); // this head is here, and everyone has done with the last one
        if (next < heads) copy_keys(next, buffer ^ 1);
        for (int j = 0; j < steps; j++) {
            weigh<D, LINES, LINES>(p, r, sq, q0, k, j * BC, zeros, j * BC, T, scale2);
            if (j == steps - 1) {
                asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory"); // this warpgroup has done with its queries
                if (next < heads) copy_queries(next);
                copy_commit();
            }
            add_values<D, LINES>(r, p, v, j * BC);
        }
        const size_t row = head / H, h = head % H;
        write<D, LINES>(o + (row * T + mine) * C + h * D, C, mine, T, r, so, mine, scale, lse ? lse + (size_t)head * T : NULL);
    }
#endif
}

template <int D, int GROUPS> static int launch_walk(struct kern *k, bf16 *o, const bf16 *qkv, int R, int T, int H, float *lse) {
    typedef walk_shape<D, GROUPS> S;
    int rc = cuda_check(k, cudaFuncSetAttribute(attention_walk<D, GROUPS>, cudaFuncAttributeMaxDynamicSharedMemorySize, S::BYTES),
                        "attention");
    if (rc < 0) return rc;
    dim3 grid((unsigned)((T + S::BR - 1) / S::BR), (unsigned)H, (unsigned)R);
    launch_early(k, attention_walk<D, GROUPS>, grid, GROUPS * 128, S::BYTES, o, qkv, T, H, 1 / sqrtf((float)D), lse);
    return cuda_launched(k, "attention");
}

template <int D> static int launch_whole(struct kern *k, bf16 *o, const bf16 *qkv, int R, int T, int H, float *lse) {
    typedef whole_shape<D> S;
    int rc = cuda_check(k, cudaFuncSetAttribute(attention_whole<D>, cudaFuncAttributeMaxDynamicSharedMemorySize, S::BYTES),
                        "attention");
    if (rc < 0) return rc;
    unsigned blocks = (unsigned)(R * H < cuda_of(k)->sms ? R * H : cuda_of(k)->sms);
    launch_early(k, attention_whole<D>, dim3(blocks), S::THREADS, S::BYTES, o, qkv, R * H, T, H, 1 / sqrtf((float)D), lse);
    return cuda_launched(k, "attention");
}

template <int D> static int run(struct kern *k, bf16 *o, const bf16 *qkv, int R, int T, int H, float *lse) {
    int sms = cuda_of(k)->sms;
    if (T > BC && T <= 4 * TILE && (long)R * H >= sms / 2) return launch_whole<D>(k, o, qkv, R, T, H, lse);
    if ((long)R * H * ((T + 2 * TILE - 1) / (2 * TILE)) >= sms) return launch_walk<D, 2>(k, o, qkv, R, T, H, lse);
    return launch_walk<D, 1>(k, o, qkv, R, T, H, lse);
}

bool cuda_attention_sm90(struct kern *k, void *o, const void *qkv, int R, int T, int H, int D, float *lse, int *rc) {
    if (!cuda_of(k)->hopper || (D != 64 && D != 72)) return false;
    *rc =
        D == 64 ? run<64>(k, (bf16 *)o, (const bf16 *)qkv, R, T, H, lse) : run<72>(k, (bf16 *)o, (const bf16 *)qkv, R, T, H, lse);
    return true;
}
