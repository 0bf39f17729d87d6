// SPDX-License-Identifier: MIT
/*
 * wgmma: Hopper's warpgroup products for attention in bfloat16 or float16 (E): operands in shared memory, products of 64 lines with 64, their
 * results in registers. attention_sm90.cu says how an operand lies.
 */
#ifndef KERN_CUDA_WGMMA_CUH
#define KERN_CUDA_WGMMA_CUH
#include "kernels/cuda/device.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HOPPER 1
#endif

#define TILE 64                             // lines of a warpgroup
#define OPERAND(D, lines) ((lines)*2 * (D)) // bytes, a multiple of 1024

typedef __nv_bfloat16 bf16;

#ifdef HOPPER

template <typename E = bf16> __device__ __forceinline__ void multiply(float (&d)[32], uint64_t a, uint64_t b, int add) { // m64n64k16, both in shared memory, K-major
#define MULTIPLY(type)                                                                                                           \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"                                                                    \
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {"                                                \
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                        \
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "                             \
                 "%32, %33, p, 1, 1, 0, 0;\n}"                                                                                   \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),   \
                   "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),        \
                   "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),       \
                   "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])                     \
                 : "l"(a), "l"(b), "r"(add))
    if constexpr (is_half<E>) MULTIPLY("f16");
    else MULTIPLY("bf16");
#undef MULTIPLY
}

template <typename E = bf16> __device__ __forceinline__ void multiply(float (&d)[32], const unsigned (&a)[4], uint64_t b) { // m64n64k16, A in registers, B N-major; adds
#define MULTIPLY(type)                                                                                                           \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {"                                                \
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                        \
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "                             \
                 "{%32, %33, %34, %35}, %36, 1, 1, 1, 1;"                                                                        \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),   \
                   "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),        \
                   "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),       \
                   "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
    if constexpr (is_half<E>) MULTIPLY("f16");
    else MULTIPLY("bf16");
#undef MULTIPLY
}

template <typename E = bf16> __device__ __forceinline__ void multiply(float (&d)[4], const unsigned (&a)[4], uint64_t b) { // m64n8k16, the same
#define MULTIPLY(type)                                                                                                           \
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32." type "." type                                                      \
                 " {%0, %1, %2, %3}, {%4, %5, %6, %7}, %8, 1, 1, 1, 1;"                                                          \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                                \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
    if constexpr (is_half<E>) MULTIPLY("f16");
    else MULTIPLY("bf16");
#undef MULTIPLY
}

__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> __device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
__device__ __forceinline__ void products_end() { products_commit(), products_wait<0>(); }
__device__ __forceinline__ void visible_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Descriptors, from addresses in units of 16 bytes: one addition each. leading, stride: see the PTX manual, "strides"; swizzled
// operands have 1024 bytes from 8 lines to the next 8 and no other stride; of columns of 16 bytes a line the next 8 lines begin
// 128 bytes on
__device__ __forceinline__ uint64_t descriptor(unsigned at, unsigned leading, unsigned high) {
    return at + (leading << 16) | (uint64_t)high << 32;
}
__device__ __forceinline__ uint64_t swizzled(unsigned at) { return descriptor(at, 1, 1024 / 16 | 1 << 30); }
__device__ __forceinline__ uint64_t column(unsigned at, unsigned leading) { return descriptor(at, leading, 128 / 16); }

__device__ __forceinline__ float power_of_2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Where piece p of a line of an operand of LINES lines lies
template <int LINES> __device__ __forceinline__ int place(int line, int piece) {
    return piece < 8 ? line * 128 + (piece ^ (line & 7)) * 16 : LINES * 128 + line * 16;
}

// `there` of TILE lines of one head, ld apart, to an operand; the others, of which nothing is read: zeros. A thread keeps its piece and the place of its lines
// among eight, so that a copy costs two additions and a comparison
template <int D> __device__ __forceinline__ void copy_lines(char *operand, const bf16 *src, int ld, int there) {
    constexpr int STEP = 128 / 8;
    const int line = threadIdx.x / 8, piece = threadIdx.x % 8;
    const bf16 *from = src + line * ld + piece * 8;
    char *to = operand + place<TILE>(line, piece);
#pragma unroll
    for (int i = 0; i < TILE; i += STEP, from += STEP * ld, to += STEP * 128)
        copy_async(to, from, line + i < there ? 16 : 0);
    if (D > 64 && threadIdx.x < TILE) {
        const int t = threadIdx.x;
        copy_async(operand + place<TILE>(t, 8), src + t * ld + 64, t < there ? 16 : 0);
    }
}

template <int THREADS> __device__ __forceinline__ void clear_column(char *column, int lines) {
    for (int i = threadIdx.x; i < lines; i += THREADS) *(uint4 *)(column + i * 16) = make_uint4(0, 0, 0, 0);
}

#endif
#endif
