// SPDX-License-Identifier: MIT
/*
 * capabilities: what this daemon can be asked for, as JSON: GET /v1/capabilities (models with labels and defaults, samplers,
 * limits) and GET /v1/models (OpenAI's list). Names and defaults come from core/diffusion, so that these pages cannot disagree
 * with what request_resolve takes. Models are borrowed for the call. Thread: any.
 */
#ifndef SITD_CAPABILITIES_H
#define SITD_CAPABILITIES_H
#include <stddef.h>
#include <stdint.h>

#include "core/engine/engine.h"

struct capabilities {
    const char *version, *device;             // "0.1.0"; engine_device()
    const struct engine_model *const *models; // ready ones, sorted by name
    int n_models;
    int max_images, max_rows; // images of one request; rows of one batch
    int64_t max_timeout_ms;
    size_t max_body_bytes;
};

// Each returns JSON text that the caller mem_free's, or NULL on no memory. created: unix seconds that /v1/models gives for every
// model.
char *capabilities_json(const struct capabilities *);
char *models_json(const struct engine_model *const *models, int n, int64_t created);

#endif
