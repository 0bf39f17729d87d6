// SPDX-License-Identifier: MIT
// The ways a linear layer runs here; linear.cu chooses.
#ifndef KERN_CUDA_LINEAR_CUH
#define KERN_CUDA_LINEAR_CUH
#include "kernels/cuda/device.cuh"

enum way { LT, WIDE, VECTOR, PLAIN, LIVE }; // LIVE: what is WIDE, of linear_wrap

struct cuda_linear { // what struct kern_linear is here
    struct kern_linear_spec spec;
    enum way way;
    void *w;       // LT: x's type; WIDE, VECTOR: float16; PLAIN: float32
    void *bias;    // [out], LT: y's type, else float32
    float *scales; // [out], of w where it is e4m3; with fixed scales the first serves all
    struct fixed_scale *fixed; // of x, where e4m3's scales are fixed
    __half *half;  // WIDE: rounded activations
    struct plan *plan;
    const float *w_live, *b_live; // of linear_wrap: the caller's, which w and bias may be themselves
};

/* linear.cu */
enum way linear_way(const struct kern *, const struct kern_linear_spec *);
bool linear_exact(const struct kern *, const struct kern_linear_spec *); // its factors are float32
int linear_ready(struct kern *, struct cuda_linear *);                   // what a layer with weights still needs: a plan, scratch

/* plan.cu: cuBLASLt products with pinned algorithms */
struct plan_key {
    int N, K, unit;         // y[units*unit, N] = x[units*unit, K] w^T
    bool gelu;              // tanh-GELU in the epilogue
    bool fixed;             // KERN_F8: one scale for x and one for w, not one a line of each
    enum kern_dtype xt, yt; // x and w; y
};
struct plan_scales {        // of KERN_F8, device memory: y = (w*scale)(x*scale), y's inverse scale where y is KERN_F8
    const float *w, *x, *y; // [N] and [lines], or one each
};
#define PLAN_LEVELS 16
struct plan_level { // up to so many lines (but for the last: from the level before on)
    long lines;
    cublasLtMatmulAlgo_t algo;
};
// Finds or makes the plan; w is a weight matrix of that shape to try the candidates with. Allocates and waits for the device.
int plan_get(struct kern *, struct plan **, const struct plan_key *, const void *w);
// bias: y's type, bfloat16 where y is KERN_F8. scales: NULL but where x and w are KERN_F8
int plan_run(struct kern *, const struct plan *, void *y, const void *x, const void *w, const void *bias,
             const struct plan_scales *scales, long lines);

/* fp8.cu: e4m3 */
struct fixed_scale { // device memory; both are powers of two, so multiplying is exact
    float scale;
    alignas(16) float inverse; // cuBLASLt refuses scales elsewhere
    float most;                // of what was seen
};
// Where the scales of x [lines, K] lie, behind x in a buffer made for 16-bit numbers
static inline float *fp8_token_scales(const void *x, long lines, int K) { return (float *)((char *)x + (size_t)lines * (size_t)K); }
// l->w from float32 to e4m3, l->scales; with fixed scales also l->fixed
int fp8_weights(struct kern *, struct cuda_linear *);
// y [lines, N] in e4m3 with a scale a line (behind it) = gelu(pre), pre in bfloat16
int fp8_gelu(struct kern *, void *y, const void *pre, long lines, int N);
int fp8_observe(struct kern *, struct fixed_scale *, const void *x, size_t n); // widens the scale to what is in x

/* plan_cache.cu: what was chosen before. Thread: any */
enum plan_memory { PLAN_UNKNOWN, PLAN_REMEMBERED, PLAN_TRIED }; // REMEMBERED: by another process; it must be tried before it is used
void plan_cache_open(struct cuda *, const struct cudaDeviceProp *, const char *folder);
// Fills in level[].algo. n levels of the same lines as when it was kept
enum plan_memory plan_cache_find(struct kern *, const struct plan_key *, int n, struct plan_level *);
void plan_cache_keep(struct kern *, const struct plan_key *, int n, const struct plan_level *); // writes the folder's file if this is news

/* vector.cu: few lines against few weights. lines: a multiple of KERN_VEC; K of 8 */
int vector_linear(struct kern *, float *y, const float *x, const __half *w, const float *bias, int N, int K, int lines,
                  enum kern_act);

/* plain.cu: any shape and types; float32 sums in index order */
struct plain_args {
    void *y;
    const void *x;
    const float *w, *bias; // w [N, K]
    void *pre;             // NULL or where the value before the activation goes
    long M;
    int N, K;
    bool x_f32;              // else x is of k->act
    enum kern_dtype round_x; // what x's elements are rounded to; w's are
    enum kern_dtype yt;      // of y and pre
    enum kern_act act;
};
int plain_linear(struct kern *, const struct plain_args *);
// y = act(pre), both of type t, n elements; may be in place
int plain_activate(struct kern *, void *y, const void *pre, size_t n, enum kern_dtype t, enum kern_act);

__device__ __forceinline__ float activate(enum kern_act act, float u) {
    if (act == KERN_GELU_TANH) return 0.5f * u * (1 + tanhf(0.7978845608028654f * (u + 0.044715f * u * u * u)));
    if (act == KERN_SILU) return u / (1 + expf(-u));
    return u;
}

#endif
