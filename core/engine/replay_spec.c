// SPDX-License-Identifier: MIT
/*
 * The recorders' words: SiT's (num_steps points are num_steps - 1 steps, torchdiffeq's method names), DiT's (a respacing: "250",
 * "ddim50", or none for all 1000 times) and EDM's.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "core/engine/replay_int.h"

static int setting(int index, const struct recorded *c, const char *key, struct err *e) {
    return index >= 0 ? OK : err_param(e, E_UNSUPPORTED, key, "the case's %s \"%s\" is not known", key, replay_meta(c, key));
}

static int steps_in(int *steps, double n, double least, const char *key, struct err *e) {
    if (!(n >= least && n <= SAMPLER_MAX_STEPS && n == floor(n))) return err_param(e, E_RANGE, key, "the case's %s is %g", key, n);
    *steps = (int)n;
    return OK;
}

/* ---- SiT ---- */

static int read_ode(struct sampler_spec *s, const struct recorded *c, int points, struct err *e) {
    const char *method = replay_meta(c, "method");
    int m = !strcmp(method, "heun2") ? METHOD_HEUN : sampler_method_parse(method);
    if (setting(m, c, "method", e)) return e->status;
    s->method = (enum sampler_method)m;
    s->steps = points - 1;
    if (s->method != METHOD_DOPRI5) return OK;
    s->max_evaluations = SAMPLER_MAX_EVALUATIONS; // the recorder has no limit
    return replay_number(&s->atol, c, "atol", e) || replay_number(&s->rtol, c, "rtol", e) ? e->status : OK;
}

static int read_sde(struct sampler_spec *s, const struct recorded *c, int points, struct err *e) {
    char lower[64];
    snprintf(lower, sizeof lower, "%s", replay_meta(c, "method"));
    for (char *p = lower; *p; p++) *p |= 0x20;
    int method = sampler_method_parse(lower);
    const char *form = replay_meta(c, "diffusion_form");
    int w = !strcasecmp(form, "inccreasing-decreasing") ? W_INC_DEC : -1; // the recorder's spelling
    for (int i = 0; w < 0 && i <= W_INC_DEC; i++)
        if (!strcasecmp(form, w_form_name(i))) w = i;
    int last = -1;
    for (int i = 0; i < LAST_COUNT; i++)
        if (!strcasecmp(replay_meta(c, "last_step"), last_step_name(i))) last = i;
    if (setting(method, c, "method", e) || setting(w, c, "diffusion_form", e) || setting(last, c, "last_step", e))
        return e->status;
    s->method = (enum sampler_method)method, s->w_t = (enum w_form)w, s->last = (enum last_step)last;
    s->steps = last == LAST_NONE ? points - 1 : points;
    if (replay_number(&s->w_t_scale, c, "diffusion_norm", e)) return e->status;
    return last == LAST_NONE ? OK : replay_number(&s->last_size, c, "last_step_size", e);
}

static const char *either(const char *said, const char *model_says) { return *said ? said : model_says; }

static int read_sit(struct sampler_spec *s, struct sampler_model *m, const struct recorded *c, const struct model_desc *d,
                    struct err *e) {
    double n;
    int points = 0, path = path_parse(either(replay_meta(c, "path"), d ? d->path : "")),
        prediction = prediction_parse(either(replay_meta(c, "prediction"), d ? d->prediction : "")),
        type = sampler_type_parse(replay_meta(c, "sampler"));
    if (type > SAMPLER_SDE) type = -1;
    if (setting(path, c, "path", e) || setting(prediction, c, "prediction", e) || setting(type, c, "sampler", e))
        return e->status;
    if (replay_number(&n, c, "num_steps", e) || steps_in(&points, n, 2, "num_steps", e)) return e->status;
    *m = (struct sampler_model){.path = (enum path_kind)path, .prediction = (enum prediction)prediction};
    sampler_defaults(s, m, (enum sampler_type)type);
    s->replay = true;
    return s->type == SAMPLER_ODE ? read_ode(s, c, points, e) : read_sde(s, c, points, e);
}

/* ---- DiT ---- */

static int read_respacing(struct sampler_spec *s, const struct recorded *c, struct err *e) {
    const char *v = replay_meta(c, "respacing");
    bool ddim = !strncmp(v, "ddim", 4);
    const char *number = ddim ? v + 4 : v;
    char *end;
    s->spacing = ddim ? SPACING_DDIM : SPACING_OPENAI;
    if (!*v) return steps_in(&s->steps, SCHEDULE_TIMES, 1, "respacing", e);
    double n = strtod(number, &end);
    return !*number || *end ? setting(-1, c, "respacing", e) : steps_in(&s->steps, n, 1, "respacing", e);
}

static int read_dit(struct sampler_spec *s, struct sampler_model *m, const struct recorded *c, struct err *e) {
    int type = sampler_type_parse(replay_meta(c, "sampler"));
    const char *clip = replay_meta(c, "clip");
    if (type != SAMPLER_DDPM && type != SAMPLER_DDIM) return setting(-1, c, "sampler", e);
    if (strcmp(clip, "true") && strcmp(clip, "false")) return setting(-1, c, "clip", e);
    *m = (struct sampler_model){.kind = MODEL_DISCRETE, .learned_variance = c->arch.learn_sigma};
    sampler_defaults(s, m, (enum sampler_type)type);
    s->clip = clip[0] == 't';
    if (read_respacing(s, c, e)) return e->status;
    return type == SAMPLER_DDIM ? replay_number(&s->eta, c, "eta", e) : OK;
}

/* ---- MaskDiT ---- */

static int read_edm(struct sampler_spec *s, struct sampler_model *m, const struct recorded *c, struct err *e) {
    const char *sampler = replay_meta(c, "sampler");
    bool heun = !strcmp(sampler, "edm_heun");
    double n;
    if (!heun && strcmp(sampler, "edm_euler")) return setting(-1, c, "sampler", e);
    *m = (struct sampler_model){.kind = MODEL_EDM, .sigma_data = 0.5};
    sampler_defaults(s, m, SAMPLER_EDM);
    s->method = heun ? METHOD_HEUN : METHOD_EULER;
    const struct {
        const char *key;
        double *to;
    } numbers[] = {
        {"num_steps", &n}, {"sigma_min", &s->sigma_min}, {"sigma_max", &s->sigma_max}, {"rho", &s->rho}, {"S_churn", &s->churn}};
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        if (replay_number(numbers[i].to, c, numbers[i].key, e)) return e->status;
    return steps_in(&s->steps, n, 1, "num_steps", e);
}

int replay_spec(struct sampler_spec *s, struct sampler_model *m, const struct recorded *c, const struct model_desc *d,
                struct err *e) {
    const char *family = replay_meta(c, "family"), *cfg = replay_meta(c, "cfg");
    bool sit = !strcmp(family, "sit"), dit = !strcmp(family, "dit"),
         edm = !strcmp(family, "maskdit") || !strcmp(family, "sd-dit");
    if (!sit && !dit && !edm) return setting(-1, c, "family", e);
    int rc = sit ? read_sit(s, m, c, d, e) : dit ? read_dit(s, m, c, e) : read_edm(s, m, c, e);
    if (rc != OK) return rc;
    // DiT's and SiT's code guides the first three channels of the network's output, which for DiT holds the variance too
    int rule = d ? d->guide_channels : edm ? -1 : 3;
    int most = dit ? dit_channels(&c->arch) : c->arch.in_channels;
    s->guide_channels = rule < 0 ? c->arch.in_channels : rule > most ? most : rule;
    return strcmp(cfg, "None") ? replay_number(&s->guidance, c, "cfg", e) : OK;
}
