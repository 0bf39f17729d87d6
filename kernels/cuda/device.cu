// SPDX-License-Identifier: MIT
/*
 * device: one GPU as a back end: opening it, its memory, its one stream, recorded graphs.
 *
 * All work goes to one stream in the order of the calls, so an op returns as soon as it is queued, and only download and row_norm
 * wait. Uploads, weights and the samplers' tables go through a ring of pinned memory: the host's bytes are copied
 * at once (the caller may reuse them) and the device fetches them in stream order, so a sampling step never waits for the device,
 * and a large upload is copied in while what went before is still on its way.
 *
 * k->rows hands over all rows as one chunk: a GPU wants the largest products it can get, and rows are independent in every op
 * anyway.
 *
 * A graph is what the ops between graph_begin and graph_end queued, recorded instead of run (capture is thread-local: other
 * threads may allocate). Kernels and cuBLASLt load their code at first use, which is not legal while recording: run once, then
 * record.
 */
#include "kernels/cuda/linear.cuh"
#include "kernels/cuda/train.cuh"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PIXELS ((size_t)1 << 19) // of pictures that are worked on together: eight of 256 x 256

void plans_free(struct cuda *); // plan.cu

int cuda_fail(struct kern *k, int status, const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(k->why, sizeof k->why, fmt, ap);
    va_end(ap);
    return status;
}

int cuda_check(struct kern *k, cudaError_t e, const char *what) {
    if (e == cudaSuccess) return KERN_OK;
    (void)cudaGetLastError(); // an error that is not sticky must not be blamed on the next launch
    if (e == cudaErrorMemoryAllocation) return cuda_fail(k, KERN_ENOMEM, "out of GPU memory: %s", what);
    return cuda_fail(k, KERN_EDEVICE, "%s: %s (%s)", what, cudaGetErrorString(e), cudaGetErrorName(e));
}

int cuda_launched(struct kern *k, const char *op) { return cuda_check(k, cudaGetLastError(), op); }

int cuda_not_recorded(struct kern *k, const char *op) {
    return cuda_of(k)->capturing ? cuda_fail(k, KERN_EUNSUPPORTED, "%s cannot be part of a graph", op) : KERN_OK;
}

/* ---- memory ---- */

static int cuda_use(struct kern *k) { return cuda_check(k, cudaSetDevice(cuda_of(k)->device), "the GPU"); }

static int cuda_alloc(struct kern *k, size_t bytes, void **out) {
    char what[64];
    size_t size = KERN_ROUND_UP(bytes ? bytes : 1, (size_t)256);
    *out = NULL;
    if (bytes > SIZE_MAX / 2) return cuda_fail(k, KERN_ENOMEM, "a buffer of %zu bytes", bytes);
    snprintf(what, sizeof what, "a buffer of %zu bytes", bytes);
    int rc = cuda_check(k, cudaMalloc(out, size), what);
    if (rc == KERN_OK) rc = cuda_check(k, cudaMemsetAsync(*out, 0, size, cuda_of(k)->stream), what);
    if (rc < 0 && *out) cudaFree(*out), *out = NULL;
    return rc;
}

static void cuda_free(struct kern *k, void *p) {
    cudaStreamSynchronize(cuda_of(k)->stream);
    cudaFree(p);
}

static size_t cuda_device_memory(struct kern *k) {
    size_t bytes = 0, total;
    return cuda_check(k, cudaMemGetInfo(&bytes, &total), "asking for free memory") == KERN_OK ? bytes : 0;
}

// A place in the ring for bytes <= RING_BYTES. Entering a half waits for the work that was queued when that half was last left.
static int ring_place(struct kern *k, size_t bytes, size_t *place) {
    struct cuda *c = cuda_of(k);
    size_t half = c->at / RING_BYTES;
    if (c->at % RING_BYTES + bytes > RING_BYTES) {
        int rc = cuda_check(k, cudaEventRecord(c->half_done[half], c->stream), "staging");
        half ^= 1;
        if (rc == KERN_OK) rc = cuda_check(k, cudaEventSynchronize(c->half_done[half]), "staging");
        if (rc < 0) return rc;
        c->at = half * RING_BYTES;
    }
    *place = c->at;
    c->at += KERN_ROUND_UP(bytes, (size_t)64);
    if (c->at >= (half + 1) * RING_BYTES) c->at = (half + 1) * RING_BYTES - 1; // full: the next one changes halves
    return KERN_OK;
}

int cuda_stage(struct kern *k, const void *host, size_t bytes, void **dev) {
    struct cuda *c = cuda_of(k);
    size_t at = 0;
    int rc = cuda_not_recorded(k, "an op with a table from the host");
    if (rc == KERN_OK) rc = ring_place(k, bytes, &at);
    if (rc < 0) return rc;
    memcpy(c->pinned + at, host, bytes);
    *dev = c->twin + at;
    return cuda_check(k, cudaMemcpyAsync(*dev, c->pinned + at, bytes, cudaMemcpyHostToDevice, c->stream), "staging");
}

static int cuda_upload(struct kern *k, void *dst, const void *host, size_t bytes) {
    struct cuda *c = cuda_of(k);
    int rc = cuda_not_recorded(k, "upload");
    for (size_t done = 0, at = 0, n; done < bytes && rc == KERN_OK; done += n) {
        n = bytes - done < RING_BYTES ? bytes - done : RING_BYTES;
        rc = ring_place(k, n, &at);
        if (rc < 0) return rc;
        memcpy(c->pinned + at, (const char *)host + done, n);
        rc = cuda_check(k, cudaMemcpyAsync((char *)dst + done, c->pinned + at, n, cudaMemcpyHostToDevice, c->stream), "upload");
    }
    return rc;
}

static int cuda_download(struct kern *k, void *host, const void *src, size_t bytes) {
    struct cuda *c = cuda_of(k);
    int rc = cuda_not_recorded(k, "download");
    if (rc < 0) return rc;
    if (bytes) rc = cuda_check(k, cudaMemcpyAsync(host, src, bytes, cudaMemcpyDeviceToHost, c->stream), "download");
    return rc == KERN_OK ? cuda_check(k, cudaStreamSynchronize(c->stream), "waiting for the GPU") : rc;
}

static int cuda_pace(struct kern *k) {
    struct cuda *c = cuda_of(k);
    int rc = cuda_check(k, cudaEventRecord(c->step_done[c->steps % 2], c->stream), "a step");
    c->steps++;
    return rc == KERN_OK && c->steps > 1 ? cuda_check(k, cudaEventSynchronize(c->step_done[c->steps % 2]), "waiting for the GPU") : rc;
}

static int cuda_copy(struct kern *k, void *dst, const void *src, size_t bytes) {
    return cuda_check(k, cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToDevice, cuda_of(k)->stream), "copy");
}

static int cuda_rows(struct kern *k, int n, int lines, kern_rows_fn *fn, void *ctx) {
    (void)lines;
    return n > 0 ? fn(k, ctx, 0, n, 0) : KERN_OK;
}

static int cuda_rows_scratch(struct kern *k, int n, int lines) {
    (void)k, (void)lines;
    return n;
}

/* ---- graphs ---- */

static int cuda_graph_begin(struct kern *k) {
    struct cuda *c = cuda_of(k);
    int rc = cuda_check(k, cudaStreamBeginCapture(c->stream, cudaStreamCaptureModeThreadLocal), "recording a graph");
    c->capturing = rc == KERN_OK;
    return rc;
}

static int cuda_graph_end(struct kern *k, struct kern_graph **out) {
    struct cuda *c = cuda_of(k);
    cudaGraph_t graph = NULL;
    cudaGraphExec_t exec = NULL;
    *out = NULL;
    c->capturing = false;
    int rc = cuda_check(k, cudaStreamEndCapture(c->stream, &graph), "recording a graph");
    if (rc == KERN_OK) rc = cuda_check(k, cudaGraphInstantiate(&exec, graph, 0), "a graph");
    if (rc == KERN_OK) rc = cuda_check(k, cudaGraphUpload(exec, c->stream), "a graph");
    if (graph) cudaGraphDestroy(graph);
    if (rc < 0 && exec) cudaGraphExecDestroy(exec);
    if (rc == KERN_OK) *out = (struct kern_graph *)exec;
    return rc;
}

static int cuda_graph_launch(struct kern *k, struct kern_graph *g) {
    return cuda_check(k, cudaGraphLaunch((cudaGraphExec_t)g, cuda_of(k)->stream), "a recorded forward pass");
}

static void cuda_graph_free(struct kern *k, struct kern_graph *g) {
    cudaStreamSynchronize(cuda_of(k)->stream);
    if (g) cudaGraphExecDestroy((cudaGraphExec_t)g);
}

static uint64_t cuda_overflows(struct kern *k) { return *(volatile unsigned *)cuda_of(k)->told; }

/* ---- opening and closing ---- */

static void cuda_close(struct kern *k) {
    struct cuda *c = cuda_of(k);
    if (!c) return;
    if (c->stream) cudaStreamSynchronize(c->stream);
    comm_free(c);
    plans_free(c);
    products_free(c);
    cuda_scratch_free(c);
    if (c->lt) cublasLtDestroy(c->lt);
    for (int i = 0; i < 2; i++) {
        if (c->half_done[i]) cudaEventDestroy(c->half_done[i]);
        if (c->step_done[i]) cudaEventDestroy(c->step_done[i]);
    }
    if (c->pinned) cudaFreeHost(c->pinned);
    if (c->overflows) cudaFree(c->overflows);
    if (c->told) cudaFreeHost(c->told);
    if (c->twin) cudaFree(c->twin);
    if (c->workspace) cudaFree(c->workspace);
    if (c->stream) cudaStreamDestroy(c->stream);
    free(c);
    k->impl = NULL;
}

extern "C" __attribute__((visibility("default"))) int sitd_cuda_devices(char *why, size_t why_size) {
    int n = 0;
    cudaError_t e = cudaGetDeviceCount(&n);
    if (e == cudaSuccess && n > 0) return n;
    (void)cudaGetLastError();
    int driver = 0, needed = CUDART_VERSION; // the runtime calls a driver that is not there too old as well
    if (e == cudaErrorInsufficientDriver && cudaDriverGetVersion(&driver) == cudaSuccess && driver == 0)
        snprintf(why, why_size, "no usable NVIDIA GPU: there is no NVIDIA driver");
    else if (e == cudaErrorInsufficientDriver)
        snprintf(why, why_size, "no usable NVIDIA GPU: the driver is for CUDA %d.%d, %d.%d is needed", driver / 1000, driver % 1000 / 10, needed / 1000,
                 needed % 1000 / 10);
    else snprintf(why, why_size, "no usable NVIDIA GPU: %s", e == cudaSuccess ? "none found" : cudaGetErrorString(e));
    return 0;
}

static int find_device(struct kern *k, int device, struct cudaDeviceProp *p) {
    int n = sitd_cuda_devices(k->why, sizeof k->why);
    if (n == 0) return KERN_EDEVICE;
    if (device < 0 || device >= n)
        return cuda_fail(k, KERN_EDEVICE, "no GPU %d: this machine has %d (numbered from 0)", device, n);
    int rc = cuda_check(k, cudaGetDeviceProperties(p, device), "reading the GPU's properties");
    if (rc < 0) return rc;
    if (p->major < 8)
        return cuda_fail(k, KERN_EUNSUPPORTED, "%s has compute capability %d.%d, 8.0 is needed", p->name, p->major, p->minor);
    return cuda_check(k, cudaSetDevice(device), p->name);
}

static int open_parts(struct kern *k, struct cuda *c) {
    int rc = cuda_check(k, cudaStreamCreateWithFlags(&c->stream, cudaStreamNonBlocking), "a stream");
    if (rc == KERN_OK) rc = cuda_check(k, cudaMallocHost((void **)&c->pinned, 2 * RING_BYTES), "pinned memory");
    if (rc == KERN_OK) rc = cuda_check(k, cudaMalloc((void **)&c->twin, 2 * RING_BYTES), "staging memory");
    for (int i = 0; i < 2 && rc == KERN_OK; i++) {
        rc = cuda_check(k, cudaEventCreateWithFlags(&c->half_done[i], cudaEventDisableTiming), "an event");
        if (rc == KERN_OK) // who waits for steps, waits long: asleep
            rc = cuda_check(k, cudaEventCreateWithFlags(&c->step_done[i], cudaEventDisableTiming | cudaEventBlockingSync), "an event");
    }
    if (rc == KERN_OK && cublasLtCreate(&c->lt) != CUBLAS_STATUS_SUCCESS)
        rc = cuda_fail(k, KERN_EDEVICE, "cuBLASLt does not start on this GPU");
    return rc;
}

// Of numbers that a residual stream in float16 does not hold
static int open_counter(struct kern *k, struct cuda *c) {
    int rc = cuda_check(k, cudaMalloc((void **)&c->overflows, sizeof *c->overflows), "a counter");
    if (rc == KERN_OK) rc = cuda_check(k, cudaMemsetAsync(c->overflows, 0, sizeof *c->overflows, c->stream), "a counter");
    if (rc == KERN_OK) rc = cuda_check(k, cudaMallocHost((void **)&c->told, sizeof *c->told), "a counter");
    if (rc == KERN_OK) *c->told = 0, k->overflows = cuda_overflows;
    return rc;
}

static void fill(struct kern *k) {
    k->use = cuda_use;
    k->alloc = cuda_alloc;
    k->device_memory = cuda_device_memory;
    k->free = cuda_free;
    k->upload = cuda_upload;
    k->download = cuda_download;
    k->pace = cuda_pace;
    k->copy = cuda_copy;
    k->rows = cuda_rows;
    k->rows_scratch = cuda_rows_scratch;
    k->linear_new = cuda_linear_new;
    k->linear_new_pieces = cuda_linear_new_pieces;
    k->linear_free = cuda_linear_free;
    k->linear = cuda_linear;
    k->patchify = cuda_patchify;
    k->unpatchify = cuda_unpatchify;
    k->add_table = cuda_add_table;
    k->timestep_embed = cuda_timestep_embed;
    k->condition = cuda_condition;
    k->norm_modulate = cuda_norm_modulate;
    k->gate_norm = cuda_gate_norm;
    k->attention = cuda_attention;
    k->conv_new = cuda_conv_new;
    k->conv_free = cuda_conv_free;
    k->conv_strips = cuda_conv_strips;
    k->conv = cuda_conv;
    k->group_norm = cuda_group_norm;
    k->wide_new = cuda_wide_new;
    k->wide_free = cuda_wide_free;
    k->wide_strips = cuda_wide_strips;
    k->wide = cuda_wide;
    k->set_token = cuda_set_token;
    k->cross_attention = cuda_cross_attention;
    k->gather = cuda_gather;
    k->row_update = cuda_row_update;
    k->row_norm = cuda_row_norm;
    cuda_train_fill(k);
    k->graph_begin = cuda_graph_begin;
    k->graph_end = cuda_graph_end;
    k->graph_launch = cuda_graph_launch;
    k->graph_free = cuda_graph_free;
    k->close = cuda_close;
}

extern "C" __attribute__((visibility("default"))) int sitd_cuda_open(struct kern *k, const struct kern_config *cfg,
                                                                     const struct cuda_host *host) {
    struct cudaDeviceProp p;
    if (host->kern_size != sizeof(struct kern) || host->update_size != sizeof(struct kern_row_update))
        return cuda_fail(k, KERN_EUNSUPPORTED, "%s belongs to another version of this program", KERN_CUDA_LIBRARY);
    int rc = find_device(k, cfg->device, &p);
    if (rc < 0) return rc;
    const bool fp8_fixed = cfg->product == KERN_PRODUCT_FP8_STATIC, fp8 = cfg->product == KERN_PRODUCT_FP8 || fp8_fixed;
    if (fp8 && (p.major != 9 || p.minor != 0)) // other architectures scale otherwise
        return cuda_fail(k, KERN_EUNSUPPORTED, "precision fp8 needs a Hopper GPU (compute capability 9.0); %s has %d.%d", p.name,
                         p.major, p.minor);
    struct cuda *c = (struct cuda *)calloc(1, sizeof *c);
    if (!c) return cuda_fail(k, KERN_ENOMEM, "out of memory");
    c->host = host;
    c->device = cfg->device;
    c->sms = p.multiProcessorCount;
    c->hopper = p.major == 9 && p.minor == 0;
    k->impl = c;
    rc = open_parts(k, c);
    if (rc < 0) {
        cuda_close(k);
        return rc;
    }
    k->name = "cuda";
    k->threads = 1;
    k->stream = cfg->act != KERN_F32 && !cfg->exact_stream ? KERN_F16 : KERN_F32;
    if (cfg->any_bits) rc = cuda_check(k, cudaMalloc(&c->workspace, WORKSPACE_BYTES), "a workspace of products");
    if (rc == KERN_OK && k->stream == KERN_F16) rc = open_counter(k, c);
    if (rc < 0) return cuda_close(k), rc;
    c->tf32 = cfg->product == KERN_PRODUCT_TF32;
    c->fp8_fixed = fp8_fixed;
    k->picture = cfg->act == KERN_F32 ? KERN_F32 : KERN_BF16;
    k->pixels = PIXELS;
    plan_cache_open(c, &p, cfg->cache);
    snprintf(k->device, sizeof k->device, "%.60s, GPU %d, %.0f GiB", p.name, cfg->device, (double)p.totalGlobalMem / (1 << 30));
    fill(k);
    if (fp8) {
        k->norm_modulate_fp8 = cuda_norm_modulate_fp8;
        k->gate_norm_fp8 = cuda_gate_norm_fp8;
        k->fp8_pre = !fp8_fixed;
        k->calibrate = fp8_fixed ? cuda_calibrate : NULL;
        k->attention_fp8 = fp8_fixed ? cuda_attention_fp8 : NULL;
    }
    return KERN_OK;
}
