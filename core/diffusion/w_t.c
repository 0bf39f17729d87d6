// SPDX-License-Identifier: MIT
/*
 * The diffusion coefficient D(t) of an SDE, by its many names (SiT paper section 3.3 and table 7; transport/path.py).
 *
 * The paper writes w with dX = [v + (w/2) s] dt + sqrt(w) dW; here, as in its code, D = w/2. Its w_KL is 2V, so "kl" is "sbdm".
 * Its w_KL,eta = w_KL L/(L + 2 eta w_KL^2) becomes D = V/(1 + 8 eta V^2/L), with L(t) the measured loss of the velocity: large
 * eta and a good model make the SDE nearly an ODE where V is large, and D is finite where V is not (0 at t = 0 of linear and
 * GVP).
 *
 * L is known on the model's own path. On another the same network's velocity is wrong by another factor: an error d of x1-hat
 * goes with an error -(A/S) d of e-hat, so the velocity's is d det/S with det = A' S - A S', and L scales by the square of det/S
 * on the sampling path over det/s on the model's, where S/s = k.
 */
#include <math.h>

#include "core/diffusion/solver.h"

static const double pi = 3.14159265358979323846;

double sampler_curve_at(const struct sampler_curve *c, double t) {
    int i = 0;
    while (i < c->n && c->t[i] <= t) i++;
    if (i == 0) return c->v[0];
    if (i == c->n) return c->v[c->n - 1];
    double u = (t - c->t[i - 1]) / (c->t[i] - c->t[i - 1]);
    return c->v[i - 1] + u * (c->v[i] - c->v[i - 1]);
}

static double determinant(const struct path_at *at) { return at->d_alpha * at->sigma - at->alpha * at->d_sigma; }

static double loss_at(const struct sampler_model *m, const struct path_at *at) {
    if (at->kind == m->path) return sampler_curve_at(&m->loss, at->t);
    struct convert_net net;
    struct path_at home;
    convert_net(m, at->alpha, at->sigma, &net);
    path_eval(m->path, net.t, &home);
    double factor = determinant(at) / (determinant(&home) * net.k);
    return sampler_curve_at(&m->loss, net.t) * factor * factor;
}

// What kl-eta divides V by.
static double damping(const struct sampler_spec *spec, const struct sampler_model *m, const struct path_at *at) {
    return spec->w_t_eta > 0 ? 1 + 8 * spec->w_t_eta * at->var * at->var / loss_at(m, at) : 1;
}

static double kl_eta(const struct sampler_spec *spec, const struct sampler_model *m, const struct path_at *at) {
    if (spec->w_t_eta > 0 && isinf(at->var)) return 0;
    return spec->w_t_scale * at->var / damping(spec, m, at);
}

double w_t_diffusion(const struct sampler_spec *spec, const struct sampler_model *m, const struct path_at *at) {
    double eta = spec->w_t_scale, u;
    switch (spec->w_t) {
    case W_CONSTANT:
        return eta;
    case W_SBDM:
        return eta * at->var;
    case W_SIGMA:
        return eta * at->sigma;
    case W_LINEAR:
        return eta * (1 - at->t);
    case W_DECREASING:
        u = eta * cos(pi * at->t) + 1;
        return 0.25 * u * u;
    case W_KL_ETA:
        return kl_eta(spec, m, at);
    case W_KNOTS:
        return eta * sampler_curve_at(&spec->knots, at->t) / 2;
    default:
        u = sin(pi * at->t);
        return eta * u * u;
    }
}

double w_t_over_sigma(const struct sampler_spec *spec, const struct sampler_model *m, const struct path_at *at) {
    if (spec->w_t == W_SIGMA) return spec->w_t_scale;
    if (at->sigma != 0) return w_t_diffusion(spec, m, at) / at->sigma;
    if (spec->w_t == W_LINEAR) return -spec->w_t_scale / at->d_sigma; // by de l'Hopital; 0 for VP, whose sigma' is infinite
    if (spec->w_t == W_KL_ETA) return spec->w_t_scale * path_var_over_sigma(at) / damping(spec, m, at);
    if (spec->w_t == W_INC_DEC || (spec->w_t == W_DECREASING && spec->w_t_scale == 1)) return 0;
    return INFINITY;
}

bool w_t_infinite_at_0(const struct sampler_spec *spec) {
    return spec->w_t == W_SBDM || (spec->w_t == W_KL_ETA && spec->w_t_eta == 0);
}
