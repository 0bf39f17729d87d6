// SPDX-License-Identifier: MIT
#include "kernels/backend.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int ref_open(struct kern *k, const struct kern_config *cfg) {
    (void)cfg;
    k->name = "ref";
    k->threads = 1;
    snprintf(k->device, sizeof k->device, "plain C reference, 1 thread");
    return KERN_OK;
}

static const struct backend {
    const char *name;
    int (*open)(struct kern *, const struct kern_config *);
} backends[] = {{"ref", ref_open}, {"cpu", kern_cpu_open}, {"cuda", kern_cuda_open}};

int kern_fail(struct kern *k, int status, const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(k->why, sizeof k->why, fmt, ap);
    va_end(ap);
    return status;
}

static void ref_close(struct kern *k) { (void)k; }

static int open_backend(struct kern *k, const struct kern_config *cfg) {
    k->act = cfg->act;
    k->stream = k->picture = KERN_F32;
    k->close = ref_close;
    kern_ref_fill(k);
    const char *name = cfg->backend && strcmp(cfg->backend, "auto") == 0 ? kern_auto(k->why, sizeof k->why) : cfg->backend;
    if (cfg->act > KERN_F16) return kern_fail(k, KERN_EUNSUPPORTED, "activations are float32, bfloat16 or float16");
    if (cfg->product != KERN_PRODUCT_ACT && name && strcmp(name, "cuda") != 0)
        return kern_fail(k, KERN_EUNSUPPORTED, "precisions tf32 and fp8 need a GPU (back end cuda)");
    for (size_t i = 0; i < sizeof backends / sizeof *backends; i++)
        if (name && strcmp(name, backends[i].name) == 0) return backends[i].open(k, cfg);
    return kern_fail(k, KERN_EUNSUPPORTED, "there is no back end \"%s\" in this build", name ? name : "");
}

int kern_devices(const char *backend, char *why, size_t why_size) {
    if (why_size) *why = 0;
    return strcmp(backend, "cuda") == 0 ? kern_cuda_devices(why, why_size) : 1;
}

const char *kern_auto(char *why, size_t why_size) { return kern_devices("cuda", why, why_size) > 0 ? "cuda" : "cpu"; }

bool kern_precision(struct kern_config *cfg, const char *name) {
    static const struct { const char *name; enum kern_dtype act; enum kern_product product; } all[] = {
        {"f32", KERN_F32, KERN_PRODUCT_ACT}, {"tf32", KERN_F32, KERN_PRODUCT_TF32}, {"bf16", KERN_BF16, KERN_PRODUCT_ACT},
        {"f16", KERN_F16, KERN_PRODUCT_ACT}, {"fp8", KERN_BF16, KERN_PRODUCT_FP8},
        {"fp8-static", KERN_BF16, KERN_PRODUCT_FP8_STATIC}};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (!strcmp(all[i].name, name)) return cfg->act = all[i].act, cfg->product = all[i].product, true;
    return false;
}

int kern_open(struct kern **out, const struct kern_config *cfg, char *why, size_t why_size) {
    *out = NULL;
    struct kern *k = calloc(1, sizeof *k);
    if (!k) {
        if (why && why_size) snprintf(why, why_size, "out of memory");
        return KERN_ENOMEM;
    }
    int rc = open_backend(k, cfg);
    if (rc < 0) {
        if (why && why_size) snprintf(why, why_size, "%s", k->why);
        free(k);
        return rc;
    }
    *out = k;
    return KERN_OK;
}

void kern_close(struct kern *k) {
    if (!k) return;
    k->close(k);
    free(k);
}

size_t kern_dtype_size(enum kern_dtype t) { return t == KERN_F32 ? 4 : 2; }

size_t kern_alloc_size(size_t bytes) {
    if (bytes > SIZE_MAX / 2) return 0;
    return bytes ? KERN_ROUND_UP(bytes, (size_t)64) : 64;
}

int kern_check_linear(struct kern *k, const struct kern_linear_spec *s) {
    if (s->out < 1 || s->in < 1 || s->unit < 1)
        return kern_fail(k, KERN_EUNSUPPORTED, "linear layer of %d x %d in units of %d", s->out, s->in, s->unit);
    if (s->act != KERN_NONE && s->act != KERN_GELU_TANH && s->act != KERN_SILU)
        return kern_fail(k, KERN_EUNSUPPORTED, "activation %d", (int)s->act);
    return KERN_OK;
}

int kern_check_attention(struct kern *k, int T, int H, int D) {
    if (T < 1 || T > KERN_MAX_TOKENS)
        return kern_fail(k, KERN_EUNSUPPORTED, "attention over %d tokens (1 to %d)", T, KERN_MAX_TOKENS);
    if (H < 1 || D < 8 || D > 128 || D % 8)
        return kern_fail(k, KERN_EUNSUPPORTED, "%d heads of dimension %d (a multiple of 8 up to 128)", H, D);
    return KERN_OK;
}

int kern_check_cross(struct kern *k, int T, int S, int H, int D) {
    if (S < 1 || S > KERN_CROSS_KEYS)
        return kern_fail(k, KERN_EUNSUPPORTED, "cross-attention to %d keys (1 to %d)", S, KERN_CROSS_KEYS);
    return kern_check_attention(k, T, H, D);
}
