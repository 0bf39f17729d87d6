// SPDX-License-Identifier: MIT
/*
 * Fixed-step explicit Runge-Kutta as programs over columns.
 *
 * After stage i the drift k_i = v.x*in + v.f*F exists only as the pair (in, F), so everything that needs it is formed at once, in
 * the assignments of that evaluation: k_i itself if a later stage wants it again, and the next stage's input (or the new state).
 * That is two assignments at most, whatever the method. Tableaus are torchdiffeq's: "rk4" is the 3/8 rule, "heun" its heun2.
 */
#include "core/diffusion/solver.h"

#include <stddef.h>

const struct tableau ode_euler = { .stages = 1, .b = { 1 } };
const struct tableau ode_heun = { .stages = 2, .c = { 0, 1 }, .a = { { 0 }, { 1 } }, .b = { 0.5, 0.5 } };
static const struct tableau midpoint = { .stages = 2, .c = { 0, 0.5 }, .a = { { 0 }, { 0.5 } }, .b = { 0, 1 } };
static const struct tableau rk4 = {
    .stages = 4,
    .c = { 0, 1.0 / 3, 2.0 / 3, 1 },
    .a = { { 0 }, { 1.0 / 3 }, { -1.0 / 3, 1 }, { 1, -1, 1 } },
    .b = { 1.0 / 8, 3.0 / 8, 3.0 / 8, 1.0 / 8 },
};

static const struct tableau *tableau_of(enum sampler_method m) {
    switch (m) {
    case METHOD_EULER: return &ode_euler;
    case METHOD_HEUN: return &ode_heun;
    case METHOD_MIDPOINT: return &midpoint;
    case METHOD_RK4: return &rk4;
    default: return NULL;
    }
}

int ode_stages(enum sampler_method m) {
    const struct tableau *tab = tableau_of(m);
    return tab ? tab->stages : 0;
}

void ode_combine(struct sampler_step *out, int dst, double h, const double *w, int i, const struct lin *now) {
    struct sampler_assign *as = sampler_assign_to(out, dst);
    as->c[SAMPLER_X] = 1;
    for (int j = 0; j <= i; j++) {
        if (j == i && now) {
            as->c[out->in] += h * w[j] * now->x;
            as->c_out = h * w[j] * now->f;
        } else {
            as->c[COL_K(j)] += h * w[j];
        }
    }
}

static bool wanted_later(const struct tableau *tab, int i) {
    if (i + 1 < tab->stages && tab->b[i] != 0) return true;
    for (int j = i + 2; j < tab->stages; j++)
        if (tab->a[j][i] != 0) return true;
    return false;
}

void ode_stage(struct sampler_step *out, const struct tableau *tab, int i, double h, const struct lin *now) {
    bool final = i + 1 == tab->stages;
    if (wanted_later(tab, i)) {
        struct sampler_assign *k = sampler_assign_to(out, COL_K(i));
        k->c[out->in] = now->x;
        k->c_out = now->f;
    }
    ode_combine(out, final ? SAMPLER_X : COL_Y, h, final ? tab->b : tab->a[i + 1], i, now);
}

int ode_next(struct sampler *s, struct sampler_step *out) {
    if (s->step == s->spec.steps) return 0;
    const struct tableau *tab = tableau_of(s->spec.method);
    double t = sampler_grid(s, s->step, s->spec.steps), t_next = sampler_grid(s, s->step + 1, s->spec.steps);
    double c = tab->c[s->stage], h = t_next - t;
    struct convert_at at;
    sampler_ask(s, out, s->stage ? COL_Y : SAMPLER_X, c == 1 ? t_next : t + c * h, &at);
    ode_stage(out, tab, s->stage, h, &at.velocity);
    s->t = t;
    s->h = h;
    if (++s->stage == tab->stages) {
        s->stage = 0;
        s->step++;
    }
    return 1;
}
