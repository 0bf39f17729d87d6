// SPDX-License-Identifier: MIT
#include <string.h>

#include "proto/emit.h"
#include "proto/request.h"
#include "proto/sampler_json.h"

char *request_normalised(const struct resolved *r, const struct engine_model *em, int i) {
    struct emit e = {0};
    const struct sampler_spec *s = &r->job.sampler;
    emit_open(&e, NULL, '{');
    emit_string(&e, "model", em->name);
    emit_open(&e, "classes", '[');
    if (r->job.classes[i] < 0) emit_null(&e, NULL);
    else emit_int(&e, NULL, r->job.classes[i]);
    emit_close(&e, ']');
    emit_seed(&e, "seed", r->job.seed);
    emit_int(&e, "seed_index", (int64_t)r->job.seed_index + i);
    emit_string(&e, "rng", rng_name((int)r->job.rng));
    if (sampler_json_has_path(s, &em->sampler)) emit_string(&e, "interpolant", path_name(s->path));
    emit_open(&e, "sampler", '{');
    emit_string(&e, "type", sampler_type_name((int)s->type));
    sampler_json_fields(&e, s, &em->sampler);
    emit_close(&e, '}');
    emit_open(&e, "guidance", '{');
    emit_real(&e, "scale", s->guidance);
    emit_open(&e, "interval", '[');
    emit_real(&e, NULL, s->guide_from);
    emit_real(&e, NULL, s->guide_to);
    emit_close(&e, ']');
    emit_int(&e, "channels", s->guide_channels);
    emit_close(&e, '}');
    emit_open(&e, "output", '{');
    emit_string(&e, "format", "png");
    emit_int(&e, "compression", r->compression);
    emit_close(&e, '}');
    emit_close(&e, '}');
    return emit_take(&e);
}

static void image_json(struct emit *e, const struct answer_image *image, const struct engine_model *em) {
    bool named =
        image->label >= 0 && image->label < em->desc.arch.num_classes && em->desc.labels && em->desc.labels[image->label].n > 0;
    emit_open(e, NULL, '{');
    if (image->label < 0) emit_null(e, "class");
    else emit_int(e, "class", image->label);
    emit_string(e, "label", named ? em->desc.labels[image->label].names[0] : NULL);
    emit_int(e, "seed_index", image->seed_index);
    emit_string(e, "pixels_sha256", image->sha256);
    emit_string(e, "b64_json", image->b64);
    emit_close(e, '}');
}

// Milliseconds to the microsecond: more digits would be noise.
static void ms(struct emit *e, const char *key, double v) {
    emit_real(e, key, v > 0 && v < 1e12 ? (double)(int64_t)(v * 1e3 + 0.5) / 1e3 : 0);
}

char *answer_json(const struct answer *a, const struct resolved *r, const struct engine_model *em) {
    struct emit e = {0};
    emit_open(&e, NULL, '{');
    emit_string(&e, "id", a->id);
    emit_int(&e, "created", a->created);
    emit_string(&e, "model", em->name);
    emit_int(&e, "version", em->desc.step);
    emit_string(&e, "digest", em->digest);
    emit_seed(&e, "seed", r->job.seed);
    emit_int(&e, "evaluations", a->evaluations);
    emit_open(&e, "notes", '[');
    for (int i = 0; i < r->n_notes; i++) emit_string(&e, NULL, r->notes[i]);
    emit_close(&e, ']');
    emit_open(&e, "timings_ms", '{');
    ms(&e, "queue", a->queue_ms);
    ms(&e, "denoise", a->denoise_ms);
    ms(&e, "decode", a->decode_ms);
    ms(&e, "encode", a->encode_ms);
    emit_close(&e, '}');
    emit_open(&e, "data", '[');
    for (int i = 0; i < a->n; i++) image_json(&e, &a->images[i], em);
    emit_close(&e, ']');
    emit_close(&e, '}');
    return emit_take(&e);
}
