// SPDX-License-Identifier: MIT
// What the files of the CUDA back end share: the device's state, how calls fail, small device functions.
#ifndef KERN_CUDA_DEVICE_CUH
#define KERN_CUDA_DEVICE_CUH
#include "kernels/cuda/cuda.h"

#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#define FP8_MOST 448.0f // the largest number of e4m3
#define WORKSPACE_BYTES ((size_t)32 << 20)
#define RING_BYTES ((size_t)2 << 20) // of one half of the staging ring

struct plan;
struct product;
struct comm;

struct cuda { // k->impl
    cudaStream_t stream;
    cublasLtHandle_t lt;
    const struct cuda_host *host;
    int device, sms;
    bool hopper;     // compute capability 9.0: wgmma
    void *workspace; // any_bits: of products that are split along K, else NULL
    bool tf32;       // float32 products round their factors to 10 bits
    bool fp8_fixed;  // e4m3 factors have one scale each (fp8.cu), not one a line
    bool calibrating;
    bool capturing;
    unsigned *overflows, *told; // of the residual stream in float16, and what the host reads of it; NULL in float32
    /* staging: small host arrays go through pinned memory to the device without waiting. Two halves; an event guards the reuse of
     * each. */
    char *pinned, *twin; // [2*RING_BYTES] host and device
    size_t at;           // next free byte
    cudaEvent_t half_done[2];
    cudaEvent_t step_done[2]; // of cuda_pace
    unsigned steps;
    struct plan *plans; // list, see plan.cu
    char card[160];     // what a choice of products depends on, see plan_cache.cu
    char cache[512];    // folder; "": none
    char shipped[512];  // the same, of what comes with the library
    /* training, see train.cuh */
    struct product *products; // list, see product.cu
    void *lt_work;            // their workspace
    void *scratch[64];        // cuda_scratch: the last one serves
    int scratches;
    size_t scratch_size;
    struct comm *comm; // NULL on one GPU
};

static inline struct cuda *cuda_of(const struct kern *k) { return (struct cuda *)k->impl; }

static inline size_t kern_size(enum kern_dtype t) { return t == KERN_F32 ? 4 : t == KERN_F8 ? 1 : 2; }

int cuda_fail(struct kern *, int status, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
int cuda_check(struct kern *, cudaError_t, const char *what); // 0, or KERN_EDEVICE / KERN_ENOMEM with the text
int cuda_launched(struct kern *, const char *op);             // after a launch
int cuda_not_recorded(struct kern *, const char *op);         // fails between graph_begin and graph_end
// Copies a small host array to the device through the ring; *dev is valid for work queued before the next RING_BYTES of staging.
int cuda_stage(struct kern *, const void *host, size_t bytes, void **dev);

/* the ops, one file a family */
int cuda_linear_new(struct kern *, const struct kern_linear_spec *, const void *w, const float *b, struct kern_linear **);
int cuda_linear_new_pieces(struct kern *, const struct kern_linear_spec *, const void *const *w, const size_t *count, int n, const float *b,
                           struct kern_linear **);
void cuda_linear_free(struct kern *, struct kern_linear *);
int cuda_linear(struct kern *, const struct kern_linear *, void *y, const void *x, int units, void *save_pre);
int cuda_patchify(struct kern *, float *tok, const float *img, int R, int Cin, int I, int P);
int cuda_unpatchify(struct kern *, float *img, const float *tok, int R, int Cout, int keep, int I, int P);
int cuda_add_table(struct kern *, void *x, const float *table, int R, int T, int C);
int cuda_timestep_embed(struct kern *, float *out, const float *t, int R, int F);
int cuda_condition(struct kern *, float *silu_c, const float *temb, const float *table, const int32_t *y, int R, int C,
                   float *save_c);
int cuda_norm_modulate(struct kern *, void *y, const void *x, const float *shift, const float *scale, int ld, int R, int T, int C,
                       float eps, void *save_xhat, float *save_rstd);
int cuda_norm_modulate_fp8(struct kern *, void *y, const void *x, const float *shift, const float *scale, int ld, int R, int T,
                           int C, float eps, const struct kern_linear *reader);
int cuda_gate_norm_fp8(struct kern *, void *y, void *x, const void *h, const float *gate, const float *shift, const float *scale,
                       int ld, int R, int T, int C, float eps, const struct kern_linear *reader);
int cuda_calibrate(struct kern *, bool on);
int cuda_gate_norm(struct kern *, void *y, void *x, const void *h, const float *gate, const float *shift, const float *scale,
                   int ld, int R, int T, int C, float eps, void *save_xhat, float *save_rstd);
int cuda_attention(struct kern *, void *o, const void *qkv, int R, int T, int H, int D, float *save_lse);
int cuda_attention_f32(struct kern *, float *o, const float *qkv, int R, int T, int H, int D, float *save_lse);
int cuda_set_token(struct kern *, void *x, enum kern_dtype t, const float *v, int R, int T, int C, int at);
int cuda_cross_attention(struct kern *, void *o, const void *q, const float *kv, int ld, int R, int T, int S, int H, int D);
// True where this GPU has a faster kernel for that head dimension; *rc is then its status
int cuda_attention_fp8(struct kern *, void *o, const void *qkv, int R, int T, int H, int D, const struct kern_linear *reader);
bool cuda_attention_sm90(struct kern *, void *o, const void *qkv, int R, int T, int H, int D, float *save_lse, int *rc);
int cuda_conv_new(struct kern *, const struct kern_conv_spec *, const float *w, const float *b, struct kern_conv **);
void cuda_conv_free(struct kern *, struct kern_conv *);
int cuda_conv_strips(struct kern *, const struct kern_conv *);
int cuda_conv(struct kern *, const struct kern_conv *, void *y, const void *x, const float *coef, int pictures, int first, int n);
int cuda_group_norm(struct kern *, float *coef, double *sums, const void *x, const float *gamma, const float *beta, int pictures, size_t n,
                    int C, int groups, float eps);
int cuda_wide_new(struct kern *, int T, int C, int pictures, struct kern_wide **);
void cuda_wide_free(struct kern *, struct kern_wide *);
int cuda_wide_strips(struct kern *, const struct kern_wide *);
int cuda_wide(struct kern *, const struct kern_wide *, void *o, const void *qkv, int pictures, int first, int n);
int cuda_gather(struct kern *, float *in, const float *cols, size_t numel, const struct kern_gather *, int n);
int cuda_row_update(struct kern *, float *cols, size_t numel, size_t plane, const float *out, size_t out_ld, const float *noise,
                    const struct kern_row_update *, int n);
int cuda_row_norm(struct kern *, double *norms, const float *cols, size_t numel, const struct kern_norm *, int n);

template <typename E> inline constexpr bool is_half = false; // else __nv_bfloat16
template <> inline constexpr bool is_half<__half> = true;

// Two numbers as one register of E
template <typename E> __device__ __forceinline__ unsigned pack(float lo, float hi) {
    if constexpr (is_half<E>) {
        __half2 v = __floats2half2_rn(lo, hi);
        return *(unsigned *)&v;
    } else {
        __nv_bfloat162 v = __floats2bfloat162_rn(lo, hi);
        return *(unsigned *)&v;
    }
}

template <typename T> __device__ __forceinline__ float load_f32(const T *p) { return (float)*p; }
template <typename T> __device__ __forceinline__ void store_f32(T *p, float v) { *p = (T)v; }

__device__ __forceinline__ float warp_sum(float v) { // the same tree always: xor 16, 8, 4, 2, 1
    for (int i = 16; i; i /= 2) v += __shfl_xor_sync(0xffffffffu, v, i);
    return v;
}
__device__ __forceinline__ float quad_sum(float v) { // of four neighbouring lanes, which hold a line of a tile
    v += __shfl_xor_sync(0xffffffffu, v, 1);
    return v + __shfl_xor_sync(0xffffffffu, v, 2);
}

/*
 * Launches that may begin before the kernel in front of them has ended (Hopper's programmatic dependent launch): blocks are
 * placed and set up meanwhile. The kernel must call wait_for_previous before it reads or writes memory that another kernel
 * touches; it returns when all earlier work is complete and visible, as no kernel here lets its successor go early.
 */
__device__ __forceinline__ void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
template <typename... P, typename... A>
static inline void launch_early(const struct kern *k, void (*kernel)(P...), dim3 grid, int threads, int shared_bytes, A... args) {
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3((unsigned)threads);
    config.dynamicSmemBytes = (size_t)shared_bytes;
    config.stream = cuda_of(k)->stream;
    config.attrs = &early;
    config.numAttrs = cuda_of(k)->hopper ? 1 : 0;
    (void)cudaLaunchKernelEx(&config, kernel, P(args)...); // cuda_launched sees its error
}

/* ---- tensor core and asynchronous copy instructions ---- */

__device__ __forceinline__ unsigned shared_address(const void *p) { return (unsigned)__cvta_generic_to_shared(p); }
// 16 bytes to shared memory; bytes < 16 fills the rest with zeros
__device__ __forceinline__ void copy_async(void *dst, const void *src, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(dst)), "l"(src), "r"(bytes));
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;"); }
template <int N> __device__ __forceinline__ void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N)); }

__device__ __forceinline__ void ldmatrix4(unsigned r[4], const void *p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(p)));
}
__device__ __forceinline__ void ldmatrix2(unsigned r[2], const void *p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(p)));
}
__device__ __forceinline__ void ldmatrix4_trans(unsigned r[4], const void *p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(p)));
}
__device__ __forceinline__ void ldmatrix2_trans(unsigned r[2], const void *p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(p)));
}
// d += a b with elements of type E, 16 x 8 x 16 and 16 x 8 x 8
template <typename E> __device__ __forceinline__ void mma_k16(float d[4], const unsigned a[4], unsigned b0, unsigned b1) {
#define MMA(type)                                                                                                                \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"      \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                                         \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
    if constexpr (is_half<E>) MMA("f16");
    else MMA("bf16");
#undef MMA
}
template <typename E> __device__ __forceinline__ void mma_k8(float d[4], const unsigned a[2], unsigned b) {
#define MMA(type)                                                                                                                \
    asm("mma.sync.aligned.m16n8k8.row.col.f32." type "." type ".f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"                \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                                         \
        : "r"(a[0]), "r"(a[1]), "r"(b))
    if constexpr (is_half<E>) MMA("f16");
    else MMA("bf16");
#undef MMA
}

#endif
