// SPDX-License-Identifier: MIT
/*
 * Linear layers of vectors (one line a row: timestep, conditioning, modulation) in float32, on our own kernel.
 *
 * Such a layer multiplies KERN_VEC lines at a time and is bound by the reading of its weights. Here several rows share one
 * product, so a line's result must not depend on its place among them, and oneDNN does not promise that: held to AVX2, its kernel
 * for 8 lines treats them in groups that round differently. Ours keeps one accumulator per line and output and adds in index
 * order, on every processor. Weights are packed in blocks of simd->block outputs: [blocks][in][block], zero-padded.
 */
#include "kernels/cpu/cpu.h"

#include <stdlib.h>

#include "kernels/cpu/simd.h"

#define BLOCKS 8 // blocks a task

struct vectors {
    struct cpu_layer layer;
    int blocks;
    float *packed, *bias; // bias: padded to whole blocks
};

struct packing {
    struct vectors *l;
    const void *w;
};

static int pack_task(struct lane *lane, int block, void *arg) {
    const struct packing *p = arg;
    const struct kern_linear_spec *s = &p->l->layer.spec;
    size_t width = (size_t)lane->cpu->simd->block, in = (size_t)s->in, first = (size_t)block * width;
    float *to = p->l->packed + first * in;
    for (size_t o = 0; o < width; o++)
        for (size_t i = 0; i < in; i++)
            to[i * width + o] = first + o < (size_t)s->out ? kern_load(s->w_store, p->w, (first + o) * in + i) : 0;
    return KERN_OK;
}

int cpu_vectors_load(struct kern *k, struct cpu_layer *layer, const void *w, const float *b) {
    struct vectors *l = (struct vectors *)layer;
    if (b) memcpy(l->bias, b, (size_t)layer->spec.out * sizeof(float));
    return cpu_run(k, l->blocks, (double)layer->spec.out * layer->spec.in, pack_task, &(struct packing){l, w});
}

void cpu_vectors_free(struct cpu_layer *layer) {
    struct vectors *l = (struct vectors *)layer;
    free(l->packed);
    free(l->bias);
    free(l);
}

bool cpu_vectors_suit(struct kern *k, const struct kern_linear_spec *s) {
    bool f32 = k->act == KERN_F32 || (s->x_f32 && s->y_f32);
    return LANE(k)->cpu->simd && f32 && s->unit == KERN_VEC;
}

int cpu_vectors_new(struct kern *k, const struct kern_linear_spec *s, const void *w, const float *b, struct kern_linear **out) {
    size_t block = (size_t)LANE(k)->cpu->simd->block, blocks = ((size_t)s->out + block - 1) / block, in = (size_t)s->in;
    struct vectors *l = calloc(1, sizeof *l);
    if (l) {
        l->packed = aligned_alloc(64, kern_alloc_size(blocks * block * in * sizeof(float)));
        l->bias = calloc(blocks * block, sizeof(float));
    }
    if (!l || !l->packed || !l->bias) {
        if (l) cpu_vectors_free(&l->layer);
        return kern_fail(k, KERN_ENOMEM, "out of memory for a linear layer of %d x %d", s->out, s->in);
    }
    l->layer = (struct cpu_layer){.spec = *s, .own = true};
    l->blocks = (int)blocks;
    int rc = cpu_vectors_load(k, &l->layer, w, b);
    if (rc < 0) return cpu_vectors_free(&l->layer), rc;
    *out = (struct kern_linear *)l;
    return KERN_OK;
}

struct vectors_call {
    const struct vectors *l;
    float *y, *save_pre;
    const float *x;
};

static int vectors_task(struct lane *lane, int task, void *arg) {
    const struct vectors_call *c = arg;
    const struct kern_linear_spec *s = &c->l->layer.spec;
    const struct simd *simd = lane->cpu->simd;
    size_t out = (size_t)s->out, in = (size_t)s->in, width = (size_t)simd->block;
    int tasks = (c->l->blocks + BLOCKS - 1) / BLOCKS, first = task % tasks * BLOCKS;
    size_t line = (size_t)(task / tasks) * KERN_VEC, start = (size_t)first * width;
    for (int b = first; b < first + BLOCKS && b < c->l->blocks; b++) {
        size_t o = (size_t)b * width;
        simd->vectors(c->y + line * out + o, out, c->x + line * in, s->in, c->l->packed + o * in, c->l->bias + o,
                      out - o < width ? (int)(out - o) : (int)width);
    }
    int n = out - start < BLOCKS * width ? (int)(out - start) : (int)(BLOCKS * width);
    float *y = c->y + line * out + start, *save = c->save_pre ? c->save_pre + line * out + start : NULL;
    struct simd_activate a = {
        .act = s->act, .y_type = KERN_F32, .y = y, .save = save, .pre = y, .y_ld = out, .pre_ld = out, .lines = KERN_VEC, .n = n};
    if (s->act != KERN_NONE) simd->activate(&a);
    else
        for (size_t m = 0; save && m < KERN_VEC; m++) memcpy(save + m * out, y + m * out, (size_t)n * sizeof *y);
    return KERN_OK;
}

int cpu_vectors(struct kern *k, const struct cpu_layer *layer, void *y, const void *x, int units, void *save_pre) {
    const struct vectors *l = (const struct vectors *)layer;
    struct vectors_call c = {.l = l, .y = y, .x = x, .save_pre = save_pre};
    int tasks = (l->blocks + BLOCKS - 1) / BLOCKS;
    return cpu_run(k, units * tasks, 2.0 * units * KERN_VEC * layer->spec.out * layer->spec.in, vectors_task, &c);
}
