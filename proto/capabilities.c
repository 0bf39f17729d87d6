// SPDX-License-Identifier: MIT
#include "proto/capabilities.h"

#include "proto/emit.h"
#include "proto/request.h"

static void labels_json(struct emit *e, const struct model_desc *m) {
    emit_open(e, "labels", '[');
    for (int i = 0; m->labels && i < m->arch.num_classes; i++) {
        emit_open(e, NULL, '[');
        for (int j = 0; j < m->labels[i].n; j++) emit_string(e, NULL, m->labels[i].names[j]);
        emit_close(e, ']');
    }
    emit_close(e, ']');
}

static void model_json(struct emit *e, const struct engine_model *em, bool is_default) {
    emit_open(e, NULL, '{');
    emit_string(e, "name", em->name);
    emit_int(e, "version", em->desc.step);
    emit_string(e, "digest", em->digest);
    emit_string(e, "family", em->desc.family);
    emit_string(e, "path", path_name(em->sampler.path));
    emit_string(e, "prediction", prediction_name(em->sampler.prediction));
    emit_int(e, "image_size", em->image_size);
    emit_int(e, "channels", em->image_channels);
    emit_int(e, "classes", em->desc.arch.num_classes);
    labels_json(e, &em->desc);
    emit_bool(e, "null_class", em->desc.arch.class_dropout);
    emit_int(e, "guidance_channels", em->guide_channels);
    emit_int(e, "max_guidance_channels", em->desc.arch.in_channels);
    emit_bool(e, "default", is_default);
    emit_close(e, '}');
}

static void ode_json(struct emit *e) {
    struct sampler_spec s;
    sampler_defaults(&s, &(struct sampler_model){0}, SAMPLER_ODE);
    emit_open(e, "ode", '{');
    emit_open(e, "methods", '[');
    for (int i = 0; i < METHOD_COUNT; i++) emit_string(e, NULL, sampler_method_name(i));
    emit_close(e, ']');
    emit_open(e, "defaults", '{');
    emit_string(e, "method", sampler_method_name(s.method));
    emit_int(e, "steps", s.steps);
    emit_int(e, "max_evaluations", s.max_evaluations);
    emit_real(e, "atol", s.atol);
    emit_real(e, "rtol", s.rtol);
    emit_close(e, '}');
    emit_close(e, '}');
}

static void sde_json(struct emit *e) {
    struct sampler_spec s;
    sampler_defaults(&s, &(struct sampler_model){0}, SAMPLER_SDE);
    emit_open(e, "sde", '{');
    emit_open(e, "methods", '[');
    emit_string(e, NULL, sampler_method_name(METHOD_EULER));
    emit_string(e, NULL, sampler_method_name(METHOD_HEUN));
    emit_close(e, ']');
    emit_open(e, "w_t", '[');
    for (int i = 0; i < W_COUNT; i++) emit_string(e, NULL, w_form_name(i));
    emit_close(e, ']');
    emit_open(e, "last_step", '[');
    for (int i = 0; i < LAST_COUNT; i++) emit_string(e, NULL, last_step_name(i));
    emit_close(e, ']');
    emit_open(e, "defaults", '{');
    emit_string(e, "method", sampler_method_name(s.method));
    emit_int(e, "steps", s.steps);
    emit_string(e, "w_t", w_form_name(s.w_t));
    emit_real(e, "w_t_scale", s.w_t_scale);
    emit_string(e, "last_step", last_step_name(s.last));
    emit_real(e, "last_step_size", s.last_size);
    emit_close(e, '}');
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
    emit_open(&e, "samplers", '{');
    ode_json(&e);
    sde_json(&e);
    emit_close(&e, '}');
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
