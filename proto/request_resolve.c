// SPDX-License-Identifier: MIT
/*
 * request_resolve: a parsed request and a model give a job.
 *
 * A field that the chosen sampler does not use is refused, not ignored: whoever sent it expects it to do something. Guidance's
 * interval and channels are taken at scale 1, where they have no effect, so that a sweep over scales needs no special case.
 */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "core/base/mem.h"
#include "proto/near.h"
#include "proto/request_fields.h"
#include "proto/sampler_json.h"

static bool is_version(const char *digest, int64_t at_step, const char *s) {
    char step[24];
    snprintf(step, sizeof step, "%" PRId64, at_step);
    if (strcmp(s, step) == 0) return true;
    size_t n = strlen(s);
    return n >= 6 && s[strspn(s, "0123456789abcdef")] == 0 && strncmp(digest, s, n) == 0;
}

static int check_model(const struct request *r, const struct engine_model *em, struct http_error *e) {
    if (!r->model) return 0;
    if (strcmp(r->model_name, em->name) != 0) return request_model_unknown(r, &em->name, 1, e);
    const char *version = r->model + strlen(r->model_name);
    if (!*version++ || is_version(em->digest, em->desc.step, version)) return 0;
    for (int i = 0; i < ENGINE_BEFORE && em->before[i].digest[0]; i++)
        if (is_version(em->before[i].digest, em->before[i].step, version))
            return http_error_set(e, 409, "state_conflict", "model",
                                  "model \"%.100s\" was replaced: %s is now at version %" PRId64 ", digest %.12s", r->model,
                                  em->name, em->desc.step, em->digest);
    return http_error_set(e, 404, "version_not_found", "model",
                          "model \"%.100s\" is not served; %s is at version %" PRId64 ", digest %.12s", r->model, em->name,
                          em->desc.step, em->digest);
}

int request_model_unknown(const struct request *r, const char (*names)[64], int n, struct http_error *e) {
    char text[300];
    struct near near;
    if (!r->model)
        return http_error_set(e, 422, "missing_field", "model",
                              "model is required: there is more than one and none is marked default");
    near_init(&near, r->model_name);
    for (int i = 0; i < n; i++) near_add(&near, names[i]);
    near_text(&near, text, sizeof text);
    return http_error_set(e, 404, "model_not_found", "model", "model \"%.100s\" is not served%s", r->model, text);
}

static int one_class(const struct class_ref *c, const struct engine_model *em, const char *param, int32_t *id,
                     struct http_error *e) {
    int found = (int)c->id;
    if (c->label && label_find(&em->desc, c->label, param, &found, e) < 0) return -1;
    if (!c->label && c->id < 0 && !em->desc.arch.class_dropout)
        return http_error_set(e, 422, "not_supported", param,
                              "%s: null (unconditional) needs a model with a null class; %s has none", param, em->name);
    if (!c->label && c->id >= em->desc.arch.num_classes)
        return http_error_set(e, 422, "out_of_range", param, "%s must be from 0 to %d, not %" PRId64, param,
                              em->desc.arch.num_classes - 1, c->id);
    *id = found;
    return 0;
}

static int classes(struct resolved *out, const struct request *r, const struct engine_model *em, struct http_error *e) {
    bool list = request_has(r, FIELD_CLASSES);
    int n = list ? r->n_classes : request_has(r, FIELD_N) ? (int)r->n : 1;
    int32_t *ids = mem_array((size_t)n, sizeof *ids);
    if (!ids) return http_error_set(e, 503, "out_of_memory", NULL, "out of memory");
    out->job.classes = ids;
    out->job.n = n;
    for (int i = 0; i < (list ? n : 1); i++) {
        char param[24] = "class";
        if (list) snprintf(param, sizeof param, "classes[%d]", i);
        if (one_class(&r->classes[i], em, param, &ids[i], e) < 0) return -1;
    }
    for (int i = 1; i < n && !list; i++) ids[i] = ids[0];
    return 0;
}

static int unused(const char *param, const char *why, struct http_error *e) {
    return http_error_set(e, 422, "conflicting_fields", param, "%s is not used %s", param, why);
}

#define BY(type) (1u << SAMPLER_##type)
static const struct use { // fields that not every type uses
    enum request_field field;
    const char *name;
    unsigned by;
} uses[] = {{FIELD_METHOD, "sampler.method", BY(ODE) | BY(SDE) | BY(EDM)},
            {FIELD_W_T, "sampler.w_t", BY(SDE)},
            {FIELD_W_T_SCALE, "sampler.w_t_scale", BY(SDE)},
            {FIELD_W_T_ETA, "sampler.w_t_eta", BY(SDE)},
            {FIELD_LAST_STEP, "sampler.last_step", BY(SDE)},
            {FIELD_LAST_STEP_SIZE, "sampler.last_step_size", BY(SDE)},
            {FIELD_SPACING, "sampler.spacing", BY(DDPM) | BY(DDIM)},
            {FIELD_ETA, "sampler.eta", BY(DDIM)},
            {FIELD_CLIP, "sampler.clip", BY(DDPM) | BY(DDIM)},
            {FIELD_DENOISE, "sampler.denoise", BY(ODE)},
            {FIELD_CHURN, "sampler.churn", BY(EDM)},
            {FIELD_S_MIN, "sampler.s_min", BY(EDM)},
            {FIELD_S_MAX, "sampler.s_max", BY(EDM)},
            {FIELD_S_NOISE, "sampler.s_noise", BY(EDM)},
            {FIELD_RHO, "sampler.rho", BY(EDM)},
            {FIELD_SIGMA_MIN, "sampler.sigma_min", BY(EDM)},
            {FIELD_SIGMA_MAX, "sampler.sigma_max", BY(EDM)}};

static int not_by_type(const struct use *u, enum sampler_type type, struct http_error *e) {
    char why[120];
    size_t n = (size_t)snprintf(why, sizeof why, "by sampler.type \"%s\", only by", sampler_type_name((int)type));
    const char *between = " ";
    for (int i = 0; i < SAMPLER_TYPE_COUNT; i++)
        if (u->by >> i & 1) n += (size_t)snprintf(why + n, sizeof why - n, "%s\"%s\"", between, sampler_type_name(i)), between = ", ";
    return unused(u->name, why, e);
}

static int check_adaptive(const struct request *r, const struct sampler_spec *s, struct http_error *e) {
    static const struct {
        enum request_field field;
        const char *name;
    } adaptive[] = {
        {FIELD_ATOL, "sampler.atol"}, {FIELD_RTOL, "sampler.rtol"}, {FIELD_MAX_EVALUATIONS, "sampler.max_evaluations"}};
    bool chooses = s->type == SAMPLER_ODE && s->method == METHOD_DOPRI5;
    for (int i = 0; i < 3; i++)
        if (!chooses && request_has(r, adaptive[i].field))
            return unused(adaptive[i].name, "by solvers of fixed steps, only by sampler.method \"dopri5\"", e);
    if (chooses && request_has(r, FIELD_STEPS))
        return unused("sampler.steps", "by \"dopri5\", which chooses its own; it takes sampler.max_evaluations", e);
    return 0;
}

static int check_sde(const struct request *r, const struct sampler_spec *s, struct http_error *e) {
    if (s->method != METHOD_EULER && s->method != METHOD_HEUN)
        return http_error_set(e, 422, "conflicting_fields", "sampler.method",
                              "sampler.method must be euler or heun with sampler.type \"sde\", not %s",
                              sampler_method_name((int)s->method));
    if (s->last == LAST_NONE && request_has(r, FIELD_LAST_STEP_SIZE))
        return unused("sampler.last_step_size", "with sampler.last_step \"none\"", e);
    if (s->w_t != W_KL_ETA && request_has(r, FIELD_W_T_ETA))
        return unused("sampler.w_t_eta", "by this sampler.w_t, only by \"kl-eta\"", e);
    if (s->last != LAST_NONE && s->steps < 2)
        return http_error_set(
            e, 422, "out_of_range", "sampler.steps",
            "sampler.steps must be from 2 to %d with a last step, which counts as one (sampler.last_step \"none\" allows 1)",
            SAMPLER_MAX_STEPS);
    return 0;
}

static int check_used(const struct request *r, const struct sampler_spec *s, const struct engine_model *em, struct http_error *e) {
    for (size_t i = 0; i < sizeof uses / sizeof *uses; i++)
        if (request_has(r, uses[i].field) && !(uses[i].by >> s->type & 1)) return not_by_type(&uses[i], s->type, e);
    if (request_has(r, FIELD_SPACING) && em->sampler.kind != MODEL_DISCRETE)
        return unused("sampler.spacing", "with this model, which has no discrete times: its steps are even in t", e);
    if (request_has(r, FIELD_DENOISE) && !sampler_json_has_denoise(s))
        return unused("sampler.denoise", "by \"exponential\" and \"dpmpp2m\", which end in the estimate of the data anyway", e);
    return s->type == SAMPLER_SDE && check_sde(r, s, e) < 0 ? -1 : check_adaptive(r, s, e);
}

// The fields of ddpm, ddim and edm.
static void discrete_fields(struct sampler_spec *s, const struct request *r) {
    const struct {
        enum request_field field;
        double value, *to;
    } numbers[] = {{FIELD_ETA, r->eta, &s->eta},
                   {FIELD_CHURN, r->churn, &s->churn},
                   {FIELD_S_MIN, r->s_min, &s->s_min},
                   {FIELD_S_MAX, r->s_max, &s->s_max},
                   {FIELD_S_NOISE, r->s_noise, &s->s_noise},
                   {FIELD_RHO, r->rho, &s->rho},
                   {FIELD_SIGMA_MIN, r->sigma_min, &s->sigma_min},
                   {FIELD_SIGMA_MAX, r->sigma_max, &s->sigma_max}};
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        if (request_has(r, numbers[i].field)) *numbers[i].to = numbers[i].value;
    if (request_has(r, FIELD_SPACING)) s->spacing = (enum spacing)r->spacing;
    if (request_has(r, FIELD_CLIP)) s->clip = r->clip;
    if (request_has(r, FIELD_DENOISE)) s->denoise = r->denoise;
}

static int guidance(struct sampler_spec *s, const struct request *r, const struct engine_model *em, struct http_error *e) {
    if (request_has(r, FIELD_SCALE)) s->guidance = r->scale;
    if (request_has(r, FIELD_INTERVAL)) s->guide_from = r->interval[0], s->guide_to = r->interval[1];
    s->guide_channels = em->guide_channels;
    if (request_has(r, FIELD_CHANNELS)) {
        int64_t n = r->channels < 0 ? em->desc.arch.in_channels : r->channels;
        if (n > em->max_guide_channels)
            return http_error_set(e, 422, "out_of_range", "guidance.channels",
                                  "guidance.channels must be from 1 to %d or \"all\", not %" PRId64, em->max_guide_channels, n);
        s->guide_channels = (int)n;
    }
    if (s->guidance != 1 && !em->desc.arch.class_dropout)
        return http_error_set(e, 422, "not_supported", "guidance.scale",
                              "guidance.scale other than 1 needs a model with a null class; %s has none", em->name);
    return 0;
}

static int sampler(struct sampler_spec *s, const struct request *r, const struct engine_model *em, struct http_error *e) {
    struct err err = {0};
    enum sampler_type type = request_has(r, FIELD_TYPE) ? (enum sampler_type)r->type : sampler_home_type(&em->sampler);
    sampler_defaults(s, &em->sampler, type);
    if (request_has(r, FIELD_METHOD)) s->method = (enum sampler_method)r->method;
    if (request_has(r, FIELD_STEPS)) s->steps = (int)r->steps;
    if (request_has(r, FIELD_MAX_EVALUATIONS)) s->max_evaluations = (int)r->max_evaluations;
    if (request_has(r, FIELD_INTERPOLANT)) s->path = (enum path_kind)r->interpolant;
    if (request_has(r, FIELD_W_T)) s->w_t = (enum w_form)r->w_t, s->knots = r->knots;
    if (request_has(r, FIELD_W_T_SCALE)) s->w_t_scale = r->w_t_scale;
    if (request_has(r, FIELD_W_T_ETA)) s->w_t_eta = r->w_t_eta;
    if (request_has(r, FIELD_LAST_STEP)) s->last = (enum last_step)r->last_step;
    if (request_has(r, FIELD_LAST_STEP_SIZE)) s->last_size = r->last_step_size;
    if (request_has(r, FIELD_ATOL)) s->atol = r->atol;
    if (request_has(r, FIELD_RTOL)) s->rtol = r->rtol;
    discrete_fields(s, r);
    if (check_used(r, s, em, e) < 0 || guidance(s, r, em, e) < 0) return -1;
    return sampler_check(s, &em->sampler, &err) < 0 ? http_error_from(e, &err) : 0;
}

int request_resolve(struct resolved *out, const struct request *r, const struct engine_model *em, uint64_t random53,
                    struct http_error *e) {
    *out = (struct resolved){.compression = request_has(r, FIELD_COMPRESSION) ? (int)r->compression : 1};
    struct engine_job *job = &out->job;
    if (check_model(r, em, e) < 0 || classes(out, r, em, e) < 0 || sampler(&job->sampler, r, em, e) < 0) goto fail;
    if (r->seed_index + job->n - 1 > UINT32_MAX) {
        http_error_set(e, 422, "out_of_range", "seed_index",
                       "seed_index of the last image must be at most 4294967295, not %" PRId64, r->seed_index + job->n - 1);
        goto fail;
    }
    snprintf(job->model, sizeof job->model, "%s", em->name);
    snprintf(job->digest, sizeof job->digest, "%s", em->digest);
    out->seed_given = request_has(r, FIELD_SEED);
    job->seed = out->seed_given ? r->seed : random53 & (((uint64_t)1 << 53) - 1);
    job->seed_index = (uint32_t)r->seed_index;
    if (request_has(r, FIELD_RNG)) job->rng = (enum rng_kind)r->rng;
    job->timeout_ms = r->timeout_ms;
    job->priority = (int)r->priority;
    out->n_notes = sampler_notes(&job->sampler, &em->sampler, out->notes, (int)(sizeof out->notes / sizeof *out->notes));
    return 0;
fail:
    resolved_deinit(out);
    return -1;
}

void resolved_deinit(struct resolved *r) {
    mem_free((void *)r->job.classes);
    *r = (struct resolved){0};
}
