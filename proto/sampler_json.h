// SPDX-License-Identifier: MIT
/*
 * sampler_json: a sampler as JSON. Private to proto/.
 *
 * What request_normalised writes into a PNG and what capabilities_json gives as defaults are the same fields, so that a default can be
 * sent back as it was read.
 */
#ifndef SITD_SAMPLER_JSON_H
#define SITD_SAMPLER_JSON_H
#include "core/diffusion/sampler.h"
#include "proto/emit.h"

// The fields that this type and method use, and only those, into the open object; all but "type". An infinite s_max is left out.
void sampler_json_fields(struct emit *, const struct sampler_spec *, const struct sampler_model *);
// Does it step along an interpolant? ddpm, edm and ddim on a model of discrete times have a schedule of their own.
bool sampler_json_has_path(const struct sampler_spec *, const struct sampler_model *);
// Can it end with one more evaluation, or not? An ODE by a method that does not do so by itself.
bool sampler_json_has_denoise(const struct sampler_spec *);

#endif
