// SPDX-License-Identifier: MIT
/*
 * norm_back: backward of gated residual, LayerNorm and modulation in one pass over memory: 18 bytes an element in bfloat16 (dx
 * read and written in float32; dy, xhat, h read, dh and y written), 340 MB at 64 images of XL/2.
 *
 * A thread owns VEC neighbouring channels and walks a block's tokens, so the sums over tokens stay in its registers; four tokens
 * at a time, whose two means over channels share one round of shuffles and one barrier. What it reads of the next four is on its
 * way to shared memory meanwhile, to places that no other thread reads: no barrier for them, and no registers that hold them
 * until the means are known. A block writes its sums; a second kernel adds a row's blocks (or, where the vectors are shared,
 * those of all rows) in index order.
 */
#include "kernels/cuda/train.cuh"

typedef __nv_bfloat16 bf16;

#define GROUP 4   // tokens at a time
#define TOKENS 32 // tokens a block

struct back_args {
    float *dx;
    void *dh, *y;
    const void *dy, *xhat, *h;
    const float *rstd, *gate, *shift, *scale;
    float *part; // [R, blocks, 4, C]: dshift, dscale, dgate, sums of dh
    int ld, T, C;
};

// VEC neighbours as memory has them: in bfloat16 half the registers
template <typename A, int VEC> struct alignas(sizeof(A) * VEC) pieces { A v[VEC]; };
template <int VEC> __device__ __forceinline__ void load(float (&v)[VEC], const void *p, size_t at) {
    *(pieces<float, VEC> *)v = *(const pieces<float, VEC> *)((const float *)p + at);
}
template <typename A, int VEC> __device__ __forceinline__ void save(void *p, size_t at, const float (&v)[VEC]) {
    pieces<A, VEC> x;
#pragma unroll
    for (int i = 0; i < VEC; i++) store_f32(&x.v[i], v[i]);
    *(pieces<A, VEC> *)((A *)p + at) = x;
}

// The block's sums of eight numbers a thread; every thread gets all. shared: [8][32], another one in the next call
__device__ __forceinline__ void block_sums(float (&v)[8], float *shared) {
    const int lane = threadIdx.x & 31, warps = blockDim.x / 32;
#pragma unroll
    for (int half = 4, bit = 16; half; half /= 2, bit /= 2) { // lane keeps number lane/4
        const bool upper = lane & bit;
#pragma unroll
        for (int i = 0; i < half; i++) {
            const float give = upper ? v[i] : v[i + half];
            v[i] = (upper ? v[i + half] : v[i]) + __shfl_xor_sync(0xffffffffu, give, bit);
        }
    }
    float sum = v[0];
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    if ((lane & 3) == 0) shared[lane / 4 * 32 + threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0;
    for (int w = lane & 3; w < warps; w += 4) sum += shared[lane / 4 * 32 + w];
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = __shfl_sync(0xffffffffu, sum, i * 4);
}

// Where in shared memory a thread keeps what it reads of a token: dx of all threads, then dy, xhat and h
template <typename A, int VEC> struct slot {
    typedef pieces<A, VEC> piece;
    static constexpr int BYTES = sizeof(pieces<float, VEC>) + 3 * sizeof(piece); // a thread
    pieces<float, VEC> *dx;
    piece *dy;
    __device__ __forceinline__ slot(char *slots, int i)
        : dx((pieces<float, VEC> *)(slots + (size_t)i * blockDim.x * BYTES) + threadIdx.x),
          dy((piece *)(dx - threadIdx.x + blockDim.x) + threadIdx.x) {}
    __device__ __forceinline__ piece *xhat() const { return dy + blockDim.x; }
    __device__ __forceinline__ piece *h() const { return dy + 2 * blockDim.x; }
};
// By cp.async where it copies that many bytes; zeros if not `inside`
template <typename P> __device__ __forceinline__ void bring(P *to, const void *from, bool inside) {
    constexpr int N = sizeof(P) < 16 ? sizeof(P) : 16;
    if constexpr (N < 4) *to = inside ? *(const P *)from : P{};
    else
#pragma unroll
        for (int i = 0; i < (int)sizeof(P); i += N)
            asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address((char *)to + i)),
                         "l"((const char *)from + i), "n"(N), "r"(inside ? N : 0));
}

template <typename A, int VEC, bool NORM, bool GATE>
__global__ void __launch_bounds__(VEC == 4 ? 288 : 512, VEC == 4 ? 2 : 1) norm_back(const back_args a, bool ahead) {
    typedef pieces<A, VEC> piece;
    extern __shared__ __align__(16) char slots[]; // [1 + ahead][GROUP][threads]
    __shared__ float shared[2][8 * 32];
    const int c = threadIdx.x * VEC, t0 = blockIdx.x * TOKENS, end = min(a.T, t0 + TOKENS);
    const size_t row = blockIdx.y, mod = row * (size_t)a.ld + c;
    const bool inside = c < a.C;
    const float per_channel = 1 / (float)a.C;
    float factor[VEC] = {}, shift[VEC] = {}, gate[VEC] = {}, shift_sum[VEC] = {}, scale_sum[VEC] = {}, gate_sum[VEC] = {},
          dx_sum[VEC] = {};
    if (NORM && inside) load(factor, a.scale, mod);
    if (NORM && inside && a.y) load(shift, a.shift, mod);
    if (GATE && inside) load(gate, a.gate, mod);
    for (int i = 0; i < VEC; i++) factor[i] += 1;
    auto first_slot = [&](int t) { return ahead ? (t / GROUP & 1) * GROUP : 0; };
    auto fetch = [&](int t) {
        size_t at = (row * (size_t)a.T + (size_t)t) * a.C + c;
#pragma unroll
        for (int i = 0; i < GROUP; i++, at += a.C) {
            const slot<A, VEC> s(slots, first_slot(t) + i);
            const bool there = inside && t + i < end;
            bring(s.dx, a.dx + at, there);
            if (NORM) bring(s.dy, (const A *)a.dy + at, there), bring(s.xhat(), (const A *)a.xhat + at, there);
            if (GATE) bring(s.h(), (const A *)a.h + at, there);
        }
        copy_commit();
    };
    if (ahead) fetch(t0);
#pragma unroll 1
    for (int t = t0; t < end; t += GROUP) {
        const size_t token = row * (size_t)a.T + (size_t)t, at = token * a.C + c;
        fetch(ahead ? t + GROUP : t);
        if (ahead) copy_wait<1>();
        else copy_wait<0>();
        float sums[8] = {};
        if (NORM) {
#pragma unroll
            for (int i = 0; i < GROUP; i++) {
                const slot<A, VEC> s(slots, first_slot(t) + i);
                const piece dy = *s.dy, xhat = *s.xhat();
                float y[VEC];
#pragma unroll
                for (int j = 0; j < VEC; j++) {
                    const float slope = load_f32(&dy.v[j]), x = load_f32(&xhat.v[j]), d = slope * factor[j];
                    shift_sum[j] += slope;
                    scale_sum[j] = fmaf(slope, x, scale_sum[j]);
                    sums[2 * i] += d;
                    sums[2 * i + 1] = fmaf(d, x, sums[2 * i + 1]);
                    y[j] = fmaf(x, factor[j], shift[j]);
                }
                if (a.y && inside && t + i < end) save<A>(a.y, at + (size_t)i * a.C, y);
            }
            block_sums(sums, shared[t / GROUP & 1]);
        }
#pragma unroll
        for (int i = 0; i < GROUP; i++) {
            if (!inside || t + i >= end) continue;
            const slot<A, VEC> s(slots, first_slot(t) + i);
            pieces<float, VEC> dx = *s.dx;
            if (NORM) {
                const piece dy = *s.dy, xhat = *s.xhat();
                const float rstd = a.rstd[token + i], mean = sums[2 * i] * per_channel, along = sums[2 * i + 1] * per_channel;
#pragma unroll
                for (int j = 0; j < VEC; j++)
                    dx.v[j] = fmaf(rstd, load_f32(&dy.v[j]) * factor[j] - mean - load_f32(&xhat.v[j]) * along, dx.v[j]);
                save<float>(a.dx, at + (size_t)i * a.C, dx.v);
            }
            if (GATE) {
                const piece h = *s.h();
                float dh[VEC];
#pragma unroll
                for (int j = 0; j < VEC; j++) {
                    dh[j] = gate[j] * dx.v[j];
                    gate_sum[j] = fmaf(dx.v[j], load_f32(&h.v[j]), gate_sum[j]);
                    dx_sum[j] += dx.v[j];
                }
                save<A>(a.dh, at + (size_t)i * a.C, dh);
            }
        }
    }
    float *part = a.part + ((row * gridDim.x + blockIdx.x) * 4) * a.C + c;
    if (NORM && inside) save<float>(part, 0, shift_sum), save<float>(part, (size_t)a.C, scale_sum);
    for (int j = 0; j < VEC; j++) dx_sum[j] *= gate[j];
    if (GATE && inside) save<float>(part, 2 * (size_t)a.C, gate_sum), save<float>(part, 3 * (size_t)a.C, dx_sum);
}

// dshift, dscale, dgate, rows ld apart (or added to the one there is), = the sum of a row's parts (of all); dh_sum [rows, C] of
// its own
__global__ static void add_parts(float *dshift, float *dscale, float *dgate, float *dh_sum, const float *part, int ld, int count,
                                 int C) {
    const int c = blockIdx.x * 128 + threadIdx.x, which = blockIdx.y;
    float *out = which == 0 ? dshift : which == 1 ? dscale : which == 2 ? dgate : dh_sum;
    if (c >= C || !out) return;
    const size_t row = blockIdx.z, at = row * (size_t)(which == 3 ? C : ld) + c;
    float sum = 0;
    for (int i = 0; i < count; i++) sum += part[((row * count + i) * 4 + which) * C + c];
    out[at] = ld || which == 3 ? sum : out[at] + sum;
}

// The next tokens are fetched ahead where shared memory has room for them
template <typename A, int VEC, bool NORM, bool GATE>
static int launch_one(struct kern *k, const back_args &a, dim3 grid, int threads) {
    const int one = slot<A, VEC>::BYTES * GROUP * threads, fixed = 2 * 8 * 32 * 4;
    int most = 0;
    int rc = cuda_check(k, cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, cuda_of(k)->device), "gate_norm_backward");
    if (rc < 0) return rc;
    const bool ahead = 2 * one + fixed <= most;
    if (one + fixed > most) return cuda_fail(k, KERN_EUNSUPPORTED, "backward of a norm of %d channels", a.C);
    const int bytes = ahead ? 2 * one : one;
    rc = cuda_check(k, cudaFuncSetAttribute(norm_back<A, VEC, NORM, GATE>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
                    "gate_norm_backward");
    if (rc < 0) return rc;
    norm_back<A, VEC, NORM, GATE><<<grid, threads, (size_t)bytes, cuda_of(k)->stream>>>(a, ahead);
    return cuda_launched(k, "gate_norm_backward");
}

template <typename A, int VEC> static int launch(struct kern *k, const back_args &a, dim3 grid, int threads) {
    return a.dy && a.h ? launch_one<A, VEC, true, true>(k, a, grid, threads)
           : a.dy      ? launch_one<A, VEC, true, false>(k, a, grid, threads)
                       : launch_one<A, VEC, false, true>(k, a, grid, threads);
}

int cuda_gate_norm_backward(struct kern *k, const struct kern_norm_back *n) {
    const int R = n->R, T = n->T, C = n->C, ld = n->ld, blocks = (T + TOKENS - 1) / TOKENS, rows = ld ? R : 1;
    const void *dy = n->dy, *h = n->h;
    const size_t parts = KERN_ROUND_UP((size_t)R * (size_t)blocks * 16 * (size_t)C, (size_t)256);
    void *scratch;
    if (R == 0 || (!dy && !h)) return KERN_OK;
    if (R > 65535) return cuda_fail(k, KERN_EUNSUPPORTED, "%d rows at once", R);
    int rc = cuda_scratch(k, parts + (size_t)rows * (size_t)C * 4, &scratch);
    if (rc < 0) return rc;
    back_args a = {.dx = n->dx, .dh = n->dh, .y = n->y, .dy = dy, .xhat = n->xhat, .h = h, .rstd = n->rstd};
    a.gate = n->gate, a.shift = n->shift, a.scale = n->scale, a.part = (float *)scratch, a.ld = ld, a.T = T, a.C = C;
    const size_t all = (size_t)a.dx | (size_t)a.dh | (size_t)a.y | (size_t)dy | (size_t)a.xhat | (size_t)h | (size_t)a.gate |
                       (size_t)a.shift | (size_t)a.scale;
    const bool four = C % 4 == 0 && ld % 4 == 0 && all % 16 == 0;
    const int vec = four ? C <= 1152 ? 4 : 8 : 1, threads = KERN_ROUND_UP((C + vec - 1) / vec, 32);
    if (threads > 512 || C % vec) return cuda_fail(k, KERN_EUNSUPPORTED, "backward of a norm of %d channels", C);
    const dim3 grid((unsigned)blocks, (unsigned)R);
    const bool f32 = k->act == KERN_F32;
    rc = vec == 8   ? (f32 ? launch<float, 8> : launch<bf16, 8>)(k, a, grid, threads)
         : vec == 4 ? (f32 ? launch<float, 4> : launch<bf16, 4>)(k, a, grid, threads)
                    : (f32 ? launch<float, 1> : launch<bf16, 1>)(k, a, grid, threads);
    if (rc < 0) return rc;
    float *dh_sum = h && n->dh_sum ? (float *)((char *)scratch + parts) : NULL;
    add_parts<<<dim3((unsigned)((C + 127) / 128), dh_sum ? 4 : 3, (unsigned)rows), 128, 0, cuda_of(k)->stream>>>(
        dy ? n->dshift : NULL, dy ? n->dscale : NULL, h ? n->dgate : NULL, dh_sum, a.part, ld, ld ? blocks : R * blocks, C);
    rc = cuda_launched(k, "gate_norm_backward");
    return rc < 0 || !dh_sum ? rc : column_add(k, n->dh_sum, dh_sum, rows, C, n->add);
}
