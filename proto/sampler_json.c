// SPDX-License-Identifier: MIT
#include "proto/sampler_json.h"

#include <math.h>

bool sampler_json_has_path(const struct sampler_spec *s, const struct sampler_model *m) {
    return s->type == SAMPLER_ODE || s->type == SAMPLER_SDE || (s->type == SAMPLER_DDIM && m->kind != MODEL_DISCRETE);
}

bool sampler_json_has_denoise(const struct sampler_spec *s) {
    return s->type == SAMPLER_ODE && s->method != METHOD_EXPONENTIAL && s->method != METHOD_DPMPP2M;
}

static void w_t_json(struct emit *e, const struct sampler_spec *s) {
    if (s->w_t != W_KNOTS) {
        emit_string(e, "w_t", w_form_name((int)s->w_t));
        return;
    }
    emit_open(e, "w_t", '[');
    for (int i = 0; i < s->knots.n; i++) {
        emit_open(e, NULL, '[');
        emit_real(e, NULL, s->knots.t[i]);
        emit_real(e, NULL, s->knots.v[i]);
        emit_close(e, ']');
    }
    emit_close(e, ']');
}

static void sde_json(struct emit *e, const struct sampler_spec *s) {
    w_t_json(e, s);
    emit_real(e, "w_t_scale", s->w_t_scale);
    if (s->w_t == W_KL_ETA) emit_real(e, "w_t_eta", s->w_t_eta);
    emit_string(e, "last_step", last_step_name((int)s->last));
    if (s->last != LAST_NONE) emit_real(e, "last_step_size", s->last_size);
}

static void edm_json(struct emit *e, const struct sampler_spec *s) {
    emit_real(e, "churn", s->churn);
    emit_real(e, "s_min", s->s_min);
    if (isfinite(s->s_max)) emit_real(e, "s_max", s->s_max);
    emit_real(e, "s_noise", s->s_noise);
    emit_real(e, "rho", s->rho);
    emit_real(e, "sigma_min", s->sigma_min);
    emit_real(e, "sigma_max", s->sigma_max);
}

void sampler_json_fields(struct emit *e, const struct sampler_spec *s, const struct sampler_model *m) {
    bool steps_of_diffusion = s->type == SAMPLER_DDPM || s->type == SAMPLER_DDIM;
    if (!steps_of_diffusion) emit_string(e, "method", sampler_method_name((int)s->method));
    if (s->type == SAMPLER_ODE && s->method == METHOD_DOPRI5) {
        emit_int(e, "max_evaluations", s->max_evaluations);
        emit_real(e, "atol", s->atol);
        emit_real(e, "rtol", s->rtol);
    } else emit_int(e, "steps", s->steps);
    if (sampler_json_has_denoise(s)) emit_bool(e, "denoise", s->denoise);
    if (s->type == SAMPLER_SDE) sde_json(e, s);
    if (s->type == SAMPLER_EDM) edm_json(e, s);
    if (!steps_of_diffusion) return;
    if (m->kind == MODEL_DISCRETE) emit_string(e, "spacing", spacing_name((int)s->spacing));
    if (s->type == SAMPLER_DDIM) emit_real(e, "eta", s->eta);
    emit_bool(e, "clip", s->clip);
}
