// SPDX-License-Identifier: MIT
/*
 * picture_sm90: convolutions in bfloat16 by Hopper's wgmma, sums in float32.
 *
 * A block makes 16 lines x 8 columns of one picture for 128 outputs. Its input, 64 channels at a time, is a patch of 18 x 10
 * pixels in shared memory that all nine taps read: tap (i, j)'s operand is the same patch, begun i lines and j pixels further on.
 * That works in wgmma's layout without swizzle, where eight lines of an operand (here: eight pixels in a row) are 8 x 16 bytes
 * together, sixteen-byte pieces of channels a plane apart, and the next eight pixels a patch's line further on; the start may be
 * any sixteen bytes. So each pixel is fetched, normalised and activated once and not nine times, and no normalised picture exists
 * in memory. The planes lie 16 bytes more than a multiple of 128 apart: eight threads that store the eight pieces of a pixel hit
 * different banks.
 *
 * Two warpgroups: one multiplies (2 x m64n128k16 a piece of 16 channels, 128 accumulators a thread), one brings. Of the bringing
 * one, three warps prepare patches (two buffers; three where there is one tap), one thread fetches weights by bulk copies (four buffers), which lie in memory
 * exactly as wgmma wants them. Two blocks share a multiprocessor, so that one's end and beginning hide behind the other's
 * products; three share it where there are eight outputs or less and the bringing is all the work.
 *
 * A pixel's sum runs over (64 channels, tap, 16 channels) whatever its place, and a block belongs to one picture: its bytes depend
 * on its picture alone. KERN_CONV_UP is four convolutions of side 2, whose weights are sums of the 3x3 ones (see kernels/cpu/conv.c).
 */
#include "kernels/cuda/picture.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HOPPER 1
#endif

#define THREADS 256
#define LINES 16
#define COLUMNS 8
#define STAGES 4         // of weights
#define FETCHERS 96      // threads that prepare patches
#define AT_ONCE 5        // pieces a thread has on their way

template <int SIDE> struct patch {
    static constexpr int W = COLUMNS + SIDE - 1, H = LINES + SIDE - 1, PIXELS = W * H,
                         PLANE = (PIXELS * 16 + 127 - 16) / 128 * 128 + 16, BYTES = PLANE * (TENSOR_K / 8),
                         BUFFERS = SIDE == 1 ? 3 : 2; // one tap a step hides little of the way from memory
};
template <int SIDE, int BN> struct shape {
    static constexpr int TAPS = SIDE * SIDE, TILE = BN * TENSOR_K * 2, WEIGHTS = patch<SIDE>::BUFFERS * patch<SIDE>::BYTES,
                         BARRIERS = WEIGHTS + STAGES * TILE, BYTES = BARRIERS + 128,
                         PITCH = BN + 8; // floats of a line on its way out
    static_assert(4 * 16 * PITCH * 4 <= STAGES * TILE, "results leave through the weights' buffers");
    static_assert(WEIGHTS % 128 == 0, "bulk copies want 16 bytes, wgmma too");
};

#ifdef HOPPER

__device__ __forceinline__ void barrier_init(unsigned at, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_arrive(unsigned at) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at) : "memory");
}
__device__ __forceinline__ void barrier_wait(unsigned at, int parity) {
    asm volatile("{\n.reg .pred p;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
                 "@!p bra again;\n}" ::"r"(at),
                 "r"(parity)
                 : "memory");
}
// bytes (a multiple of 16) to shared memory; the barrier completes when they are there
__device__ __forceinline__ void copy_bulk(unsigned to, const void *from, int bytes, unsigned barrier) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from),
                 "r"(bytes), "r"(barrier)
                 : "memory");
}

// leading: bytes from 8 channels to the next 8; stride: from 8 lines to the next 8
__device__ __forceinline__ uint64_t descriptor(unsigned address, unsigned leading, unsigned stride) {
    return (uint64_t)((address & 0x3ffff) >> 4) | (uint64_t)(leading >> 4) << 16 | (uint64_t)(stride >> 4) << 32;
}

__device__ __forceinline__ void multiply(float (&d)[64], uint64_t a, uint64_t b, int add) { // m64n128k16
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "%64, %65, p, 1, 1, 0, 0;\n}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]),
          "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]),
          "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
          "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]),
          "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]),
          "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]),
          "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
        : "l"(a), "l"(b), "r"(add));
}
__device__ __forceinline__ void multiply(float (&d)[4], uint64_t a, uint64_t b, int add) { // m64n8k16
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %6, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %5, p, 1, 1, 0, 0;\n}"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "l"(a), "l"(b), "r"(add));
}
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT> __device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

// The block's place and its barriers
template <int SIDE, int BN> struct place {
    int picture, phase, block, y0, x0;
    unsigned patches, weights, patch_full, patch_empty, weights_full, weights_empty; // addresses in shared memory
};

template <int SIDE, int BN> __device__ __forceinline__ place<SIDE, BN> place_of(const tensor_conv &a, const char *shared) {
    typedef shape<SIDE, BN> S;
    const int blocks = (a.out + BN - 1) / BN, columns = (a.width + COLUMNS - 1) / COLUMNS, tile = blockIdx.x / blocks,
              phases = SIDE == 2 ? 4 : 1;
    const unsigned base = shared_address(shared), barriers = base + S::BARRIERS;
    place<SIDE, BN> p;
    p.block = blockIdx.x % blocks;
    p.y0 = tile / columns * LINES;
    p.x0 = tile % columns * COLUMNS;
    p.picture = blockIdx.y / phases;
    p.phase = blockIdx.y % phases;
    p.patches = base;
    p.weights = base + S::WEIGHTS;
    p.patch_full = barriers;
    p.patch_empty = barriers + 8 * patch<SIDE>::BUFFERS;
    p.weights_full = barriers + 16 * patch<SIDE>::BUFFERS;
    p.weights_empty = p.weights_full + 8 * STAGES;
    return p;
}

/* ---- bringing ---- */

__device__ __forceinline__ unsigned prepare(unsigned raw, float s0, float b0, float s1, float b1, bool silu) {
    float2 v = __bfloat1622float2(*(__nv_bfloat162 *)&raw);
    v.x = fmaf(v.x, s0, b0), v.y = fmaf(v.y, s1, b1);
    if (silu) v.x = __fdividef(v.x, 1 + __expf(-v.x)), v.y = __fdividef(v.y, 1 + __expf(-v.y));
    __nv_bfloat162 out = __floats2bfloat162_rn(v.x, v.y);
    return *(unsigned *)&out;
}

// Where a patch lies in its picture
template <int SIDE, int BN> struct window {
    const bf16 *x;
    int top, left, height, width, line;
    __device__ window(const tensor_conv &a, const place<SIDE, BN> &p)
        : x(a.x + p.picture * a.next_x), top(p.y0 - (SIDE == 2 ? 1 - p.phase / 2 : SIDE / 2)),
          left(p.x0 - (SIDE == 2 ? 1 - p.phase % 2 : SIDE / 2)), height(a.height), width(a.width), line(a.x_line) {}
    __device__ __forceinline__ const bf16 *operator[](int pixel) const { // NULL outside
        const int y = top + pixel / patch<SIDE>::W, at = left + pixel % patch<SIDE>::W;
        return pixel < patch<SIDE>::PIXELS && y >= 0 && y < height && at >= 0 && at < width ? x + ((size_t)y * width + at) * line : NULL;
    }
};

__device__ __forceinline__ void patch_is_there(unsigned barrier) {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); // wgmma reads what was stored here
    barrier_arrive(barrier);
}

// Patches of all steps as they are: 64 channels of the pixels around the block, zeros outside of the picture and beyond its channels
template <int SIDE, int BN>
__device__ __forceinline__ void copy_patches(const tensor_conv &a, const place<SIDE, BN> &p, char *shared, int thread) {
    typedef patch<SIDE> P;
    constexpr int BEHIND = P::BUFFERS - 2; // a buffer comes free while the next patch is read: that one must have been announced
    const window<SIDE, BN> from(a, p);
    const int piece = thread & 7, steps = (a.in + TENSOR_K - 1) / TENSOR_K;
    for (int step = 0; step < steps; step++) {
        const int channel = step * TENSOR_K + piece * 8, buffer = step % P::BUFFERS;
        char *to = shared + buffer * P::BYTES + piece * P::PLANE;
        barrier_wait(p.patch_empty + 8 * buffer, (step / P::BUFFERS & 1) ^ 1);
        for (int pixel = thread / 8; pixel < P::PIXELS; pixel += FETCHERS / 8) {
            const bf16 *src = channel < a.in ? from[pixel] : NULL;
            copy_async(to + pixel * 16, src ? src + channel : a.x, src ? 16 : 0);
        }
        copy_commit();
        copy_wait<BEHIND>();
        if (step >= BEHIND) patch_is_there(p.patch_full + 8 * ((step - BEHIND) % P::BUFFERS));
    }
    copy_wait<0>();
    if (BEHIND) patch_is_there(p.patch_full + 8 * ((steps - 1) % P::BUFFERS));
}

// The same, normalised and activated
template <int SIDE, int BN>
__device__ __forceinline__ void prepare_patches(const tensor_conv &a, const place<SIDE, BN> &p, char *shared, int thread) {
    typedef patch<SIDE> P;
    constexpr int EACH = (P::PIXELS + FETCHERS / 8 - 1) / (FETCHERS / 8);
    const window<SIDE, BN> from(a, p);
    const int piece = thread & 7, first = thread / 8, steps = (a.in + TENSOR_K - 1) / TENSOR_K;
    for (int step = 0; step < steps; step++) {
        const int channel = step * TENSOR_K + piece * 8, buffer = step % P::BUFFERS;
        const bool there = channel < a.in;
        char *to = shared + buffer * P::BYTES + piece * P::PLANE;
        float scale[8], shift[8];
#pragma unroll
        for (int i = 0; i < 8; i++) scale[i] = 1, shift[i] = 0;
        if (a.coef && there) {
            const float *coef = a.coef + (size_t)p.picture * 2 * a.in + channel;
#pragma unroll
            for (int i = 0; i < 8; i++) scale[i] = __ldg(coef + i), shift[i] = __ldg(coef + a.in + i);
        }
        barrier_wait(p.patch_empty + 8 * buffer, (step / P::BUFFERS & 1) ^ 1);
#pragma unroll 1
        for (int i0 = 0; i0 < EACH; i0 += AT_ONCE) {
            uint4 raw[AT_ONCE];
            bool inside[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                const bf16 *src = there ? from[(i0 + i) * (FETCHERS / 8) + first] : NULL;
                inside[i] = src;
                raw[i] = make_uint4(0, 0, 0, 0);
                if (src) raw[i] = __ldg((const uint4 *)(src + channel));
            }
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                const int pixel = (i0 + i) * (FETCHERS / 8) + first;
                if (pixel >= P::PIXELS) break;
                if (inside[i]) {
                    raw[i].x = prepare(raw[i].x, scale[0], shift[0], scale[1], shift[1], a.silu);
                    raw[i].y = prepare(raw[i].y, scale[2], shift[2], scale[3], shift[3], a.silu);
                    raw[i].z = prepare(raw[i].z, scale[4], shift[4], scale[5], shift[5], a.silu);
                    raw[i].w = prepare(raw[i].w, scale[6], shift[6], scale[7], shift[7], a.silu);
                }
                *(uint4 *)(to + pixel * 16) = raw[i];
            }
        }
        patch_is_there(p.patch_full + 8 * buffer);
    }
}

template <int SIDE, int BN> __device__ __forceinline__ void bring_weights(const tensor_conv &a, const place<SIDE, BN> &p) {
    typedef shape<SIDE, BN> S;
    const int blocks = (a.out + BN - 1) / BN, tiles = (a.in + TENSOR_K - 1) / TENSOR_K * S::TAPS;
    const bf16 *w = a.w + p.picture * a.next_w + ((size_t)p.phase * blocks + p.block) * tiles * (S::TILE / 2);
    for (int i = 0; i < tiles; i++) {
        const int stage = i % STAGES;
        barrier_wait(p.weights_empty + 8 * stage, (i / STAGES & 1) ^ 1);
        copy_bulk(p.weights + stage * S::TILE, w + (size_t)i * (S::TILE / 2), S::TILE, p.weights_full + 8 * stage);
    }
}

/* ---- multiplying ---- */

template <int SIDE, int BN>
__device__ __forceinline__ void products(float (&acc)[2][BN / 2], const tensor_conv &a, const place<SIDE, BN> &p) {
    typedef shape<SIDE, BN> S;
    typedef patch<SIDE> P;
    const int steps = (a.in + TENSOR_K - 1) / TENSOR_K;
    const bool speaks = (threadIdx.x & 31) == 0;
    int stage = 0, turn = 0;
    for (int step = 0; step < steps; step++) {
        const int buffer = step % P::BUFFERS;
        const unsigned x = p.patches + buffer * P::BYTES;
        barrier_wait(p.patch_full + 8 * buffer, step / P::BUFFERS & 1);
#pragma unroll 1
        for (int tap = 0; tap < S::TAPS; tap++) {
            const unsigned w = p.weights + stage * S::TILE, at = x + (tap / SIDE * P::W + tap % SIDE) * 16;
            barrier_wait(p.weights_full + 8 * stage, turn);
            products_begin();
#pragma unroll
            for (int k = 0; k < TENSOR_K / 16; k++) {
                const uint64_t b = descriptor(w + k * 2 * BN * 16, BN * 16, 128);
                const int add = step > 0 || tap > 0 || k > 0;
                multiply(acc[0], descriptor(at + k * 2 * P::PLANE, P::PLANE, P::W * 16), b, add);
                multiply(acc[1], descriptor(at + k * 2 * P::PLANE + 8 * P::W * 16, P::PLANE, P::W * 16), b, add);
            }
            products_commit();
            products_wait<1>(); // those of the tap before
            if (speaks && (step > 0 || tap > 0)) barrier_arrive(p.weights_empty + 8 * ((stage + STAGES - 1) % STAGES));
            if (speaks && tap == 0 && step > 0) barrier_arrive(p.patch_empty + 8 * ((step - 1) % P::BUFFERS));
            if (++stage == STAGES) stage = 0, turn ^= 1;
        }
    }
    products_wait<0>();
}

template <int N> __device__ __forceinline__ void load_line(float (&v)[N], const bf16 *p) {
    const uint4 raw = *(const uint4 *)p;
    const unsigned u[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float2 f = __bfloat1622float2(*(const __nv_bfloat162 *)&u[i]);
        v[2 * i] = f.x, v[2 * i + 1] = f.y;
    }
}

// Eight outputs of a pixel, of which `n` exist
template <typename Y> __device__ __forceinline__ void finish(Y *y, float (&v)[8], int n, bool add, bool wide) {
    if constexpr (sizeof(Y) == 2) {
        if (wide) {
            if (add) {
                float old[8];
                load_line(old, y);
#pragma unroll
                for (int i = 0; i < 8; i++) v[i] += old[i];
            }
            __nv_bfloat162 out[4];
#pragma unroll
            for (int i = 0; i < 4; i++) out[i] = __floats2bfloat162_rn(v[2 * i], v[2 * i + 1]);
            *(uint4 *)y = *(const uint4 *)out;
            return;
        }
    } else if (wide && !add) {
        ((float4 *)y)[0] = make_float4(v[0], v[1], v[2], v[3]);
        ((float4 *)y)[1] = make_float4(v[4], v[5], v[6], v[7]);
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (i < n) store_f32(y + i, v[i] + (add ? load_f32(y + i) : 0));
}

/*
 * A warp's 16 pixels (two lines of the tile) of each half go through shared memory, so that a pixel's outputs are stored as one run of
 * bytes and residuals are added in float32 before the one rounding.
 */
template <int SIDE, int BN, typename Y>
__device__ __forceinline__ void write(const tensor_conv &a, const place<SIDE, BN> &p, const float (&acc)[2][BN / 2], char *shared) {
    typedef shape<SIDE, BN> S;
    constexpr int PIECES = BN / 8;
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, piece = lane % PIECES, channel = p.block * BN + piece * 8,
              n = a.out - channel, step = SIDE == 2 ? 2 : 1;
    float *out = (float *)(shared + S::WEIGHTS) + warp * 16 * S::PITCH, bias[8];
    Y *y = (Y *)a.y + p.picture * a.next_y;
    const bool wide = n >= 8 && a.y_line % 8 == 0;
#pragma unroll
    for (int i = 0; i < 8; i++) bias[i] = a.bias ? a.bias[channel + i] : 0;
    asm volatile("bar.sync 1, 128;" ::: "memory"); // all have done with the weights
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
        for (int i = 0; i < BN / 8; i++) {
            float *to = out + lane / 4 * S::PITCH + i * 8 + (lane & 3) * 2;
            *(float2 *)to = make_float2(acc[half][4 * i], acc[half][4 * i + 1]);
            *(float2 *)(to + 8 * S::PITCH) = make_float2(acc[half][4 * i + 2], acc[half][4 * i + 3]);
        }
        __syncwarp();
#pragma unroll 2
        for (int line = lane / PIECES; line < 16; line += 32 / PIECES) {
            const int row = p.y0 + half * 8 + warp * 2 + line / 8, column = p.x0 + line % 8;
            if (row >= a.height || column >= a.width || n <= 0) continue;
            const size_t at = ((size_t)(row * step + (SIDE == 2 ? p.phase / 2 : 0)) * (a.width * step) + column * step +
                               (SIDE == 2 ? p.phase % 2 : 0)) *
                              a.y_line;
            float v[8];
            const float4 *from = (const float4 *)(out + line * S::PITCH + piece * 8);
            *(float4 *)v = from[0], *(float4 *)(v + 4) = from[1];
#pragma unroll
            for (int i = 0; i < 8; i++) v[i] += bias[i];
            finish(y + at + channel, v, n, a.add, wide);
        }
        __syncwarp();
    }
}

#endif

template <int SIDE, int BN, typename Y> __global__ void __launch_bounds__(THREADS, BN == 8 ? 3 : 2) conv_kernel(const tensor_conv a) {
#ifdef HOPPER
    extern __shared__ __align__(1024) char shared[];
    const place<SIDE, BN> p = place_of<SIDE, BN>(a, shared);
    if (threadIdx.x == 0) {
        for (int i = 0; i < patch<SIDE>::BUFFERS; i++)
            barrier_init(p.patch_full + 8 * i, FETCHERS), barrier_init(p.patch_empty + 8 * i, 4);
        for (int i = 0; i < STAGES; i++) barrier_init(p.weights_full + 8 * i, 1), barrier_init(p.weights_empty + 8 * i, 4);
        asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();
    if (threadIdx.x >= 128) {
        if constexpr (BN > 8) asm volatile("setmaxnreg.dec.sync.aligned.u32 88;");
        if (threadIdx.x < 128 + FETCHERS) {
            if (a.coef || a.silu) prepare_patches<SIDE, BN>(a, p, shared, threadIdx.x - 128);
            else copy_patches<SIDE, BN>(a, p, shared, threadIdx.x - 128);
        }
        if (threadIdx.x == 128 + FETCHERS) bring_weights<SIDE, BN>(a, p);
    } else {
        if constexpr (BN > 8) asm volatile("setmaxnreg.inc.sync.aligned.u32 168;");
        float acc[2][BN / 2];
        products<SIDE, BN>(acc, a, p);
        write<SIDE, BN, Y>(a, p, acc, shared);
    }
#endif
}

template <int SIDE, int BN, typename Y> static int launch(struct kern *k, const struct tensor_conv *a) {
    typedef shape<SIDE, BN> S;
    long tiles = (long)((a->height + LINES - 1) / LINES) * ((a->width + COLUMNS - 1) / COLUMNS), blocks = (a->out + BN - 1) / BN;
    int phases = SIDE == 2 ? 4 : 1;
    if (tiles * blocks > 0x7fffffff || (long)a->pictures * phases > 65535)
        return cuda_fail(k, KERN_EUNSUPPORTED, "%d pictures of %d x %d pixels at once", a->pictures, a->height, a->width);
    int rc = cuda_check(
        k, cudaFuncSetAttribute(conv_kernel<SIDE, BN, Y>, cudaFuncAttributeMaxDynamicSharedMemorySize, S::BYTES), "convolution");
    if (rc < 0) return rc;
    dim3 grid((unsigned)(tiles * blocks), (unsigned)(a->pictures * phases));
    conv_kernel<SIDE, BN, Y><<<grid, THREADS, S::BYTES, cuda_of(k)->stream>>>(*a);
    return cuda_launched(k, "convolution");
}

template <int SIDE> static int launch_side(struct kern *k, const struct tensor_conv *a) {
    if (a->out <= 8) return a->y_f32 ? launch<SIDE, 8, float>(k, a) : launch<SIDE, 8, bf16>(k, a);
    return a->y_f32 ? launch<SIDE, TENSOR_N, float>(k, a) : launch<SIDE, TENSOR_N, bf16>(k, a);
}

int tensor_conv_run(struct kern *k, const struct tensor_conv *a) {
    return a->side == 1 ? launch_side<1>(k, a) : a->side == 2 ? launch_side<2>(k, a) : launch_side<3>(k, a);
}

bool tensor_here(const struct kern *k) { return cuda_of(k)->hopper; }

/* ---- weights in the order of use: tile [8 pieces of channels][outputs][8 channels] ---- */

struct from_conv { // [out, in, side, side]; of UP the sums of taps that fall on one pixel
    const float *w;
    int in, up;
    __device__ float operator()(int, int phase, int n, int k, int tap, int taps) const {
        const float *at = w + ((size_t)n * in + k) * (up ? 9 : taps);
        if (!up) return at[tap];
        double sum = 0;
        for (int i = 0; i < 3; i++)
            for (int j = 0; j < 3; j++)
                if ((phase / 2 ? i == 2 : i >= 1) == tap / 2 && (phase % 2 ? j == 2 : j >= 1) == tap % 2) sum += (double)at[i * 3 + j];
        return (float)sum;
    }
};
struct from_rows {
    const bf16 *p;
    size_t n_step, k_step, next;
    __device__ float operator()(int picture, int, int n, int k, int, int) const {
        return load_f32(p + picture * next + n * n_step + k * k_step);
    }
};

template <typename From> __global__ static void arrange(bf16 *dst, From from, size_t count, int phases, int out, int in, int taps, int bn) {
    size_t i = (size_t)blockIdx.x * 256 + threadIdx.x;
    if (i >= count) return;
    const int blocks = (out + bn - 1) / bn, steps = (in + TENSOR_K - 1) / TENSOR_K;
    size_t rest = i;
    const int line = (int)(rest % bn);
    rest /= bn;
    const int piece = (int)(rest % 8);
    rest /= 8;
    const int tap = (int)(rest % taps);
    rest /= taps;
    const int step = (int)(rest % steps);
    rest /= steps;
    const int n = (int)(rest % blocks) * bn + line, k0 = step * TENSOR_K + piece * 8;
    rest /= blocks;
    __align__(16) bf16 v[8];
    for (int e = 0; e < 8; e++)
        v[e] = __float2bfloat16_rn(n < out && k0 + e < in ? from((int)(rest / phases), (int)(rest % phases), n, k0 + e, tap, taps) : 0);
    *(uint4 *)(dst + 8 * i) = *(const uint4 *)v;
}

static int lines_of(int out) { return out <= 8 ? 8 : TENSOR_N; }

size_t tensor_weights_count(int out, int in, int side) {
    size_t bn = (size_t)lines_of(out), phases = side == 2 ? 4 : 1;
    return phases * KERN_ROUND_UP((size_t)out, bn) * KERN_ROUND_UP((size_t)in, (size_t)TENSOR_K) * (size_t)(side * side);
}

template <typename From> static int arrange_all(struct kern *k, bf16 *dst, const From &from, int pictures, int out, int in, int side) {
    size_t pieces = tensor_weights_count(out, in, side) / 8 * (size_t)pictures;
    arrange<<<(unsigned)((pieces + 255) / 256), 256, 0, cuda_of(k)->stream>>>(dst, from, pieces, side == 2 ? 4 : 1, out, in, side * side,
                                                                              lines_of(out));
    return cuda_launched(k, "arranging weights");
}

int tensor_weights(struct kern *k, bf16 *dst, const float *w, int out, int in, int side) {
    return arrange_all(k, dst, from_conv{w, in, side == 2}, 1, out, in, side);
}

int tensor_weights_of_rows(struct kern *k, bf16 *dst, const bf16 *src, size_t n_step, size_t k_step, size_t next, int pictures, int out,
                           int in) {
    return arrange_all(k, dst, from_rows{src, n_step, k_step, next}, pictures, out, in, 1);
}
