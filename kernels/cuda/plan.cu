// SPDX-License-Identifier: MIT
/*
 * plan: cuBLASLt products whose bits do not depend on the number of lines.
 *
 * cuBLASLt chooses an algorithm by shape, so the same line could be summed in another order in a larger batch. Here each product
 * (N, K, types, epilogue) gets its algorithms once, when its first layer is made:
 *   1. Only algorithms without split-K and without workspace are considered: then one block sums one output over K in order.
 *   2. The first choice of the heuristics at the largest size is the reference; what it computes from random factors are the
 * reference bits. (Not the fastest: timings differ from start to start, and a seed's picture must not.)
 *   3. What the heuristics propose for any size is a candidate for every size; for many lines, and for e4m3, there are also tiles that they pass
 * over. For each size (unit, 2 unit, 4 unit, ... lines)
 * the fastest of them are run on the first and on the last lines of those factors. Only candidates whose output equals the
 * reference bits everywhere are admitted; of them the fastest is kept. A product of any number of lines takes the algorithm of
 * the next size up. Layers of one shape share a plan. If there is no memory for trying, the reference algorithm serves all sizes.
 * What was chosen is remembered (plan_cache.cu): a second version of a model tries nothing, and another process only makes sure of the bits.
 *
 * Where any bits will do (kern_config.any_bits), split-K is a candidate too and bits are not compared.
 *
 * Few lines are timed with weights that come from memory, as a forward pass finds them: several copies in turn, larger than the
 * cache.
 *
 * cuBLASLt is column-major: our row-major w [N, K] is its A, transposed; x [M, K] its B; y [M, N] its D; bias runs along N.
 */
#include "kernels/cuda/linear.cuh"

#include <stdlib.h>
#include <string.h>

#define MOST_LINES 16384
#define MOST_BYTES ((size_t)256 << 20) // of one product's output
#define CANDIDATES 256
#define PROPOSALS                                                                                                                \
    8 // asked of the heuristics for a size; more cost time at load, as the code of each must be fetched from a large library
#define MANY 4096 // lines, of products for which of_many_lines' tiles are tried
#define FINALISTS 12             // whose bits are looked at, and which are timed well
#define COLD ((size_t)128 << 20) // bytes of weights that no cache holds

struct plan {
    struct plan *next;
    struct plan_key key;
    int levels;
    struct plan_level level[PLAN_LEVELS]; // ascending
};

void plans_free(struct cuda *c) {
    for (struct plan *p = c->plans, *next; p; p = next) {
        next = p->next;
        free(p);
    }
    c->plans = NULL;
}

static cudaDataType_t type_of(enum kern_dtype t) {
    return t == KERN_F32 ? CUDA_R_32F : t == KERN_F16 ? CUDA_R_16F : t == KERN_F8 ? CUDA_R_8F_E4M3 : CUDA_R_16BF;
}

/* ---- one product described ---- */

struct product {
    cublasLtMatmulDescOpaque_t desc;
    cublasLtMatrixLayoutOpaque_t a, b, c, d; // c is not read, but must be described: as d, or as bfloat16 where d is e4m3
    bool apart;                              // c is not d: it has no memory
};

static bool set(struct product *p, cublasLtMatmulDescAttributes_t a, const void *value, size_t size) {
    return cublasLtMatmulDescSetAttribute(&p->desc, a, value, size) == CUBLAS_STATUS_SUCCESS;
}

// e4m3 with a scale a line of w and a scale a line of x (Hopper's outer vectors), or one each; sums in full precision's fast form:
// 22 bits
static bool set_scales(struct product *p, const struct plan_key *key, const struct plan_scales *s) {
    int32_t mode = key->fixed ? CUBLASLT_MATMUL_MATRIX_SCALE_SCALAR_32F : CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
    int8_t fast = 1;
    return set(p, CUBLASLT_MATMUL_DESC_A_SCALE_MODE, &mode, sizeof mode) &&
           set(p, CUBLASLT_MATMUL_DESC_B_SCALE_MODE, &mode, sizeof mode) &&
           set(p, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &s->w, sizeof s->w) &&
           set(p, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &s->x, sizeof s->x) &&
           (key->yt != KERN_F8 || set(p, CUBLASLT_MATMUL_DESC_D_SCALE_POINTER, &s->y, sizeof s->y)) &&
           set(p, CUBLASLT_MATMUL_DESC_FAST_ACCUM, &fast, sizeof fast);
}

static enum kern_dtype bias_dtype(const struct plan_key *key) { return key->yt == KERN_F8 ? KERN_BF16 : key->yt; }

static int describe(struct kern *k, struct product *p, const struct plan_key *key, const void *bias, long lines) {
    p->apart = key->yt == KERN_F8;
    cublasOperation_t t = CUBLAS_OP_T;
    cublasLtEpilogue_t epilogue = key->gelu ? CUBLASLT_EPILOGUE_GELU_BIAS : CUBLASLT_EPILOGUE_BIAS;
    cudaDataType_t xt = type_of(key->xt), yt = type_of(key->yt), bias_type = type_of(bias_dtype(key));
    cublasComputeType_t compute = key->xt == KERN_F32 && cuda_of(k)->tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F;
    bool ok = cublasLtMatmulDescInit(&p->desc, compute, CUDA_R_32F) == CUBLAS_STATUS_SUCCESS;
    ok = ok && set(p, CUBLASLT_MATMUL_DESC_TRANSA, &t, sizeof t) &&
         set(p, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue);
    ok = ok && set(p, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof bias);
    const struct plan_scales any = {(const float *)bias, (const float *)bias, (const float *)bias};
    if (key->xt == KERN_F8) // the heuristics want pointers; the right ones come with the product
        ok = ok && set_scales(p, key, &any) && set(p, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &bias_type, sizeof bias_type);
    ok = ok && cublasLtMatrixLayoutInit(&p->a, xt, (uint64_t)key->K, (uint64_t)key->N, key->K) == CUBLAS_STATUS_SUCCESS;
    ok = ok && cublasLtMatrixLayoutInit(&p->b, xt, (uint64_t)key->K, (uint64_t)lines, key->K) == CUBLAS_STATUS_SUCCESS;
    ok = ok && cublasLtMatrixLayoutInit(&p->c, bias_type, (uint64_t)key->N, (uint64_t)lines, key->N) == CUBLAS_STATUS_SUCCESS;
    ok = ok && cublasLtMatrixLayoutInit(&p->d, yt, (uint64_t)key->N, (uint64_t)lines, key->N) == CUBLAS_STATUS_SUCCESS;
    return ok ? KERN_OK : cuda_fail(k, KERN_EDEVICE, "cuBLASLt refuses a product of %ld x %d x %d", lines, key->N, key->K);
}

static cublasStatus_t multiply(struct kern *k, const struct product *p, void *y, const void *x, const void *w,
                               const cublasLtMatmulAlgo_t *algo) {
    const float one = 1, zero = 0;
    const struct cuda *c = cuda_of(k);
    return cublasLtMatmul(c->lt, (cublasLtMatmulDesc_t)&p->desc, &one, w, (cublasLtMatrixLayout_t)&p->a, x,
                          (cublasLtMatrixLayout_t)&p->b, &zero, p->apart ? NULL : y, (cublasLtMatrixLayout_t)&p->c, y,
                          (cublasLtMatrixLayout_t)&p->d, algo, c->workspace, c->workspace ? WORKSPACE_BYTES : 0, c->stream);
}

int plan_run(struct kern *k, const struct plan *plan, void *y, const void *x, const void *w, const void *bias,
             const struct plan_scales *scales, long lines) {
    struct product p;
    int i = 0, rc = describe(k, &p, &plan->key, bias, lines);
    if (rc < 0) return rc;
    if (plan->key.xt == KERN_F8) set_scales(&p, &plan->key, scales);
    while (i + 1 < plan->levels && plan->level[i].lines < lines) i++;
    cublasStatus_t s = multiply(k, &p, y, x, w, &plan->level[i].algo);
    if (s == CUBLAS_STATUS_SUCCESS) return KERN_OK;
    int e = cuda_check(k, cudaGetLastError(), "linear");
    return e < 0 ? e
                 : cuda_fail(k, KERN_EDEVICE, "linear: cuBLASLt status %d at %ld x %d x %d", (int)s, lines, plan->key.N,
                             plan->key.K);
}

/* ---- choosing ---- */

struct pool {
    int n, known; // candidates; the first of those that are for many lines only
    cublasLtMatmulAlgo_t algo[CANDIDATES];
};

static void pool_add(struct pool *pool, const cublasLtMatmulAlgo_t *a) { // if it is new and there is room
    for (int i = 0; i < pool->n; i++)
        if (memcmp(&pool->algo[i], a, sizeof *a) == 0) return;
    if (pool->n < CANDIDATES) pool->algo[pool->n++] = *a;
}

// Adds what the heuristics propose for a size, best guess first; without split-K and workspace unless any bits will do
static void propose(struct kern *k, struct pool *pool, const struct plan_key *key, const void *bias, long lines) {
    struct product p;
    cublasLtMatmulPreferenceOpaque_t pref;
    cublasLtMatmulHeuristicResult_t all[PROPOSALS];
    bool split = cuda_of(k)->workspace;
    uint32_t schemes = split ? CUBLASLT_REDUCTION_SCHEME_MASK : CUBLASLT_REDUCTION_SCHEME_NONE;
    uint64_t bytes = split ? WORKSPACE_BYTES : 0;
    int n = 0;
    if (describe(k, &p, key, bias, lines) < 0 || cublasLtMatmulPreferenceInit(&pref) != CUBLAS_STATUS_SUCCESS) return;
    cublasLtMatmulPreferenceSetAttribute(&pref, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &schemes, sizeof schemes);
    cublasLtMatmulPreferenceSetAttribute(&pref, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes, sizeof bytes);
    if (cublasLtMatmulAlgoGetHeuristic(cuda_of(k)->lt, &p.desc, &p.a, &p.b, &p.c, &p.d, &pref, PROPOSALS, all, &n) !=
        CUBLAS_STATUS_SUCCESS)
        return;
    for (int i = 0; i < n; i++) {
        int32_t splits = 0;
        size_t size;
        cublasLtMatmulAlgoConfigGetAttribute(&all[i].algo, CUBLASLT_ALGO_CONFIG_SPLITK_NUM, &splits, sizeof splits, &size);
        if (all[i].state == CUBLAS_STATUS_SUCCESS && (split || (all[i].workspaceSize == 0 && splits <= 1)))
            pool_add(pool, &all[i].algo);
    }
}

/* What the heuristics pass over though it was the fastest, or near, in a search (SPEED.md). Whether one runs here at all, and with which bits, is
 * seen by trying. */
struct variant { // of the pool's first algorithm, in cuBLASLt's numbers
    uint32_t tile, custom;
    uint16_t cluster;
};
// 16,384 lines: tiles of 128 x 144, 128 x 160, 128 x 128 and 192 x 192 with clusters of two in either direction
static const struct variant of_many_lines[] = {{29, 1, 3},  {29, 9, 3},   {29, 11, 5}, {406, 1, 3}, {406, 9, 3}, {406, 3, 5}, {406, 11, 5}, {406, 3, 2},
                                               {406, 11, 2}, {20, 3, 5}, {20, 11, 5}, {20, 3, 2},  {20, 11, 2}, {209, 7, 5}, {31, 15, 5}};
// e4m3 of 512 and 4,096 lines, for which there are few proposals
static const struct variant of_e4m3[] = {{124, 8, 3}, {27, 8, 2}, {137, 14, 5}, {184, 14, 5}, {184, 14, 2}, {19, 15, 2}, {20, 15, 5}, {406, 7, 2}};

static void pool_add_variants(struct pool *pool, const struct variant *v, size_t n) {
    for (size_t i = 0; pool->n && i < n; i++) {
        cublasLtMatmulAlgo_t a = pool->algo[0];
        cublasLtMatmulAlgoConfigSetAttribute(&a, CUBLASLT_ALGO_CONFIG_TILE_ID, &v[i].tile, sizeof v[i].tile);
        cublasLtMatmulAlgoConfigSetAttribute(&a, CUBLASLT_ALGO_CONFIG_CUSTOM_OPTION, &v[i].custom, sizeof v[i].custom);
        cublasLtMatmulAlgoConfigSetAttribute(&a, CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID, &v[i].cluster, sizeof v[i].cluster);
        pool_add(pool, &a);
    }
}

static void propose_known(struct pool *pool, const struct plan_key *key) {
    if (key->xt == KERN_F8) pool_add_variants(pool, of_e4m3, sizeof of_e4m3 / sizeof *of_e4m3);
    pool->known = pool->n;
    pool_add_variants(pool, of_many_lines, sizeof of_many_lines / sizeof *of_many_lines);
}

__global__ static void fill_random(void *p, size_t n, enum kern_dtype t) { // uniform in [-1, 1), a hash of the index
    size_t i = (size_t)blockIdx.x * 256 + threadIdx.x;
    if (i >= n) return;
    uint32_t h = (uint32_t)i * 2654435761u + (uint32_t)(i >> 32);
    h = (h ^ h >> 15) * 2246822519u;
    h = (h ^ h >> 13) * 3266489917u;
    float v = (float)(int32_t)(h ^ h >> 16) * 0x1p-31f;
    if (t == KERN_F32) ((float *)p)[i] = v;
    else if (t == KERN_F16) ((__half *)p)[i] = __float2half_rn(v);
    else if (t == KERN_F8) ((__nv_fp8_e4m3 *)p)[i] = __nv_fp8_e4m3(v * FP8_MOST);
    else ((__nv_bfloat16 *)p)[i] = __float2bfloat16_rn(v);
}

__global__ static void count_differences(const uint32_t *a, const uint32_t *b, size_t words, unsigned *count) {
    size_t i = (size_t)blockIdx.x * 256 + threadIdx.x;
    if (i < words && a[i] != b[i]) atomicAdd(count, 1);
}

struct trial {                     // buffers for trying; NULL x: no memory for it
    char *x, *y, *want, *bias, *w; // w: copies of the weights
    float *scales;                 // for both factors, if they are KERN_F8
    int copies, copy;              // how many, and which is next
    unsigned *count;
    cudaEvent_t start, end;
    size_t x_size, y_size; // of an element
    long lines;            // of x and want
};

static void trial_end(struct trial *t) {
    void *buffers[] = {t->x, t->y, t->want, t->bias, t->w, t->scales, t->count};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++)
        if (buffers[i]) cudaFree(buffers[i]);
    if (t->start) cudaEventDestroy(t->start);
    if (t->end) cudaEventDestroy(t->end);
    (void)cudaGetLastError();
}

static bool trial_begin(struct kern *k, struct trial *t, const struct plan_key *key, const void *w, long lines) {
    *t = (struct trial){.x_size = kern_size(key->xt), .y_size = kern_size(key->yt), .lines = lines};
    size_t xs = (size_t)lines * key->K, ys = (size_t)lines * key->N * t->y_size;
    size_t ws = (size_t)key->N * key->K * t->x_size;
    t->copies = (int)((COLD + ws - 1) / ws < 64 ? (COLD + ws - 1) / ws : 64);
    cudaStream_t s = cuda_of(k)->stream;
    bool ok = cudaMalloc((void **)&t->x, xs * t->x_size) == cudaSuccess && cudaMalloc((void **)&t->y, ys) == cudaSuccess &&
              cudaMalloc((void **)&t->want, ys) == cudaSuccess &&
              cudaMalloc((void **)&t->bias, (size_t)key->N * 4) == cudaSuccess &&
              cudaMalloc((void **)&t->w, ws * t->copies) == cudaSuccess &&
              cudaMalloc((void **)&t->scales, (size_t)(lines > key->N ? lines : key->N) * 4) == cudaSuccess &&
              cudaMalloc((void **)&t->count, 4) == cudaSuccess && cudaEventCreate(&t->start) == cudaSuccess &&
              cudaEventCreate(&t->end) == cudaSuccess;
    if (!ok) return false;
    size_t scales = (size_t)(lines > key->N ? lines : key->N);
    fill_random<<<(unsigned)((scales + 255) / 256), 256, 0, s>>>(t->scales, scales, KERN_F32);
    for (int i = 0; i < t->copies; i++) cudaMemcpyAsync(t->w + i * ws, w, ws, cudaMemcpyDeviceToDevice, s);
    fill_random<<<(unsigned)((xs + 255) / 256), 256, 0, s>>>(t->x, xs, key->xt);
    fill_random<<<(unsigned)((key->N + 255) / 256), 256, 0, s>>>(t->bias, (size_t)key->N, bias_dtype(key));
    if (key->fixed) { // results near 1, so that e4m3 ones say something
        const float small[] = {1 / FP8_MOST, 0, 0, 0, 1 / FP8_MOST, 0, 0, 0, 1};
        return cudaMemcpyAsync(t->scales, small, sizeof small, cudaMemcpyHostToDevice, s) == cudaSuccess;
    }
    return true;
}

// The scales of x's lines from `from` on; single ones on 16-byte boundaries, cuBLASLt refuses others
static bool set_trial_scales(struct product *p, const struct trial *t, const struct plan_key *key, size_t from) {
    const struct plan_scales scales = {t->scales, key->fixed ? t->scales + 4 : t->scales + from, t->scales + 8};
    return key->xt != KERN_F8 || set_scales(p, key, &scales);
}

// Does the algorithm give the reference bits on the first and the last `lines` lines?
static bool same_bits(struct kern *k, struct trial *t, const struct plan_key *key, const struct product *p, const void *w,
                      long lines, const cublasLtMatmulAlgo_t *algo) {
    cudaStream_t s = cuda_of(k)->stream;
    size_t bytes = (size_t)lines * key->N * t->y_size, words = bytes / 4;
    unsigned differ = 1;
    cudaMemsetAsync(t->count, 0, 4, s);
    for (int last = 0; last < 2; last++) {
        size_t from = last ? (size_t)(t->lines - lines) : 0;
        cudaMemsetAsync(t->y, 0xff, bytes, s);
        struct product here = *p;
        set_trial_scales(&here, t, key, from);
        if (multiply(k, &here, t->y, t->x + from * key->K * t->x_size, w, algo) != CUBLAS_STATUS_SUCCESS)
            return (void)cudaGetLastError(), false;
        const char *want = t->want + from * key->N * t->y_size;
        count_differences<<<(unsigned)((words + 255) / 256), 256, 0, s>>>((const uint32_t *)t->y, (const uint32_t *)want, words,
                                                                          t->count);
    }
    cudaMemcpyAsync(&differ, t->count, 4, cudaMemcpyDeviceToHost, s);
    return cudaStreamSynchronize(s) == cudaSuccess && differ == 0;
}

// Keeps the device busy while the host queues what is to be timed
__global__ static void linger(unsigned ns) {
    uint64_t start, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(start));
    do asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    while (now - start < ns);
}

// Microseconds of one product, the best of some rounds of a few runs in a row
static float time_one(struct kern *k, struct trial *t, const struct plan_key *key, const struct product *p, long lines,
                      int rounds, int runs, const cublasLtMatmulAlgo_t *algo) {
    cudaStream_t s = cuda_of(k)->stream;
    size_t ws = (size_t)key->N * key->K * t->x_size;
    float best = 1e30f;
    for (int round = 0; round < rounds; round++) {
        float ms = 1e30f;
        if (runs > 1) linger<<<1, 1, 0, s>>>(20000 + (unsigned)runs * 10000);
        cudaEventRecord(t->start, s);
        for (int i = 0; i < runs; i++)
            if (multiply(k, p, t->y, t->x, t->w + (lines > 2048 ? 0 : t->copy++ % t->copies * ws), algo) != CUBLAS_STATUS_SUCCESS)
                return (void)cudaGetLastError(), 1e30f;
        cudaEventRecord(t->end, s);
        if (cudaEventSynchronize(t->end) != cudaSuccess || cudaEventElapsedTime(&ms, t->start, t->end) != cudaSuccess)
            return 1e30f;
        best = fminf(best, 1e3f * ms / (float)runs);
    }
    return best;
}

struct finalist {
    float us;
    int i;
};
static int by_time(const void *a, const void *b) {
    const struct finalist *x = (const struct finalist *)a, *y = (const struct finalist *)b;
    return x->us != y->us ? (x->us > y->us) - (x->us < y->us) : x->i - y->i;
}

static void choose_level(struct kern *k, struct plan *plan, int level, struct trial *t, const struct pool *pool) {
    struct product p;
    struct finalist f[CANDIDATES];
    long lines = plan->level[level].lines;
    int n = 0, admitted = 0, runs = lines >= 8192 ? 4 : 12;
    float best = 1e30f, limit = 1e30f;
    if (describe(k, &p, &plan->key, t->bias, lines) < 0) return;
    set_trial_scales(&p, t, &plan->key, 0);
    for (int i = 0; i < (lines < MANY ? pool->known : pool->n); i++) // the first run loads its code, or says that it is not for this size
        if (time_one(k, t, &plan->key, &p, lines, 1, 1, &pool->algo[i]) < 1e30f)
            f[n++] = (struct finalist){time_one(k, t, &plan->key, &p, lines, 1, 3, &pool->algo[i]), i};
    qsort(f, (size_t)n, sizeof *f, by_time);
    for (int j = 0; j < n && admitted < FINALISTS && f[j].us < limit; j++) {
        const cublasLtMatmulAlgo_t *algo = &pool->algo[f[j].i];
        if (!cuda_of(k)->workspace && !same_bits(k, t, &plan->key, &p, t->w, lines, algo)) continue;
        float us = time_one(k, t, &plan->key, &p, lines, 3, runs, algo);
        if (admitted++ == 0) limit = 1.25f * f[j].us;
        if (us < best) best = us, plan->level[level].algo = *algo;
    }
}

// What another process found is believed where it is one of the candidates here too and gives the reference bits.
static bool confirm(struct kern *k, struct plan *plan, int level, struct trial *t, const struct pool *pool, const cublasLtMatmulAlgo_t *algo) {
    struct product p;
    long lines = plan->level[level].lines;
    int i = 0;
    while (i < pool->n && memcmp(&pool->algo[i], algo, sizeof *algo) != 0) i++;
    if (i == pool->n || describe(k, &p, &plan->key, t->bias, lines) < 0) return false;
    set_trial_scales(&p, t, &plan->key, 0);
    if (cuda_of(k)->workspace ? time_one(k, t, &plan->key, &p, lines, 1, 1, algo) >= 1e30f : !same_bits(k, t, &plan->key, &p, t->w, lines, algo))
        return false;
    plan->level[level].algo = *algo;
    return true;
}

static void choose_levels(struct kern *k, struct plan *plan, struct trial *t, const struct pool *pool) {
    struct plan_level known[PLAN_LEVELS];
    memcpy(known, plan->level, sizeof known);
    bool remembered = plan_cache_find(k, &plan->key, plan->levels, known) != PLAN_UNKNOWN;
    for (int i = 0; i < plan->levels; i++)
        if (!remembered || !confirm(k, plan, i, t, pool, &known[i].algo)) choose_level(k, plan, i, t, pool);
    plan_cache_keep(k, &plan->key, plan->levels, plan->level);
}

static int choose(struct kern *k, struct plan *plan, const void *w) {
    struct pool pool = {0};
    struct trial t;
    struct product p;
    long most = plan->level[plan->levels - 1].lines;
    propose(k, &pool, &plan->key, w, most); // w stands for a bias: aligned alike
    if (pool.n == 0)
        return cuda_fail(k, KERN_EUNSUPPORTED, "cuBLASLt has no algorithm for a product of %ld x %d x %d", most, plan->key.N,
                         plan->key.K);
    for (int i = 0; i < plan->levels; i++) plan->level[i].algo = pool.algo[0];
    for (int i = plan->levels - 1; i >= 0; i--) propose(k, &pool, &plan->key, w, plan->level[i].lines);
    propose_known(&pool, &plan->key);
    if (trial_begin(k, &t, &plan->key, w, most) && describe(k, &p, &plan->key, t.bias, most) == KERN_OK &&
        set_trial_scales(&p, &t, &plan->key, 0) &&
        multiply(k, &p, t.want, t.x, w, &pool.algo[0]) == CUBLAS_STATUS_SUCCESS)
        choose_levels(k, plan, &t, &pool);
    int rc = cuda_check(k, cudaStreamSynchronize(cuda_of(k)->stream), "trying out products");
    trial_end(&t);
    return rc;
}

int plan_get(struct kern *k, struct plan **out, const struct plan_key *key, const void *w) {
    struct cuda *c = cuda_of(k);
    for (struct plan *p = c->plans; p; p = p->next)
        if (p->key.N == key->N && p->key.K == key->K && p->key.unit == key->unit && p->key.gelu == key->gelu &&
            p->key.xt == key->xt && p->key.yt == key->yt && p->key.fixed == key->fixed)
            return *out = p, KERN_OK;
    int rc = cuda_not_recorded(k, "a new layer");
    struct plan *p = rc == KERN_OK ? (struct plan *)calloc(1, sizeof *p) : NULL;
    if (!p) return rc < 0 ? rc : cuda_fail(k, KERN_ENOMEM, "out of memory");
    p->key = *key;
    long lines = key->unit;
    do p->level[p->levels++].lines = lines;
    while (p->levels < PLAN_LEVELS && (lines *= 2) <= MOST_LINES && (size_t)lines * key->N * kern_size(key->yt) <= MOST_BYTES);
    rc = plan_cache_find(k, key, p->levels, p->level) == PLAN_TRIED ? KERN_OK : choose(k, p, w);
    if (rc < 0) return free(p), rc;
    p->next = c->plans;
    c->plans = p;
    *out = p;
    return KERN_OK;
}
