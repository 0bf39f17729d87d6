// SPDX-License-Identifier: MIT
#include "proto/capabilities.h"

#include "proto/emit.h"
#include "proto/request.h"
#include "proto/sampler_json.h"

static void labels_json(struct emit *e, const struct model_desc *m) {
    emit_open(e, "labels", '[');
    for (int i = 0; m->labels && i < m->arch.num_classes; i++) {
        emit_open(e, NULL, '[');
        for (int j = 0; j < m->labels[i].n; j++) emit_string(e, NULL, m->labels[i].names[j]);
        emit_close(e, ']');
    }
    emit_close(e, ']');
}

static bool runs(const struct sampler_spec *s, const struct sampler_model *m) {
    struct err e = {0};
    return sampler_check(s, m, &e) == OK;
}

static void methods_json(struct emit *e, struct sampler_spec s, const struct sampler_model *m) {
    if (s.type == SAMPLER_DDPM || s.type == SAMPLER_DDIM) return;
    emit_open(e, "methods", '[');
    for (int i = 0; i < METHOD_COUNT; i++) {
        s.method = (enum sampler_method)i;
        if (runs(&s, m)) emit_string(e, NULL, sampler_method_name(i));
    }
    emit_close(e, ']');
}

static void interpolants_json(struct emit *e, struct sampler_spec s, const struct sampler_model *m) {
    bool has = sampler_json_has_path(&s, m);
    emit_open(e, "interpolants", '[');
    for (int i = 0; i < PATH_COUNT && has; i++) {
        s.path = (enum path_kind)i;
        if (runs(&s, m)) emit_string(e, NULL, path_name(s.path));
    }
    emit_close(e, ']');
}

static void w_t_json(struct emit *e, struct sampler_spec s, const struct sampler_model *m) {
    emit_open(e, "w_t", '[');
    for (int i = 0; i < W_KNOTS; i++) { // knots have no name
        s.w_t = (enum w_form)i;
        if (runs(&s, m)) emit_string(e, NULL, w_form_name(i));
    }
    emit_close(e, ']');
    emit_open(e, "last_step", '[');
    for (int i = 0; i < LAST_COUNT; i++) emit_string(e, NULL, last_step_name(i));
    emit_close(e, ']');
}

static void defaults_json(struct emit *e, const struct sampler_spec *s, const struct sampler_model *m) {
    emit_open(e, "defaults", '{');
    sampler_json_fields(e, s, m);
    if (s->type == SAMPLER_ODE) { // of dopri5, should it be chosen
        emit_int(e, "max_evaluations", s->max_evaluations);
        emit_real(e, "atol", s->atol);
        emit_real(e, "rtol", s->rtol);
    }
    if (s->type == SAMPLER_SDE) emit_real(e, "w_t_eta", s->w_t_eta); // of kl-eta
    emit_close(e, '}');
}

// One sampler of a model; nothing if the model does not run it.
static void sampler_json(struct emit *e, const struct sampler_model *m, enum sampler_type type) {
    struct sampler_spec s;
    sampler_defaults(&s, m, type);
    if (!runs(&s, m)) return;
    emit_open(e, sampler_type_name((int)type), '{');
    methods_json(e, s, m);
    interpolants_json(e, s, m);
    if (type == SAMPLER_SDE) w_t_json(e, s, m);
    if (m->kind == MODEL_DISCRETE && (type == SAMPLER_DDPM || type == SAMPLER_DDIM)) {
        emit_open(e, "spacing", '[');
        for (int i = 0; i < SPACING_COUNT; i++) emit_string(e, NULL, spacing_name(i));
        emit_close(e, ']');
    }
    defaults_json(e, &s, m);
    emit_close(e, '}');
}

static void model_json(struct emit *e, const struct engine_model *em, bool is_default) {
    static const char *const predictions[MODEL_KIND_COUNT] = {[MODEL_DISCRETE] = "noise", [MODEL_EDM] = "edm"};
    const struct sampler_model *m = &em->sampler;
    emit_open(e, NULL, '{');
    emit_string(e, "name", em->name);
    emit_int(e, "version", em->desc.step);
    emit_string(e, "digest", em->digest);
    emit_string(e, "family", em->desc.family);
    emit_string(e, "path", path_name(sampler_home_path(m)));
    emit_string(e, "prediction", m->kind == MODEL_PATH ? prediction_name(m->prediction) : predictions[m->kind]);
    emit_int(e, "image_size", em->image_size);
    emit_int(e, "channels", em->image_channels);
    emit_int(e, "classes", em->desc.arch.num_classes);
    labels_json(e, &em->desc);
    emit_bool(e, "null_class", em->desc.arch.class_dropout);
    emit_int(e, "guidance_channels", em->guide_channels);
    emit_int(e, "max_guidance_channels", em->max_guide_channels);
    emit_bool(e, "default", is_default);
    emit_string(e, "sampler", sampler_type_name((int)sampler_home_type(m)));
    emit_open(e, "samplers", '{');
    for (int i = 0; i < SAMPLER_TYPE_COUNT; i++) sampler_json(e, m, (enum sampler_type)i);
    emit_close(e, '}');
    emit_close(e, '}');
}

// All that there is, each type on the kind of model that it was made for.
static void samplers_json(struct emit *e) {
    static const struct sampler_model kinds[SAMPLER_TYPE_COUNT] = {[SAMPLER_ODE] = {.kind = MODEL_PATH},
                                                                   [SAMPLER_SDE] = {.loss = {1, {0}, {1}}},
                                                                   [SAMPLER_DDPM] = {.kind = MODEL_DISCRETE},
                                                                   [SAMPLER_DDIM] = {.kind = MODEL_DISCRETE},
                                                                   [SAMPLER_EDM] = {.kind = MODEL_EDM, .sigma_data = 0.5}};
    emit_open(e, "samplers", '{');
    for (int i = 0; i < SAMPLER_TYPE_COUNT; i++) sampler_json(e, &kinds[i], (enum sampler_type)i);
    emit_close(e, '}');
}

char *capabilities_json(const struct capabilities *c) {
    struct emit e = {0};
    emit_open(&e, NULL, '{');
    emit_string(&e, "version", c->version);
    emit_string(&e, "device", c->device);
    emit_open(&e, "models", '[');
    for (int i = 0; i < c->n_models; i++) model_json(&e, c->models[i], c->n_models == 1 || c->models[i]->desc.is_default);
    emit_close(&e, ']');
    emit_open(&e, "interpolants", '[');
    for (int i = 0; i < PATH_COUNT; i++) emit_string(&e, NULL, path_name((enum path_kind)i));
    emit_close(&e, ']');
    emit_open(&e, "rng", '[');
    for (int i = 0; i < RNG_COUNT; i++) emit_string(&e, NULL, rng_name(i));
    emit_close(&e, ']');
    samplers_json(&e);
    emit_open(&e, "limits", '{');
    emit_int(&e, "max_images", c->max_images);
    emit_int(&e, "max_steps", SAMPLER_MAX_STEPS);
    emit_int(&e, "max_evaluations", SAMPLER_MAX_EVALUATIONS);
    emit_int(&e, "max_rows", c->max_rows);
    emit_int(&e, "max_timeout_ms", c->max_timeout_ms);
    emit_int(&e, "max_body_bytes", (int64_t)c->max_body_bytes);
    emit_close(&e, '}');
    emit_close(&e, '}');
    return emit_take(&e);
}

char *models_json(const struct engine_model *const *models, int n, int64_t created) {
    struct emit e = {0};
    emit_open(&e, NULL, '{');
    emit_string(&e, "object", "list");
    emit_open(&e, "data", '[');
    for (int i = 0; i < n; i++) {
        emit_open(&e, NULL, '{');
        emit_string(&e, "id", models[i]->name);
        emit_string(&e, "object", "model");
        emit_int(&e, "created", created);
        emit_string(&e, "owned_by", "sitd");
        emit_int(&e, "version", models[i]->desc.step);
        emit_string(&e, "digest", models[i]->digest);
        emit_close(&e, '}');
    }
    emit_close(&e, ']');
    emit_close(&e, '}');
    return emit_take(&e);
}
