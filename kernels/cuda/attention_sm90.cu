// SPDX-License-Identifier: MIT
/*
 * attention_sm90: attention in bfloat16 and float16 by Hopper's wgmma, for the head dimensions that serve (64 and 72).
 * attention.cu says what is computed.
 *
 * mma.sync keeps at best 62 % of Hopper's tensor rate, and its ldmatrix traffic alone costs a quarter of the time; wgmma reads
 * keys and values from shared memory by itself. A warpgroup (4 warps) takes 64 queries and walks the keys 64 at a time: S = Q K^T
 * in 32 registers a thread, softmax so far, P packed to 16 bits as the register operand of O += P V. Four warpgroups share a
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
#include "kernels/cuda/linear.cuh"
#include "kernels/cuda/wgmma.cuh"

#include <cuda.h>

#define BC 64 // keys a step

#ifdef HOPPER

__device__ __forceinline__ unsigned at(unsigned bytes) { return bytes >> 4; } // in a descriptor's units

/* ---- barriers that count bytes, and the copy engine ---- */

__device__ __forceinline__ void barrier_init(unsigned bar, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_expect(unsigned bar, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_arrive(unsigned bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
__device__ __forceinline__ void barrier_wait(unsigned bar, unsigned parity) {
    unsigned done;
    do
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                     : "=r"(done)
                     : "r"(bar), "r"(parity)
                     : "memory");
    while (!done);
}
__device__ __forceinline__ void fetch(unsigned dst, const CUtensorMap *map, int x, int y, int z, unsigned bar) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(
            dst),
        "l"(map), "r"(x), "r"(y), "r"(z), "r"(bar)
        : "memory");
}
__device__ __forceinline__ void put(const CUtensorMap *map, int x, int y, int z, unsigned src) {
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%1, %2, %3}], [%4];" ::"l"(map), "r"(x), "r"(y),
                 "r"(z), "r"(src)
                 : "memory");
}
__device__ __forceinline__ void put_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
__device__ __forceinline__ void put_wait() {
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
} // sources may be written again

#endif

// Views of qkv [R, T, 3C] in boxes of TILE lines and of o [R, T, C] in boxes of 16; 64 columns with swizzle, and the 8 behind
// them
struct views {
    CUtensorMap in, in_tail, out, out_tail;
    __nv_fp8_e4m3 *o8; // o in e4m3 instead of out, or NULL
    const float *up;   // what its numbers are multiplied with
};

#ifdef HOPPER

// TILE lines of one head (columns from x on of row z's lines from y on; beyond the row: zeros) to the lines from `at` on of an
// operand of LINES lines
template <int D, int LINES>
__device__ __forceinline__ void fetch_lines(unsigned operand, int at, const views &v, int x, int y, int z, unsigned bar) {
    fetch(operand + at * 128, &v.in, x, y, z, bar);
    if (D > 64) fetch(operand + LINES * 128 + at * 16, &v.in_tail, x + 64, y, z, bar);
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

// Begins the scores of the 64 queries from line q0 of an operand of QL lines with the BC keys from line k0 of one of KL lines
template <typename E, int D, int QL, int KL>
__device__ __forceinline__ void begin_scores(float (&s)[BC / 2], unsigned q, int q0, unsigned k, int k0, unsigned zeros) {
    const unsigned tq = q + QL * 128 + q0 * 16, tk = k + KL * 128 + k0 * 16;
    const uint64_t dq = swizzled(at(q + q0 * 128)), dk = swizzled(at(k + k0 * 128));
    products_begin();
#pragma unroll
    for (int i = 0; i < 4; i++) multiply<E>(s, dq + at(i * 32), dk + at(i * 32), i > 0);
    if (D > 64) multiply<E>(s, column(at(tq), at(zeros - tq)), column(at(tk), at(zeros - tk)), 1);
    products_commit();
}

// Begins adding p times the BC values from line v0 of an operand of VL lines
template <typename E, int D, int VL>
__device__ __forceinline__ void begin_values(results<D> &r, const unsigned (&p)[BC / 16][4], unsigned v, int v0) {
    const uint64_t dv = swizzled(at(v + v0 * 128)), dt = column(at(v + VL * 128 + v0 * 16), at(128));
    products_begin();
#pragma unroll
    for (int i = 0; i < BC / 16; i++) {
        multiply<E>(r.o, p[i], dv + at(i * 16 * 128));
        if (D > 64) multiply<E>(r.tail, p[i], dt + at(i * 16 * 16));
    }
    products_commit();
}

// Scores of the keys from `first` on become weights; shrink: what the results so far must be multiplied with
template <int D>
__device__ __forceinline__ void weigh(float (&s)[BC / 2], results<D> &r, float (&shrink)[2], int first, int T, float scale2) {
    const int lane = threadIdx.x & 31;
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
        shrink[g] = power_of_2((r.top[g] - best) * scale2);
        const float offset = best * scale2;
        r.top[g] = best;
        float part = 0;
#pragma unroll
        for (int n = 0; n < BC / 8; n++) {
            float &x = s[4 * n + 2 * g], &y = s[4 * n + 2 * g + 1];
            x = power_of_2(fmaf(x, scale2, -offset)), y = power_of_2(fmaf(y, scale2, -offset));
            part += x + y;
        }
        r.sum[g] = fmaf(r.sum[g], shrink[g], part);
    }
}
template <typename E, int D>
__device__ __forceinline__ void shrink_and_pack(unsigned (&p)[BC / 16][4], results<D> &r, const float (&s)[BC / 2],
                                                const float (&shrink)[2]) {
#pragma unroll
    for (int g = 0; g < 2; g++) {
#pragma unroll
        for (int n = 0; n < BC / 8; n++) p[n / 2][(n & 1) * 2 + g] = pack<E>(s[4 * n + 2 * g], s[4 * n + 2 * g + 1]);
#pragma unroll
        for (int n = 0; n < 8; n++) r.o[4 * n + 2 * g] *= shrink[g], r.o[4 * n + 2 * g + 1] *= shrink[g];
        r.tail[2 * g] *= shrink[g], r.tail[2 * g + 1] *= shrink[g];
    }
}

__device__ __forceinline__ unsigned pack_e4m3(float x, float y, float up) { // two bytes
    return __nv_cvt_float2_to_fp8x2(make_float2(x * up, y * up), __NV_SATFINITE, __NV_E4M3);
}

// Among a quad's four lanes: word[i] of lane j becomes word[j] of lane i
__device__ __forceinline__ void transpose(unsigned (&word)[4]) {
#pragma unroll
    for (int by = 1; by < 4; by *= 2) {
        const bool upper = threadIdx.x & by;
#pragma unroll
        for (int pair = 0; pair < 2; pair++) {
            unsigned &low = word[by == 1 ? 2 * pair : pair], &high = word[by == 1 ? 2 * pair + 1 : pair + 2];
            const unsigned other = __shfl_xor_sync(0xffffffffu, upper ? low : high, by);
            if (upper) low = other;
            else high = other;
        }
    }
}

// As write, in e4m3 and straight to memory. C: of a line of o
template <int D> __device__ __forceinline__ void write_e4m3(const views &v, int C, int x, int t, int z, int T, const results<D> &r) {
    const int lane = threadIdx.x & 31, quarter = lane & 3;
#pragma unroll
    for (int g = 0; g < 2; g++) {
        const float up = *v.up / quad_sum(r.sum[g]);
        const int line = t + g * 8 + lane / 4;
        char *to = (char *)v.o8 + ((size_t)z * T + line) * C + x;
        unsigned word[4]; // of eight numbers 2 i and 2 i + 1 this lane's two each; then of 2 quarter and 2 quarter + 1 lane i's
#pragma unroll
        for (int i = 0; i < 4; i++)
            word[i] = pack_e4m3(r.o[8 * i + 2 * g], r.o[8 * i + 2 * g + 1], up) | pack_e4m3(r.o[8 * i + 4 + 2 * g], r.o[8 * i + 5 + 2 * g], up) << 16;
        transpose(word);
        if (line >= T) continue;
        *(uint2 *)(to + 16 * quarter) = make_uint2(__byte_perm(word[0], word[1], 0x5410), __byte_perm(word[2], word[3], 0x5410));
        *(uint2 *)(to + 16 * quarter + 8) = make_uint2(__byte_perm(word[0], word[1], 0x7632), __byte_perm(word[2], word[3], 0x7632));
        if (D > 64) *(uint16_t *)(to + 64 + 2 * quarter) = (uint16_t)pack_e4m3(r.tail[2 * g], r.tail[2 * g + 1], up);
    }
}

/*
 * Divides by the sums and sends the warp's 16 lines, from line t of row z on, through the lines `at` + 0 .. 15 of an operand of
 * LINES lines that nobody else uses. x: the head's first column. C: of a line of o.
 */
template <typename E, int D, int LINES>
__device__ __forceinline__ void write(const views &v, int C, int x, int t, int z, int T, const results<D> &r, char *operand, int at,
                                      float scale, float *lse) {
    const int lane = threadIdx.x & 31;
    if (v.o8) return write_e4m3<D>(v, C, x, t, z, T, r);
    if (lane == 0) put_wait();
    __syncwarp();
#pragma unroll
    for (int g = 0; g < 2; g++) {
        const float total = quad_sum(r.sum[g]), inverse = 1 / total;
        const int line = at + g * 8 + lane / 4;
        if (lse && (lane & 3) == 0 && t + g * 8 + lane / 4 < T) lse[t + g * 8 + lane / 4] = r.top[g] * scale + logf(total);
#pragma unroll
        for (int n = 0; n < 8; n++)
            *(unsigned *)(operand + line * 128 + (n ^ (line & 7)) * 16 + (lane & 3) * 4) =
                pack<E>(r.o[4 * n + 2 * g] * inverse, r.o[4 * n + 2 * g + 1] * inverse);
        if (D > 64)
            *(unsigned *)(operand + LINES * 128 + line * 16 + (lane & 3) * 4) =
                pack<E>(r.tail[2 * g] * inverse, r.tail[2 * g + 1] * inverse);
    }
    visible_to_products();
    __syncwarp();
    if (lane == 0 && t < T) {
        put(&v.out, x, t, z, shared_address(operand) + at * 128);
        if (D > 64) put(&v.out_tail, x + 64, t, z, shared_address(operand) + LINES * 128 + at * 16);
        put_commit();
    }
}

#endif

/*
 * ---- any number of keys: a block takes GROUPS x 64 queries of one head of one row ----
 *
 * Keys and values come in a ring of SLOTS steps. The first thread refills the slot that was left two steps ago, so that it need
 * not wait for the other warpgroups.
 */
#define SLOTS 4

template <int D, int GROUPS> struct walk_shape {
    static constexpr int BR = GROUPS * TILE, Q = OPERAND(D, BR), KV = OPERAND(D, BC),
                         BYTES = Q + 2 * SLOTS * KV + BR * 16 + (1 + 3 * SLOTS) * 8;
};

template <typename E, int D, int GROUPS>
__global__ void __launch_bounds__(GROUPS * 128, 4 / GROUPS)
    attention_walk(const __grid_constant__ views v, int T, int H, float scale, float *lse) {
#ifdef HOPPER
    typedef walk_shape<D, GROUPS> S;
    constexpr int BR = S::BR;
    extern __shared__ __align__(1024) char shared[];
    char *zeros = shared + S::Q + 2 * SLOTS * S::KV;
    const unsigned sq = shared_address(shared), sk = sq + S::Q, sv = sk + SLOTS * S::KV, az = shared_address(zeros),
                   q_full = az + BR * 16, k_full = q_full + 8, v_full = k_full + SLOTS * 8, empty = v_full + SLOTS * 8;
    const int thread = threadIdx.x, q0 = blockIdx.x * BR, h = blockIdx.y, row = blockIdx.z, C = H * D, steps = (T + BC - 1) / BC;
    const float scale2 = scale * 1.4426950408889634f; // exp(x) = exp2(x log2 e)
    auto fetch_step = [&](int j) {
        const int slot = j % SLOTS;
        barrier_expect(k_full + slot * 8, S::KV);
        fetch_lines<D, BC>(sk + slot * S::KV, 0, v, C + h * D, j * BC, row, k_full + slot * 8);
        barrier_expect(v_full + slot * 8, S::KV);
        fetch_lines<D, BC>(sv + slot * S::KV, 0, v, 2 * C + h * D, j * BC, row, v_full + slot * 8);
    };
    if (thread == 0) {
        for (int i = 0; i < 1 + 2 * SLOTS; i++) barrier_init(q_full + i * 8, 1);
        for (int i = 0; i < SLOTS; i++) barrier_init(empty + i * 8, GROUPS * 4);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    clear_column<GROUPS * 128>(zeros, BR);
    visible_to_products();
    __syncthreads();
    wait_for_previous();
    if (thread == 0) {
        barrier_expect(q_full, S::Q);
        for (int i = 0; i < GROUPS; i++) fetch_lines<D, BR>(sq, i * TILE, v, h * D, q0 + i * TILE, row, q_full);
        for (int j = 0; j < 2 && j < steps; j++) fetch_step(j);
    }
    unsigned p[BC / 16][4];
    float s[BC / 2], shrink[2];
    results<D> r;
    clear(r);
    const int mine = thread / 128 * TILE;
    barrier_wait(q_full, 0);
    barrier_wait(k_full, 0);
    begin_scores<E, D, BR, BC>(s, sq, mine, sk, 0, az);
    products_wait<0>();
    for (int j = 0; j + 1 < steps; j++) {
        const int slot = j % SLOTS, next = (j + 1) % SLOTS;
        weigh(s, r, shrink, j * BC, T, scale2);
        products_wait<0>(); // the values of the step before are in; nobody here reads its slot any more
        shrink_and_pack<E>(p, r, s, shrink);
        if (j && (thread & 31) == 0) barrier_arrive(empty + (j - 1) % SLOTS * 8);
        if (thread == 0 && j + 2 < steps) {
            if (j >= 2) barrier_wait(empty + (j + 2) % SLOTS * 8, ((j - 2) / SLOTS) & 1);
            fetch_step(j + 2);
        }
        __syncwarp();
        barrier_wait(k_full + next * 8, ((j + 1) / SLOTS) & 1);
        barrier_wait(v_full + slot * 8, (j / SLOTS) & 1);
        begin_scores<E, D, BR, BC>(s, sq, mine, sk + next * S::KV, 0, az);
        begin_values<E, D, BC>(r, p, sv + slot * S::KV, 0);
        products_wait<1>(); // the scores of the next step
    }
    weigh(s, r, shrink, (steps - 1) * BC, T, scale2);
    products_wait<0>();
    shrink_and_pack<E>(p, r, s, shrink);
    barrier_wait(v_full + (steps - 1) % SLOTS * 8, ((steps - 1) / SLOTS) & 1);
    begin_values<E, D, BC>(r, p, sv + (steps - 1) % SLOTS * S::KV, 0);
    products_wait<0>();
    const int line = thread / 32 * 16; // the warp's queries, whose group alone read them and has done so
    asm volatile("bar.sync %0, 128;" ::"r"(thread / 128 + 1) : "memory");
    write<E, D, BR>(v, H * D, h * D, q0 + line, row, T, r, shared, line, scale, lse ? lse + ((size_t)row * H + h) * T : NULL);
    if ((thread & 31) == 0) put_wait();
#endif
}

/*
 * ---- 65 to 256 keys and many heads: the size that serves ----
 *
 * There the copies are the cost (113 MB of qkv at 64 rows of XL, 50 us) and a head's products take as long, so they must overlap:
 * one block a multiprocessor stays and takes head after head, four warpgroups its 256 queries. Meanwhile the next head's keys and
 * values come into the other pair of buffers, and each warpgroup's next queries as soon as its last scores are made. Warps free
 * buffers one by one, so that nobody waits for all; the first thread asks for keys a little late, when the others have long done
 * with the buffer.
 */
template <int D> struct whole_shape {
    static constexpr int LINES = 4 * TILE, THREADS = 512, ONE = OPERAND(D, LINES),
                         BYTES = 6 * ONE + LINES * 16 + 14 * 8; // Q, 2 K, 2 V, results, zeros, barriers
};

template <typename E, int D>
__global__ void __launch_bounds__(whole_shape<D>::THREADS, 1)
    attention_whole(const __grid_constant__ views v, int heads, int T, int H, float scale, float *lse) {
#ifdef HOPPER
    typedef whole_shape<D> S;
    constexpr int LINES = S::LINES;
    extern __shared__ __align__(1024) char shared[];
    char *so = shared + 5 * S::ONE, *zeros = so + S::ONE;
    const unsigned sq = shared_address(shared), sk = sq + S::ONE, sv = sk + 2 * S::ONE, az = shared_address(zeros),
                   q_full = az + LINES * 16, q_empty = q_full + 4 * 8, kv_full = q_empty + 4 * 8,
                   empty = kv_full + 4 * 8; // K, K, V, V
    const int group = threadIdx.x / 128, q0 = group * TILE, mine = threadIdx.x / 32 * 16, steps = (T + BC - 1) / BC, C = H * D;
    const float scale2 = scale * 1.4426950408889634f;
    const bool first_lane = (threadIdx.x & 31) == 0, leader = (threadIdx.x & 127) == 0;
    auto fetch_queries = [&](int head) { // of this warpgroup
        barrier_expect(q_full + group * 8, TILE * 2 * D);
        fetch_lines<D, LINES>(sq, q0, v, head % H * D, q0, head / H, q_full + group * 8);
    };
    auto fetch_all = [&](int head, int which, int b) { // keys (1) or values (2)
        const unsigned bar = kv_full + ((which - 1) * 2 + b) * 8, operand = (which == 1 ? sk : sv) + b * S::ONE;
        barrier_expect(bar, steps * TILE * 2 * D);
        for (int j = 0; j < steps; j++)
            fetch_lines<D, LINES>(operand, j * TILE, v, which * C + head % H * D, j * TILE, head / H, bar);
    };
    if (threadIdx.x == 0) {
        for (int i = 0; i < 4; i++)
            barrier_init(q_full + i * 8, 1), barrier_init(q_empty + i * 8, 4), barrier_init(kv_full + i * 8, 1);
        for (int i = 0; i < 2; i++) barrier_init(empty + i * 8, 16);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    clear_column<S::THREADS>(zeros, LINES);
    visible_to_products();
    __syncthreads();
    wait_for_previous();
    if (threadIdx.x == 0) fetch_all(blockIdx.x, 1, 0);
    if (leader) fetch_queries(blockIdx.x);
    if (threadIdx.x == 0) fetch_all(blockIdx.x, 2, 0);
    for (int head = blockIdx.x, n = 0; head < heads; head += gridDim.x, n++) {
        const int b = n & 1, next = head + gridDim.x;
        const unsigned k = sk + b * S::ONE, val = sv + b * S::ONE, parity = (n >> 1) & 1;
        unsigned p[BC / 16][4];
        float s[BC / 2], shrink[2];
        results<D> r;
        clear(r);
        __syncwarp();
        barrier_wait(kv_full + b * 8, parity);
        barrier_wait(q_full + group * 8, n & 1);
        begin_scores<E, D, LINES, LINES>(s, sq, q0, k, 0, az);
        products_wait<0>();
        for (int j = 0; j + 1 < steps; j++) {
            weigh(s, r, shrink, j * BC, T, scale2);
            products_wait<0>();
            shrink_and_pack<E>(p, r, s, shrink);
            if (j == 0 && threadIdx.x == 0 && next < heads) {
                if (n) barrier_wait(empty + (b ^ 1) * 8, ((n - 1) >> 1) & 1);
                fetch_all(next, 1, b ^ 1);
                fetch_all(next, 2, b ^ 1);
            }
            __syncwarp();
            if (j == 0) barrier_wait(kv_full + (2 + b) * 8, parity);
            begin_scores<E, D, LINES, LINES>(s, sq, q0, k, (j + 1) * BC, az);
            begin_values<E, D, LINES>(r, p, val, j * BC);
            products_wait<1>();
        }
        if (first_lane) barrier_arrive(q_empty + group * 8); // the last scores are made
        if (leader && next < heads) {
            barrier_wait(q_empty + group * 8, n & 1);
            fetch_queries(next);
        }
        __syncwarp();
        weigh(s, r, shrink, (steps - 1) * BC, T, scale2);
        products_wait<0>();
        shrink_and_pack<E>(p, r, s, shrink);
        begin_values<E, D, LINES>(r, p, val, (steps - 1) * BC);
        products_wait<0>();
        if (first_lane) barrier_arrive(empty + b * 8);
        write<E, D, LINES>(v, C, head % H * D, mine, head / H, T, r, so, mine, scale, lse ? lse + (size_t)head * T : NULL);
    }
    if (first_lane) put_wait();
#endif
}

/* ---- launching ---- */

typedef CUresult encode_fn(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *, const cuuint64_t *,
                           const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                           CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

static encode_fn *encoder(void) {
    static encode_fn *fn; // the driver's; the same for all threads
    void *p = NULL;
    cudaDriverEntryPointQueryResult found;
    if (!fn && cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &p, 12000, cudaEnableDefault, &found) == cudaSuccess)
        fn = (encode_fn *)p;
    return fn;
}

// Boxes of `lines` x `columns` of p [R, T, ld]
static bool encode(CUtensorMap *map, const void *p, int R, int T, int ld, int lines, int columns) {
    cuuint64_t dims[] = {(cuuint64_t)ld, (cuuint64_t)T, (cuuint64_t)R},
               strides[] = {(cuuint64_t)ld * 2, (cuuint64_t)ld * 2 * (cuuint64_t)T};
    cuuint32_t box[] = {(cuuint32_t)columns, (cuuint32_t)lines, 1}, ones[] = {1, 1, 1};
    return encoder() &&
           encoder()(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, (void *)p, dims, strides, box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE,
                     columns == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                     CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// reader: of o in e4m3, or NULL
static int make_views(struct kern *k, views *v, void *o, const void *qkv, int R, int T, int C, const struct cuda_linear *reader) {
    v->o8 = reader ? (__nv_fp8_e4m3 *)o : NULL, v->up = reader ? &reader->fixed->inverse : NULL;
    bool ok = encode(&v->in, qkv, R, T, 3 * C, TILE, 64) && encode(&v->in_tail, qkv, R, T, 3 * C, TILE, 8) &&
              encode(&v->out, o, R, T, C, 16, 64) && encode(&v->out_tail, o, R, T, C, 16, 8);
    return ok ? KERN_OK : cuda_fail(k, KERN_EDEVICE, "attention: the driver describes no array of %d x %d x %d", R, T, 3 * C);
}

template <typename E, int D, int GROUPS> static int launch_walk(struct kern *k, const views &v, int R, int T, int H, float *lse) {
    typedef walk_shape<D, GROUPS> S;
    int rc =
        cuda_check(k, cudaFuncSetAttribute(attention_walk<E, D, GROUPS>, cudaFuncAttributeMaxDynamicSharedMemorySize, S::BYTES),
                   "attention");
    if (rc < 0) return rc;
    dim3 grid((unsigned)((T + S::BR - 1) / S::BR), (unsigned)H, (unsigned)R);
    launch_early(k, attention_walk<E, D, GROUPS>, grid, GROUPS * 128, S::BYTES, v, T, H, 1 / sqrtf((float)D), lse);
    return cuda_launched(k, "attention");
}

template <typename E, int D> static int launch_whole(struct kern *k, const views &v, int R, int T, int H, float *lse) {
    typedef whole_shape<D> S;
    int rc = cuda_check(k, cudaFuncSetAttribute(attention_whole<E, D>, cudaFuncAttributeMaxDynamicSharedMemorySize, S::BYTES),
                        "attention");
    if (rc < 0) return rc;
    unsigned blocks = (unsigned)(R * H < cuda_of(k)->sms ? R * H : cuda_of(k)->sms);
    launch_early(k, attention_whole<E, D>, dim3(blocks), S::THREADS, S::BYTES, v, R * H, T, H, 1 / sqrtf((float)D), lse);
    return cuda_launched(k, "attention");
}

template <typename E, int D>
static int run(struct kern *k, void *o, const void *qkv, int R, int T, int H, float *lse, const struct cuda_linear *reader = NULL) {
    int sms = cuda_of(k)->sms;
    views v;
    int rc = make_views(k, &v, o, qkv, R, T, H * D, reader);
    if (rc < 0) return rc;
    if (T > BC && T <= 4 * TILE && (long)R * H >= sms / 2) return launch_whole<E, D>(k, v, R, T, H, lse);
    if ((long)R * H * ((T + 2 * TILE - 1) / (2 * TILE)) >= sms) return launch_walk<E, D, 2>(k, v, R, T, H, lse);
    return launch_walk<E, D, 1>(k, v, R, T, H, lse);
}

bool cuda_attention_sm90(struct kern *k, void *o, const void *qkv, int R, int T, int H, int D, float *lse, int *rc) {
    if (!cuda_of(k)->hopper || (D != 64 && D != 72)) return false;
    if (k->act == KERN_F16) *rc = D == 64 ? run<__half, 64>(k, o, qkv, R, T, H, lse) : run<__half, 72>(k, o, qkv, R, T, H, lse);
    else *rc = D == 64 ? run<__nv_bfloat16, 64>(k, o, qkv, R, T, H, lse) : run<__nv_bfloat16, 72>(k, o, qkv, R, T, H, lse);
    return true;
}

int cuda_attention_fp8(struct kern *k, void *o, const void *qkv, int R, int T, int H, int D, const struct kern_linear *reader) {
    const struct cuda_linear *l = (const struct cuda_linear *)reader;
    if (D != 64 && D != 72) return cuda_fail(k, KERN_EUNSUPPORTED, "attention into fp8 with heads of %d", D);
    if (R == 0) return KERN_OK;
    int rc = cuda_of(k)->host->check_attention(k, T, H, D);
    if (rc == KERN_OK && (R > 65535 || H > 65535)) rc = cuda_fail(k, KERN_EUNSUPPORTED, "attention of %d rows and %d heads", R, H);
    if (rc < 0) return rc;
    return D == 64 ? run<__nv_bfloat16, 64>(k, o, qkv, R, T, H, NULL, l) : run<__nv_bfloat16, 72>(k, o, qkv, R, T, H, NULL, l);
}
