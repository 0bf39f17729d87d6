// SPDX-License-Identifier: MIT
/*
 * wgmma: Hopper's warpgroup products for attention: operands in shared memory, products of 64 lines with 64, their results in
 * registers. attention_sm90.cu says how an operand lies.
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

#endif
#endif
