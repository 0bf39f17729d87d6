// SPDX-License-Identifier: MIT
#include "tests/unit/f64_exec.h"

#include <math.h>

#include "core/base/mem.h"
#include "tests/test.h"

static uint64_t mix(uint64_t z) { // splitmix64's finaliser
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

double f64_normal(uint64_t seed, uint32_t draw, int element) {
    uint64_t a = mix(mix(seed + 0x9e3779b97f4a7c15u) + draw * 0xd1342543de82ef95u + (uint64_t)element);
    uint64_t b = mix(a + 0x9e3779b97f4a7c15u);
    double u = ((double)(a >> 11) + 0.5) * 0x1p-53, v = (double)(b >> 11) * 0x1p-53;
    return sqrt(-2 * log(u)) * cos(6.283185307179586 * v);
}

void f64_exec_init(struct f64_exec *x, int n) {
    *x = (struct f64_exec){ .n = n };
    for (int j = 0; j < SAMPLER_COLS; j++) CHECK(x->col[j] = mem_array((size_t)n, sizeof(double)));
}

void f64_exec_deinit(struct f64_exec *x) {
    for (int j = 0; j < SAMPLER_COLS; j++) mem_free(x->col[j]);
}

void f64_exec_set_x(struct f64_exec *x, const double *x0) {
    memcpy(x->col[SAMPLER_X], x0, (size_t)x->n * sizeof(double));
    x->written[SAMPLER_X] = true;
}

void f64_exec_copy(struct f64_exec *dst, const struct f64_exec *src) {
    double *col[SAMPLER_COLS];
    memcpy(col, dst->col, sizeof col);
    *dst = *src;
    memcpy(dst->col, col, sizeof col);
    for (int j = 0; j < SAMPLER_COLS; j++) memcpy(dst->col[j], src->col[j], (size_t)src->n * sizeof(double));
}

static double clamp(double v) { return v < -1 ? -1 : v > 1 ? 1 : v; }

static double combine(const struct f64_exec *x, const double *c, int e) {
    double sum = 0;
    for (int j = 0; j < SAMPLER_COLS; j++) {
        if (c[j] == 0) continue;
        if (!x->written[j]) test_fail(__FILE__, __LINE__, "column %d is read before it was written", j);
        sum += c[j] * x->col[j][e];
    }
    return sum;
}

static void evaluate(struct f64_exec *x, const struct sampler_step *st, double *f) {
    static double in[F64_MAX];
    CHECK(x->written[st->in] && isfinite(st->t) && isfinite(st->in_scale) && x->n <= F64_MAX);
    for (int e = 0; e < x->n; e++) in[e] = st->in_scale * x->col[st->in][e];
    x->net(x->ctx, st, in, f, x->n);
    x->evaluations++;
}

static double noise_of(const struct f64_exec *x, const struct sampler_step *st, const double *f, int e) {
    double z = x->noise ? x->noise[(size_t)(st->draw - 1) * (size_t)x->n + (size_t)e] : f64_normal(x->seed, st->draw, e);
    return st->learned ? z * exp(st->log_lo + (f[x->n + e] + 1) / 2 * st->log_span) : z;
}

static void assign(struct f64_exec *x, const struct sampler_step *st, const double *f) {
    static double fresh[SAMPLER_ASSIGN][F64_MAX];
    CHECK(st->n >= 0 && st->n <= SAMPLER_ASSIGN);
    for (int a = 0; a < st->n; a++) {
        const struct sampler_assign *as = &st->assign[a];
        CHECK(as->dst >= 0 && as->dst < SAMPLER_COLS && (st->evaluate || (as->c_out == 0 && as->c_clip == 0 && !st->learned)));
        for (int b = 0; b < a; b++) CHECK(st->assign[b].dst != as->dst);
        if (as->c_noise != 0) x->last_draw = st->draw;
        for (int e = 0; e < x->n; e++) {
            double y = combine(x, as->c, e);
            if (as->c_out != 0) y += as->c_out * f[e];
            if (as->c_clip != 0) y += as->c_clip * clamp(combine(x, st->clip.c, e) + st->clip.c_out * f[e]);
            if (as->c_noise != 0) y += as->c_noise * noise_of(x, st, f, e);
            CHECK(isfinite(y));
            fresh[a][e] = y;
        }
    }
    for (int a = 0; a < st->n; a++) {
        memcpy(x->col[st->assign[a].dst], fresh[a], (size_t)x->n * sizeof(double));
        x->written[st->assign[a].dst] = true;
    }
}

static double norm(const struct f64_exec *x, const struct sampler_norm *nm) {
    double sum = 0;
    CHECK(x->written[nm->a] && x->written[nm->b]);
    for (int e = 0; e < x->n; e++) {
        double r = combine(x, nm->c, e) / (nm->atol + nm->rtol * fmax(fabs(x->col[nm->a][e]), fabs(x->col[nm->b][e])));
        sum += r * r;
    }
    return sqrt(sum / x->n);
}

int f64_exec_step(struct f64_exec *x, struct sampler *s, struct sampler_step *st, struct err *err) {
    static double f[2 * F64_MAX];
    int rc = sampler_next(s, x->norms_given ? x->norms : NULL, st, err);
    if (rc <= 0) return rc;
    x->steps++;
    if (st->evaluate) evaluate(x, st, f);
    assign(x, st, f);
    for (int i = 0; i < st->norms; i++) x->norms[i] = norm(x, &st->norm[i]);
    x->norms_given = st->norms > 0;
    return 1;
}

int f64_exec_run(struct f64_exec *x, struct sampler *s, struct err *err) {
    struct sampler_step st;
    int rc;
    while ((rc = f64_exec_step(x, s, &st, err)) > 0)
        if (x->steps > 200000) test_fail(__FILE__, __LINE__, "the sampler does not end");
    return rc;
}
