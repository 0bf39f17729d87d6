// SPDX-License-Identifier: MIT
/*
 * Convolutions on oneDNN, channels last.
 *
 * A layer's output is cut, once and for all when it is made, into strips of `lines` whole lines. A strip's task copies the input
 * lines under it, with one line of halo above and below, into the lane's scratch, normalising and activating them on the way
 * (zeros where the picture ends), and runs one oneDNN convolution over them that has no padding above and below. So normalised
 * pictures never exist in memory, every strip runs the same primitive wherever it lies, and there are no seams: the halo is
 * computed from the same numbers on both sides of a cut. The halo's second preparation costs less than a percent of a product
 * with 128 channels. Where nothing is to be prepared and the halo lies inside the picture, the primitive reads the picture
 * itself.
 *
 * KERN_CONV_UP doubles no pixel. Output line 2i sees input lines i-1, i, i and line 2i+1 sees i, i, i+1: a 3x3 convolution of the
 * doubled picture is four 2x2 convolutions of the picture itself, one for each parity of line and column, whose taps are sums of
 * the 3x3 taps. That is 4/9 of the products and a quarter of the reading.
 *
 * oneDNN's own cache shares primitives between layers of equal shape; weights are reordered once. Executions allocate nothing.
 */
#include <stdlib.h>

#include "kernels/cpu/picture.h"

#define STRIP_FLOATS (96 << 10) // input of a strip, about: half of a second-level cache with what goes with it
#define MOST_LINES 16

enum { PHASES = 4 };

struct cpu_conv {
    struct kern_conv_spec spec;
    int lines, strips, last; // output lines (UP: input lines) a strip, of the last strip
    int out_w;               // columns that a primitive writes
    int phases, columns;     // 4 and 2 for UP, else 1
    struct prim prim[2][2];  // [parity of the column][is the last strip]; the second only where last != lines
    void
        *weights[PHASES][2]; // [parity of line*2 + parity of column][is the last strip], the second only where its layout differs
    float *bias;
    size_t staged_bytes, phase_bytes; // of scratch; oneDNN's own lies behind
};

/* ---- making ---- */

static int lines_in(const struct kern_conv_spec *s, int lines) { // input lines that a primitive reads
    return s->kind == KERN_CONV_DOWN ? 2 * lines + 1 : s->kind == KERN_CONV_UP ? lines + 1 : lines + s->side - 1;
}

static void cut(struct cpu_conv *l) {
    const struct kern_conv_spec *s = &l->spec;
    int H, W, lines = MOST_LINES;
    kern_conv_out(s, &H, &W);
    if (s->kind == KERN_CONV_UP) H = s->height, W = s->width;
    while (lines > 1 && (lines > H || (lines > 2 && (int64_t)lines * s->width * s->in > STRIP_FLOATS))) lines /= 2;
    l->lines = lines;
    l->strips = (H + lines - 1) / lines;
    l->last = H - (l->strips - 1) * lines;
    l->out_w = W;
    l->phases = s->kind == KERN_CONV_UP ? PHASES : 1;
    l->columns = s->kind == KERN_CONV_UP ? 2 : 1;
    size_t staged = (size_t)(lines_in(s, lines) + (s->kind == KERN_CONV_UP)) * (size_t)s->width * (size_t)s->in;
    l->staged_bytes = kern_alloc_size(staged * sizeof(float));
    if (s->kind == KERN_CONV_UP) l->phase_bytes = kern_alloc_size((size_t)lines * (size_t)W * (size_t)s->out * sizeof(float));
}

static int make_prim(struct prim *p, const struct cpu_conv *l, const struct cpu *cpu, int lines, int column) {
    const struct kern_conv_spec *s = &l->spec;
    int side = s->kind == KERN_CONV_UP ? 2 : s->side, step = s->kind == KERN_CONV_DOWN ? 2 : 1;
    int left = s->kind == KERN_CONV_UP ? !column : s->kind == KERN_CONV_DOWN ? 0 : s->side / 2;
    int right = s->kind == KERN_CONV_UP ? column : s->kind == KERN_CONV_DOWN ? 1 : s->side / 2;
    dnnl_dims_t src = {1, s->in, lines_in(s, lines), s->width}, weights = {s->out, s->in, side, side}, bias = {s->out},
                dst = {1, s->out, lines, l->out_w};
    dnnl_dims_t strides = {step, step}, before = {0, left}, after = {0, right};
    dnnl_convolution_desc_t desc;
    dnnl_status_t st = dnnl_memory_desc_init_by_tag(&p->desc[PRIM_SRC], 4, src, dnnl_f32, dnnl_nhwc);
    if (st == dnnl_success) st = dnnl_memory_desc_init_by_tag(&p->desc[PRIM_WEIGHTS], 4, weights, dnnl_f32, dnnl_format_tag_any);
    if (st == dnnl_success) st = dnnl_memory_desc_init_by_tag(&p->desc[PRIM_BIAS], 1, bias, dnnl_f32, dnnl_x);
    if (st == dnnl_success) st = dnnl_memory_desc_init_by_tag(&p->desc[PRIM_DST], 4, dst, dnnl_f32, dnnl_nhwc);
    if (st == dnnl_success)
        st = dnnl_convolution_forward_desc_init(&desc, dnnl_forward_inference, dnnl_convolution_direct, &p->desc[PRIM_SRC],
                                                &p->desc[PRIM_WEIGHTS], &p->desc[PRIM_BIAS], &p->desc[PRIM_DST], strides, before,
                                                after);
    if (st != dnnl_success) return KERN_EDEVICE;
    p->bias = true;
    return prim_init(p, cpu, &desc, s->add && s->kind != KERN_CONV_UP);
}

static int make_prims(struct kern *k, struct cpu_conv *l) {
    struct cpu *cpu = LANE(k)->cpu;
    size_t pad = 0;
    int rc = KERN_OK;
    for (int c = 0; c < l->columns && rc >= 0; c++)
        for (int last = 0; last <= (l->last != l->lines) && rc >= 0; last++) {
            rc = make_prim(&l->prim[c][last], l, cpu, last ? l->last : l->lines, c);
            if (l->prim[c][last].pad_bytes > pad) pad = l->prim[c][last].pad_bytes;
        }
    return rc >= 0 ? cpu_reserve(k, l->staged_bytes + l->phase_bytes + pad) : rc;
}

// The 2x2 taps of one parity: tap 0 of an even line is the line above alone, tap 1 the two that fall on its own line; of an odd
// line the other way round.
static void sum_taps(float *dst, const float *w, size_t filters, int py, int px) {
    for (size_t f = 0; f < filters; f++, w += 9, dst += 4) {
        double sum[4] = {0};
        for (int i = 0; i < 3; i++)
            for (int j = 0; j < 3; j++) sum[(py ? i == 2 : i >= 1) * 2 + (px ? j == 2 : j >= 1)] += (double)w[i * 3 + j];
        for (int t = 0; t < 4; t++) dst[t] = (float)sum[t];
    }
}

// w [out, in, side, side] to the layout of the primitive; *out is the caller's to free
static int reorder(struct lane *lane, const struct prim *p, float *w, void **out) {
    dnnl_engine_t engine = lane->cpu->engine;
    const dnnl_memory_desc_t *to_desc = &p->desc[PRIM_WEIGHTS];
    size_t size = kern_alloc_size(dnnl_memory_desc_get_size(to_desc));
    dnnl_memory_desc_t plain;
    dnnl_memory_t from = NULL, to = NULL;
    dnnl_primitive_desc_t pd = NULL;
    dnnl_primitive_t run = NULL;
    *out = aligned_alloc(64, size);
    if (!*out) return KERN_ENOMEM;
    memset(*out, 0, size);
    dnnl_status_t st = dnnl_memory_desc_init_by_tag(&plain, 4, to_desc->dims, dnnl_f32, dnnl_oihw);
    if (st == dnnl_success) st = dnnl_memory_create(&from, &plain, engine, w);
    if (st == dnnl_success) st = dnnl_memory_create(&to, to_desc, engine, *out);
    if (st == dnnl_success) st = dnnl_reorder_primitive_desc_create(&pd, &plain, engine, to_desc, engine, NULL);
    if (st == dnnl_success) st = dnnl_primitive_create(&run, pd);
    dnnl_exec_arg_t args[] = {{DNNL_ARG_FROM, from}, {DNNL_ARG_TO, to}};
    if (st == dnnl_success) st = dnnl_primitive_execute(run, lane->stream, 2, args);
    if (run) dnnl_primitive_destroy(run);
    if (pd) dnnl_primitive_desc_destroy(pd);
    if (from) dnnl_memory_destroy(from);
    if (to) dnnl_memory_destroy(to);
    return st == dnnl_success ? KERN_OK : st == dnnl_out_of_memory ? KERN_ENOMEM : KERN_EDEVICE;
}

struct loading {
    struct cpu_conv *l;
    const float *w;
};

static int load_phase(struct lane *lane, int phase, void *arg) {
    struct cpu_conv *l = ((struct loading *)arg)->l;
    const struct kern_conv_spec *s = &l->spec;
    const struct prim *p = l->prim[phase % l->columns];
    size_t filters = (size_t)s->out * (size_t)s->in, taps = s->kind == KERN_CONV_UP ? 4 : (size_t)(s->side * s->side);
    float *w = malloc(filters * taps * sizeof *w);
    int rc = w ? KERN_OK : KERN_ENOMEM;
    if (w && s->kind == KERN_CONV_UP) sum_taps(w, ((struct loading *)arg)->w, filters, phase / 2, phase % 2);
    else if (w) memcpy(w, ((struct loading *)arg)->w, filters * taps * sizeof *w);
    if (rc >= 0) rc = reorder(lane, &p[0], w, &l->weights[phase][0]);
    if (rc >= 0 && p[1].run && !dnnl_memory_desc_equal(&p[0].desc[PRIM_WEIGHTS], &p[1].desc[PRIM_WEIGHTS]))
        rc = reorder(lane, &p[1], w, &l->weights[phase][1]);
    free(w);
    return rc;
}

void cpu_conv_free(struct kern *k, struct kern_conv *opaque) {
    struct cpu_conv *l = (struct cpu_conv *)opaque;
    if (!l) return;
    for (int i = 0; i < 4; i++) prim_deinit(&l->prim[i / 2][i % 2], LANE(k)->cpu);
    for (int i = 0; i < PHASES * 2; i++) free(l->weights[i / 2][i % 2]);
    free(l->bias);
    free(l);
}

int cpu_conv_new(struct kern *k, const struct kern_conv_spec *s, const float *w, const float *b, struct kern_conv **out) {
    *out = NULL;
    int rc = kern_check_conv(k, s);
    if (rc < 0) return rc;
    struct cpu_conv *l = calloc(1, sizeof *l);
    if (!l) return kern_fail(k, KERN_ENOMEM, "out of memory for a convolution from %d to %d channels", s->in, s->out);
    l->spec = *s;
    l->bias = calloc((size_t)s->out, sizeof *l->bias);
    if (l->bias && b) memcpy(l->bias, b, (size_t)s->out * sizeof *b);
    rc = l->bias ? KERN_OK : KERN_ENOMEM;
    cut(l);
    int was = cpu_omp_single(1); // primitives are made for the number of threads that this thread's OpenMP would use
    if (rc >= 0) rc = make_prims(k, l);
    cpu_omp_single(was);
    if (rc >= 0) rc = cpu_run(k, l->phases, CPU_WORTH_SHARING, load_phase, &(struct loading){l, w});
    if (rc >= 0) return *out = (struct kern_conv *)l, KERN_OK;
    cpu_conv_free(k, (struct kern_conv *)l);
    const char *why = rc == KERN_ENOMEM         ? "out of memory for"
                      : rc == KERN_EUNSUPPORTED ? "oneDNN does not support"
                                                : "oneDNN failed to make";
    return kern_fail(k, rc, "%s a convolution from %d to %d channels of %d x %d pixels", why, s->in, s->out, s->height, s->width);
}

/* ---- running ---- */

struct conv_call {
    const struct cpu_conv *l;
    const struct picture_simd *simd;
    float *y;
    const float *x, *coef;
    int first, n;
    size_t x_count, y_count; // floats of a picture
};

// Input lines [from, from + n) of a picture, prepared, zeros outside of it
static const float *stage(const struct conv_call *c, size_t picture, float *scratch, int from, int n) {
    const struct kern_conv_spec *s = &c->l->spec;
    size_t line = (size_t)s->width * (size_t)s->in;
    bool plain = !s->norm && s->act == KERN_NONE;
    const float *x = c->x + picture * c->x_count, *coef = s->norm ? c->coef + picture * 2 * (size_t)s->in : NULL;
    if (plain && from >= 0 && from + n <= s->height) return x + (size_t)from * line;
    for (int i = 0; i < n; i++) {
        float *to = scratch + (size_t)i * line;
        if (from + i < 0 || from + i >= s->height) memset(to, 0, line * sizeof *to);
        else
            c->simd->prepare(to, x + (size_t)(from + i) * line, coef, (size_t)s->width, s->in, s->act == KERN_SILU);
    }
    return scratch;
}

// One parity's pixels to their places: every second line and column of y
static void scatter(float *y, const float *from, int lines, int W, size_t C, bool add) {
    for (int i = 0; i < lines; i++)
        for (int j = 0; j < W; j++, from += C) {
            float *to = y + ((size_t)i * 2 * (size_t)W + (size_t)j) * 2 * C;
            if (!add) memcpy(to, from, C * sizeof *to);
            else
                for (size_t n = 0; n < C; n++) to[n] += from[n];
        }
}

static int conv_task(struct lane *lane, int task, void *arg) {
    const struct conv_call *c = arg;
    const struct cpu_conv *l = c->l;
    const struct kern_conv_spec *s = &l->spec;
    int strip = c->first + task % c->n, line = strip * l->lines, last = strip == l->strips - 1 && l->last != l->lines,
        lines = last ? l->last : l->lines;
    int from = s->kind == KERN_CONV_DOWN ? 2 * line : line - s->side / 2;
    size_t picture = (size_t)(task / c->n);
    char *scratch = lane->scratch;
    const float *x = stage(c, picture, lane->scratch, from, lines_in(s, lines) + (s->kind == KERN_CONV_UP));
    void *pad = scratch + l->staged_bytes + l->phase_bytes;
    if (s->kind != KERN_CONV_UP) {
        float *y = c->y + picture * c->y_count + (size_t)line * (size_t)l->out_w * (size_t)s->out;
        return prim_run(&l->prim[0][last], lane, x, l->weights[0][last && l->weights[0][1]], l->bias, y, pad);
    }
    float *phase = (float *)(void *)(scratch + l->staged_bytes);
    for (int p = 0; p < PHASES; p++) {
        const void *w = l->weights[p][last && l->weights[p][1]];
        const float *src = x + (size_t)(p / 2) * (size_t)s->width * (size_t)s->in;
        int rc = prim_run(&l->prim[p % 2][last], lane, src, w, l->bias, phase, pad);
        if (rc < 0) return rc;
        size_t at = picture * c->y_count + ((size_t)(2 * line + p / 2) * 2 * (size_t)l->out_w + (size_t)(p % 2)) * (size_t)s->out;
        scatter(c->y + at, phase, lines, l->out_w, (size_t)s->out, s->add);
    }
    return KERN_OK;
}

int cpu_conv_strips(struct kern *k, const struct kern_conv *l) {
    (void)k;
    return ((const struct cpu_conv *)l)->strips;
}

int cpu_conv(struct kern *k, const struct kern_conv *opaque, void *y, const void *x, const float *coef, int pictures, int first,
             int n) {
    const struct cpu_conv *l = (const struct cpu_conv *)opaque;
    const struct kern_conv_spec *s = &l->spec;
    int H, W;
    kern_conv_out(s, &H, &W);
    struct conv_call c = {.l = l,
                          .simd = cpu_picture_simd(LANE(k)->cpu),
                          .y = y,
                          .x = x,
                          .coef = coef,
                          .first = first,
                          .n = n,
                          .x_count = (size_t)s->height * (size_t)s->width * (size_t)s->in,
                          .y_count = (size_t)H * (size_t)W * (size_t)s->out};
    // always on the pool: the owner's thread, whose OpenMP may use many threads, never calls oneDNN's products itself
    return cpu_run(k, n * pictures, CPU_WORTH_SHARING, conv_task, &c);
}
