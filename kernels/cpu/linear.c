// SPDX-License-Identifier: MIT
/*
 * Linear layers on oneDNN.
 *
 * A layer's work is cut, once and for all when it is made, into tasks of `chunk` lines by one panel of outputs. Each task is one
 * execution of a oneDNN matmul whose M, N and K are constants, on one thread: that is what makes a line's result independent of
 * how many lines there are and where it stands, on every processor (with a run-time M, or with several threads inside a product,
 * it is not). The same tasks run whether a row is walked by one thread or shared by all.
 *
 * The bias is oneDNN's; the activation is our own pass over the panel while it is in cache. It costs what oneDNN's fused
 * tanh-GELU costs (64 x 192 x 768 on one Zen 4 core: 100 against 96 GFLOP/s in float32, 165 against 170 in bfloat16), and with it
 * the value before the activation can be saved without taking another path, and the activation is the same code in every layer.
 *
 * Layers of equal shape share a `struct shape`: primitives and, for each lane, the memory objects that point them at their
 * operands (an object's pointer is set before each execution, so lanes need their own). Executions allocate nothing of ours;
 * scratch is reserved when a layer is made.
 */
#include "kernels/cpu/cpu.h"

#include <stdlib.h>

#include "kernels/cpu/simd.h"
#include "kernels/ref/ref.h"

enum { SRC, DST, BIAS, PAD, PLAIN, REORDER_PAD, OPERANDS }; // a lane's memory objects; PAD is oneDNN's scratchpad

struct part { // panels of one width: all but the last, or the last
    int width;
    dnnl_primitive_t product, reorder;
    dnnl_memory_desc_t weights;
    dnnl_memory_t (*operands)[OPERANDS]; // [lanes]
};

struct shape {
    struct shape *next;
    int refs;
    int out, in, chunk;
    dnnl_data_type_t x, mul, dst; // types of the given input, of the factors, of what the product writes
    size_t dst_ld;                // elements: out where it writes into y, else a panel's width (dense, in scratch)
    int panels, width;            // the last panel may be narrower
    struct part part[2];
    size_t converted_bytes, pre_bytes, pad_bytes; // of scratch, in this order
    size_t reorder_bytes;                         // of scratch, while weights are loaded
};

struct cpu_linear {
    struct cpu_layer layer;
    struct shape *shape;
    dnnl_memory_t *weights; // [panels]
    void **blobs;           // [panels] their bytes
    float *bias;            // [out]
};

#define TRY_DNNL(call)                                                                                                           \
    do {                                                                                                                         \
        if ((call) != dnnl_success) return KERN_EDEVICE;                                                                         \
    } while (0)

/* ---- how a layer is cut: by its sizes only ---- */

static int chunk_lines(int unit, bool bf16) {
    enum { MOST = 64, LEAST = 16 };
    if (unit == KERN_VEC && !bf16) return 1; // lines of different rows: see vectors.c, which does not run on this processor
    for (int c = unit <= MOST ? unit / 2 : MOST; c >= LEAST; c--)
        if (unit % c == 0) return c;
    return unit;
}

// Short sums (small `in`) want whole lines: writing part of a line costs oneDNN up to 30 % there (64 x 192 x 576 in bfloat16: 230
// GFLOP/s whole, 206 in halves, 169 in panels of 64). Long ones do not mind.
static int panel_width(int out, int in) {
    static const int widths[] = {384, 320, 288, 256, 224, 192};
    if (out < 768 || in < 512) return out < 4096 ? out : 4096;
    for (size_t i = 0; i < sizeof widths / sizeof *widths; i++)
        if (out % widths[i] == 0) return widths[i];
    return 384;
}

/* ---- shapes ---- */

// From a panel of float32 weights [width, in] to the layout and type that the product chose
static dnnl_status_t part_reorder(struct part *p, const struct shape *s, dnnl_engine_t engine, dnnl_primitive_attr_t attr,
                                  dnnl_memory_desc_t d[OPERANDS]) {
    dnnl_dims_t dims = {s->in, p->width}, strides = {1, s->in};
    dnnl_primitive_desc_t pd = NULL;
    dnnl_status_t st = dnnl_memory_desc_init_by_strides(&d[PLAIN], 2, dims, dnnl_f32, strides);
    if (st == dnnl_success) st = dnnl_reorder_primitive_desc_create(&pd, &d[PLAIN], engine, &p->weights, engine, attr);
    if (st == dnnl_success) {
        d[REORDER_PAD] = *dnnl_primitive_desc_query_md(pd, dnnl_query_scratchpad_md, 0);
        st = dnnl_primitive_create(&p->reorder, pd);
        dnnl_primitive_desc_destroy(pd);
    }
    return st;
}

// All primitives are made here, on the owner's thread; pool threads only execute them
static int part_primitive(struct part *p, const struct shape *s, dnnl_engine_t engine, dnnl_memory_desc_t d[OPERANDS]) {
    dnnl_dims_t sd = {s->chunk, s->in}, wd = {s->in, p->width}, bd = {1, p->width}, dd = {s->chunk, p->width};
    dnnl_dims_t ss = {s->in, 1}, bs = {p->width, 1}, ds = {(dnnl_dim_t)s->dst_ld, 1};
    dnnl_memory_desc_t any;
    dnnl_matmul_desc_t desc;
    dnnl_primitive_attr_t attr = NULL;
    dnnl_primitive_desc_t pd = NULL;
    TRY_DNNL(dnnl_memory_desc_init_by_strides(&d[SRC], 2, sd, s->mul, ss));
    TRY_DNNL(dnnl_memory_desc_init_by_tag(&any, 2, wd, s->mul, dnnl_format_tag_any));
    TRY_DNNL(dnnl_memory_desc_init_by_strides(&d[BIAS], 2, bd, dnnl_f32, bs));
    TRY_DNNL(dnnl_memory_desc_init_by_strides(&d[DST], 2, dd, s->dst, ds));
    TRY_DNNL(dnnl_matmul_desc_init(&desc, &d[SRC], &any, &d[BIAS], &d[DST]));
    dnnl_status_t st = dnnl_primitive_attr_create(&attr);
    if (st == dnnl_success) st = dnnl_primitive_attr_set_scratchpad_mode(attr, dnnl_scratchpad_mode_user);
    if (st == dnnl_success) st = dnnl_primitive_desc_create(&pd, &desc, attr, engine, NULL);
    if (st == dnnl_success) {
        p->weights = *dnnl_primitive_desc_query_md(pd, dnnl_query_weights_md, 0);
        d[PAD] = *dnnl_primitive_desc_query_md(pd, dnnl_query_scratchpad_md, 0);
        st = dnnl_primitive_create(&p->product, pd);
    }
    if (pd) dnnl_primitive_desc_destroy(pd);
    if (st == dnnl_success) st = part_reorder(p, s, engine, attr, d);
    if (attr) dnnl_primitive_attr_destroy(attr);
    return st == dnnl_success         ? KERN_OK
           : st == dnnl_out_of_memory ? KERN_ENOMEM
           : st == dnnl_unimplemented ? KERN_EUNSUPPORTED
                                      : KERN_EDEVICE;
}

static int part_init(struct part *p, struct shape *s, const struct cpu *cpu) {
    dnnl_memory_desc_t d[OPERANDS];
    int lanes = cpu->threads + 1, rc = part_primitive(p, s, cpu->engine, d);
    if (rc < 0) return rc;
    p->operands = calloc((size_t)lanes, sizeof *p->operands);
    if (!p->operands) return KERN_ENOMEM;
    for (int i = 0; i < lanes; i++)
        for (int o = 0; o < OPERANDS; o++)
            if (dnnl_memory_create(&p->operands[i][o], &d[o], cpu->engine, DNNL_MEMORY_NONE) != dnnl_success) return KERN_ENOMEM;
    size_t pad = dnnl_memory_desc_get_size(&d[PAD]), reorder_pad = dnnl_memory_desc_get_size(&d[REORDER_PAD]);
    if (pad > s->pad_bytes) s->pad_bytes = pad;
    if (reorder_pad > s->reorder_bytes) s->reorder_bytes = reorder_pad;
    return KERN_OK;
}

static void part_deinit(struct part *p, int lanes) {
    for (int i = 0; p->operands && i < lanes; i++)
        for (int o = 0; o < OPERANDS; o++)
            if (p->operands[i][o]) dnnl_memory_destroy(p->operands[i][o]);
    free(p->operands);
    if (p->product) dnnl_primitive_destroy(p->product);
    if (p->reorder) dnnl_primitive_destroy(p->reorder);
}

static void shape_release(struct cpu *cpu, struct shape *s) {
    if (!s || --s->refs > 0) return;
    for (struct shape **at = &cpu->shapes; *at; at = &(*at)->next)
        if (*at == s) {
            *at = s->next;
            break;
        }
    part_deinit(&s->part[0], cpu->threads + 1);
    part_deinit(&s->part[1], cpu->threads + 1);
    free(s);
}

static dnnl_data_type_t data_type(enum kern_dtype t) { return t == KERN_F32 ? dnnl_f32 : dnnl_bf16; }
static size_t type_size(dnnl_data_type_t t) { return t == dnnl_f32 ? 4 : 2; }

static struct shape shape_of(enum kern_dtype act, const struct kern_linear_spec *spec) {
    struct shape s = {.refs = 1, .out = spec->out, .in = spec->in};
    enum kern_dtype mul = spec->x_f32 && spec->y_f32 ? KERN_F32 : act, y = spec->y_f32 ? KERN_F32 : act;
    bool through_scratch = spec->act != KERN_NONE && y != KERN_F32; // the activation wants float32
    s.x = data_type(spec->x_f32 ? KERN_F32 : act);
    s.mul = data_type(mul);
    s.dst = through_scratch ? dnnl_f32 : data_type(y);
    s.chunk = chunk_lines(spec->unit, mul == KERN_BF16);
    s.width = panel_width(spec->out, spec->in);
    s.panels = (s.out + s.width - 1) / s.width;
    s.dst_ld = (size_t)(through_scratch ? s.width : s.out);
    if (s.x != s.mul) s.converted_bytes = kern_alloc_size((size_t)s.chunk * (size_t)s.in * type_size(s.mul));
    if (through_scratch) s.pre_bytes = kern_alloc_size((size_t)s.chunk * (size_t)s.width * 4);
    return s;
}

static bool same_shape(const struct shape *a, const struct shape *b) {
    return a->out == b->out && a->in == b->in && a->chunk == b->chunk && a->x == b->x && a->mul == b->mul && a->dst == b->dst &&
           a->dst_ld == b->dst_ld && a->pre_bytes == b->pre_bytes;
}

static int shape_get(struct kern *k, const struct kern_linear_spec *spec, struct shape **out) {
    struct cpu *cpu = LANE(k)->cpu;
    struct shape want = shape_of(k->act, spec), *s;
    for (s = cpu->shapes; s; s = s->next)
        if (same_shape(s, &want)) return s->refs++, *out = s, KERN_OK;
    s = malloc(sizeof *s);
    if (!s) return KERN_ENOMEM;
    *s = want;
    int last = s->out - (s->panels - 1) * s->width;
    s->part[0].width = s->width;
    s->part[1].width = last;
    int rc = part_init(&s->part[0], s, cpu);
    if (rc >= 0 && last != s->width) rc = part_init(&s->part[1], s, cpu);
    if (rc >= 0) rc = cpu_reserve(k, s->converted_bytes + s->pre_bytes + s->pad_bytes);
    if (rc >= 0) rc = cpu_reserve(k, s->reorder_bytes);
    if (rc < 0) return shape_release(cpu, s), rc;
    s->next = cpu->shapes;
    cpu->shapes = s;
    *out = s;
    return KERN_OK;
}

static struct part *panel_part(struct shape *s, int panel) { return &s->part[panel == s->panels - 1 && s->part[1].product]; }

/* ---- layers ---- */

struct loading {
    struct cpu_linear *l;
    const void *w;
};

// Task: one panel's weights, reordered; converted to float32 before that if they are not
static int load_panel(struct lane *lane, int panel, void *arg) {
    struct loading *job = arg;
    struct cpu_linear *l = job->l;
    const struct part *p = panel_part(l->shape, panel);
    const dnnl_memory_t *o = p->operands[lane->id];
    size_t in = (size_t)l->layer.spec.in, first = (size_t)panel * (size_t)l->shape->width * in, count = (size_t)p->width * in;
    float *converted = NULL;
    const float *w = (const float *)job->w + first;
    if (l->layer.spec.w_store != KERN_F32) {
        w = converted = malloc(count * sizeof *w);
        for (size_t i = 0; w && i < count; i++) converted[i] = kern_load(l->layer.spec.w_store, job->w, first + i);
    }
    dnnl_status_t st = w ? dnnl_success : dnnl_out_of_memory;
    if (st == dnnl_success) st = dnnl_memory_set_data_handle(o[PLAIN], (void *)w);
    if (st == dnnl_success) st = dnnl_memory_set_data_handle(o[REORDER_PAD], lane->scratch);
    dnnl_exec_arg_t args[] = {{DNNL_ARG_FROM, o[PLAIN]}, {DNNL_ARG_TO, l->weights[panel]}, {DNNL_ARG_SCRATCHPAD, o[REORDER_PAD]}};
    if (st == dnnl_success) st = dnnl_primitive_execute(p->reorder, lane->stream, 3, args);
    free(converted);
    if (st == dnnl_success) return KERN_OK;
    return kern_fail(&lane->kern, st == dnnl_out_of_memory ? KERN_ENOMEM : KERN_EDEVICE, "oneDNN status %d", (int)st);
}

// At least CPU_WORTH_SHARING: the owner's thread, whose OpenMP may use many threads, never calls oneDNN's products itself
static double shared(double work) { return work > CPU_WORTH_SHARING ? work : CPU_WORTH_SHARING; }

static int load(struct kern *k, struct cpu_linear *l, const void *w, const float *b) {
    if (b) memcpy(l->bias, b, (size_t)l->layer.spec.out * sizeof(float));
    return cpu_run(k, l->shape->panels, CPU_WORTH_SHARING, load_panel, &(struct loading){l, w});
}

// Memory for the weights
static int make_room(struct cpu_linear *l, dnnl_engine_t engine) {
    size_t panels = (size_t)l->shape->panels;
    l->weights = calloc(panels, sizeof(dnnl_memory_t));
    l->blobs = calloc(panels, sizeof(void *));
    l->bias = calloc((size_t)l->layer.spec.out, sizeof(float));
    if (!l->weights || !l->blobs || !l->bias) return KERN_ENOMEM;
    for (int i = 0; i < l->shape->panels; i++) {
        const dnnl_memory_desc_t *d = &panel_part(l->shape, i)->weights;
        size_t size = kern_alloc_size(dnnl_memory_desc_get_size(d));
        l->blobs[i] = aligned_alloc(64, size);
        if (!l->blobs[i]) return KERN_ENOMEM;
        memset(l->blobs[i], 0, size);
        if (dnnl_memory_create(&l->weights[i], d, engine, l->blobs[i]) != dnnl_success) return KERN_ENOMEM;
    }
    return KERN_OK;
}

void cpu_linear_free(struct kern *k, struct kern_linear *opaque) {
    struct cpu_linear *l = (struct cpu_linear *)opaque;
    if (!l) return;
    if (l->layer.own) return cpu_vectors_free(&l->layer);
    for (int i = 0; l->shape && i < l->shape->panels; i++) {
        if (l->weights && l->weights[i]) dnnl_memory_destroy(l->weights[i]);
        if (l->blobs) free(l->blobs[i]);
    }
    shape_release(LANE(k)->cpu, l->shape);
    free(l->weights);
    free(l->blobs);
    free(l->bias);
    free(l);
}

int cpu_linear_new(struct kern *k, const struct kern_linear_spec *spec, const void *w, const float *b, struct kern_linear **out) {
    *out = NULL;
    int rc = kern_check_linear(k, spec);
    if (rc < 0) return rc;
    if (cpu_vectors_suit(k, spec)) return cpu_vectors_new(k, spec, w, b, out);
    struct cpu_linear *l = calloc(1, sizeof *l);
    if (!l) return kern_fail(k, KERN_ENOMEM, "out of memory for a linear layer of %d x %d", spec->out, spec->in);
    l->layer.spec = *spec;
    int was = cpu_omp_single(1); // primitives are made for the number of threads that this thread's OpenMP would use
    rc = shape_get(k, spec, &l->shape);
    cpu_omp_single(was);
    if (rc >= 0) rc = make_room(l, LANE(k)->cpu->engine);
    if (rc >= 0) rc = load(k, l, w, b);
    if (rc >= 0) return *out = (struct kern_linear *)l, KERN_OK;
    cpu_linear_free(k, (struct kern_linear *)l);
    const char *why = rc == KERN_ENOMEM         ? "out of memory for"
                      : rc == KERN_EUNSUPPORTED ? "oneDNN does not support"
                                                : "oneDNN failed to make";
    return kern_fail(k, rc, "%s a linear layer of %d x %d in units of %d", why, spec->out, spec->in, spec->unit);
}

int cpu_linear_wrap(struct kern *k, const struct kern_linear_spec *spec, const float *w, const float *b,
                    struct kern_linear **out) {
    int rc = cpu_linear_new(k, spec, w, b, out);
    if (rc < 0) return rc;
    ((struct cpu_layer *)*out)->w = w;
    ((struct cpu_layer *)*out)->b = b;
    return KERN_OK;
}

int cpu_linear_refresh(struct kern *k, struct kern_linear *opaque) {
    struct cpu_layer *l = (struct cpu_layer *)opaque;
    return l->own ? cpu_vectors_load(k, l, l->w, l->b) : load(k, (struct cpu_linear *)l, l->w, l->b);
}

struct linear_call {
    const struct cpu_linear *l;
    char *y, *save_pre;
    const char *x;
};

static void to_bf16(const struct cpu *cpu, uint16_t *dst, const float *src, size_t n) {
    if (cpu->simd) cpu->simd->to_bf16(dst, src, n);
    else
        for (size_t i = 0; i < n; i++) dst[i] = kern_f32_to_bf16(src[i]);
}

static void activate_plainly(const struct simd_activate *a) {
    for (size_t m = 0; m < (size_t)a->lines; m++)
        for (size_t i = 0; i < (size_t)a->n; i++) {
            float u = a->pre[m * a->pre_ld + i];
            if (a->save) kern_store(a->y_type, a->save, m * a->y_ld + i, u);
            kern_store(a->y_type, a->y, m * a->y_ld + i, (float)ref_activation(a->act, (double)u));
        }
}

// After the product: activation, and the saving of what came before it
static void finish_panel(struct lane *lane, const struct linear_call *c, char *y, char *save, const float *pre, int width) {
    const struct shape *s = c->l->shape;
    enum kern_dtype yt = c->l->layer.spec.y_f32 ? KERN_F32 : lane->kern.act;
    size_t out = (size_t)s->out, es = kern_dtype_size(yt);
    if (c->l->layer.spec.act == KERN_NONE) {
        for (size_t m = 0; save && m < (size_t)s->chunk; m++) memcpy(save + m * out * es, y + m * out * es, (size_t)width * es);
        return;
    }
    struct simd_activate a = {
        .act = c->l->layer.spec.act, .y_type = yt, .y = y, .save = save, .y_ld = out, .lines = s->chunk, .n = width};
    a.pre = pre ? pre : (const float *)(const void *)y;
    a.pre_ld = s->dst_ld;
    if (lane->cpu->simd) lane->cpu->simd->activate(&a);
    else activate_plainly(&a);
}

static int linear_task(struct lane *lane, int task, void *arg) {
    const struct linear_call *c = arg;
    struct shape *s = c->l->shape;
    int panel = task % s->panels;
    const struct part *p = panel_part(s, panel);
    size_t line = (size_t)(task / s->panels) * (size_t)s->chunk, col = (size_t)panel * (size_t)s->width;
    size_t at = (line * (size_t)s->out + col) * (c->l->layer.spec.y_f32 ? 4 : kern_dtype_size(lane->kern.act));
    const void *x = c->x + line * (size_t)s->in * type_size(s->x);
    char *scratch = lane->scratch, *y = c->y + at, *save = c->save_pre ? c->save_pre + at : NULL;
    void *pre = s->pre_bytes ? scratch + s->converted_bytes : NULL;
    if (s->x != s->mul) {
        to_bf16(lane->cpu, (uint16_t *)lane->scratch, x, (size_t)s->chunk * (size_t)s->in);
        x = lane->scratch;
    }
    const dnnl_memory_t *o = p->operands[lane->id];
    dnnl_status_t st = dnnl_memory_set_data_handle(o[SRC], (void *)x);
    if (st == dnnl_success) st = dnnl_memory_set_data_handle(o[BIAS], c->l->bias + col);
    if (st == dnnl_success) st = dnnl_memory_set_data_handle(o[DST], pre ? pre : y);
    if (st == dnnl_success) st = dnnl_memory_set_data_handle(o[PAD], scratch + s->converted_bytes + s->pre_bytes);
    dnnl_exec_arg_t args[] = {{DNNL_ARG_SRC, o[SRC]},
                              {DNNL_ARG_WEIGHTS, c->l->weights[panel]},
                              {DNNL_ARG_BIAS, o[BIAS]},
                              {DNNL_ARG_DST, o[DST]},
                              {DNNL_ARG_SCRATCHPAD, o[PAD]}};
    if (st == dnnl_success) st = dnnl_primitive_execute(p->product, lane->stream, 5, args);
    if (st != dnnl_success)
        return kern_fail(&lane->kern, KERN_EDEVICE, "oneDNN matmul %d x %d x %d: status %d", s->chunk, p->width, s->in, (int)st);
    finish_panel(lane, c, y, save, pre, p->width);
    return KERN_OK;
}

int cpu_linear(struct kern *k, const struct kern_linear *opaque, void *y, const void *x, int units, void *save_pre) {
    const struct cpu_linear *l = (const struct cpu_linear *)opaque;
    if (l->layer.own) return cpu_vectors(k, &l->layer, y, x, units, save_pre);
    struct linear_call c = {.l = l, .y = y, .x = x, .save_pre = save_pre};
    int chunks = units * (l->layer.spec.unit / l->shape->chunk);
    double work = 2.0 * units * l->layer.spec.unit * l->layer.spec.out * l->layer.spec.in;
    return cpu_run(k, chunks * l->shape->panels, shared(work), linear_task, &c);
}
