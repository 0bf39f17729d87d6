// SPDX-License-Identifier: MIT
#include "core/train/grid.h"

#include <string.h>

#include "core/base/mem.h"
#include "core/engine/runner.h"
#include "core/io/file.h"
#include "core/io/png.h"
#include "core/model/dit.h"
#include "core/model/vae.h"

#define MAX_COLUMNS 10
#define ROWS 16 // of a forward pass
#define GAP 2

struct work {
    const struct train_config *c;
    struct kern *k;
    struct runner *runner;
    struct vae_file file;
    struct vae *vae;
    struct sampler_model model;
    struct sampler_spec spec;
    int columns, n, side, channels; // of a picture
    float *x, *picture;             // a sample; what the VAE makes of it
    uint8_t *pixels;                // the grid
    const volatile sig_atomic_t *stop;
};

static void choose_sampler(struct work *w) {
    const struct objective *o = &w->c->objective;
    const struct arch *a = &w->c->desc.arch;
    int guide = w->c->desc.guide_channels, most = o->discrete ? dit_channels(a) : a->in_channels;
    if (o->discrete) w->model = (struct sampler_model){.kind = MODEL_DISCRETE, .learned_variance = a->learn_sigma};
    else w->model = (struct sampler_model){.kind = MODEL_PATH, .path = o->path, .prediction = o->prediction};
    sampler_defaults(&w->spec, &w->model, o->discrete ? SAMPLER_DDIM : SAMPLER_ODE);
    w->spec.steps = w->c->sample_steps;
    w->spec.guidance = a->class_dropout ? w->c->sample_guidance : 1;
    w->spec.guide_from = 0, w->spec.guide_to = 1;
    w->spec.guide_channels = guide < 0 ? a->in_channels : guide < most ? guide : most;
}

static int open_vae(struct work *w, const char *path, struct err *e) {
    const struct arch *a = &w->c->desc.arch;
    struct vae_size size = {.height = a->input_size, .width = a->input_size, .decode = true};
    if (vae_file_open(&w->file, path, NULL, e) || vae_new(&w->vae, w->k, &w->file.arch, &w->file.table, &size, e))
        return e->status;
    if (w->file.arch.latent_channels != a->in_channels || (w->file.arch.image_channels != 1 && w->file.arch.image_channels != 3))
        return err_param(e, E_CONFLICT, "vae", "%s decodes latents of %d channels, the network makes %d", path,
                         w->file.arch.latent_channels, a->in_channels);
    w->side = a->input_size * vae_factor(&w->file.arch);
    w->channels = w->file.arch.image_channels;
    w->picture = mem_array(vae_numel(w->vae, VAE_DECODE), sizeof(float));
    return w->picture ? OK : err_set(e, E_NOMEM, "no memory for a picture");
}

static int open_all(struct work *w, const struct tensor_table *weights, const char *vae, struct err *e) {
    const struct arch *a = &w->c->desc.arch;
    w->columns = a->num_classes < MAX_COLUMNS ? a->num_classes : MAX_COLUMNS;
    w->n = w->columns * w->c->sample_each;
    w->side = a->input_size;
    w->channels = a->in_channels < 3 ? 1 : 3;
    choose_sampler(w);
    if (sampler_check(&w->spec, &w->model, e)) return e->status;
    int rc = runner_new(&w->runner, w->k, a, weights, ROWS / 2, ROWS, e);
    if (rc == OK && vae) rc = open_vae(w, vae, e);
    if (rc != OK) return rc;
    size_t width = (size_t)(w->columns * (w->side + GAP) + GAP), height = (size_t)(w->c->sample_each * (w->side + GAP) + GAP);
    w->x = mem_array(runner_numel(w->runner), sizeof(float));
    w->pixels = mem_array(width * height, (size_t)w->channels);
    return w->x && w->pixels ? OK : err_set(e, E_NOMEM, "no memory for a grid of %zu x %zu pixels", width, height);
}

// Picture i into its place: classes across, further pictures of a class down.
static void place(struct work *w, int i, const float *x) {
    size_t side = (size_t)w->side, line = (size_t)(w->columns * (w->side + GAP) + GAP), plane = side * side,
           ch = (size_t)w->channels;
    size_t left = (size_t)(i % w->columns) * (side + GAP) + GAP, top = (size_t)(i / w->columns) * (side + GAP) + GAP;
    for (size_t p = 0; p < plane; p++)
        for (size_t c = 0; c < ch; c++) {
            float v = 127.5f * x[c * plane + p] + 128.0f;
            w->pixels[((top + p / side) * line + left + p % side) * ch + c] = v <= 0 ? 0 : v >= 255 ? 255 : (uint8_t)v;
        }
}

static int finish(struct work *w, int slot, int i, struct err *e) {
    int rc = runner_read(w->runner, slot, w->x, e);
    if (rc == OK && !floats_finite(w->x, runner_numel(w->runner))) rc = err_set(e, E_NONFINITE, "sample %d is not finite", i);
    if (rc != OK || !w->vae) return rc == OK ? place(w, i, w->x), OK : rc;
    model_desc_to_vae(&w->c->desc, w->x, w->x); // the data's scale, whatever the VAE's file says
    rc = vae_run(w->vae, VAE_DECODE, w->x, w->picture, e);
    if (rc == OK) place(w, i, w->picture);
    return rc;
}

// Pictures [first, first + n) together, from noise to the grid.
static int sample(struct work *w, int first, int n, struct err *e) {
    struct runner_slot slots[ROWS / 2], *moving[ROWS / 2];
    int rc = OK, left = n;
    for (int i = 0; rc == OK && i < n; i++) {
        slots[i] = (struct runner_slot){.slot = i,
                                        .label = (first + i) % w->columns,
                                        .seed = w->c->objective.seed,
                                        .image = (uint32_t)(first + i),
                                        .null_of = -1};
        moving[i] = &slots[i];
        rc = runner_start(w->runner, &slots[i], &w->spec, &w->model, e);
    }
    while (rc == OK && left > 0) {
        if (*w->stop) return err_set(e, E_TIMEOUT, "no samples: the run was told to stop");
        rc = runner_step(w->runner, moving, left, NULL, e);
        if (rc == OK) rc = runner_plan(w->runner, moving, left, e);
        for (int i = left = 0; i < n; i++)
            if (!slots[i].done) moving[left++] = &slots[i];
    }
    for (int i = 0; rc == OK && i < n; i++)
        rc = slots[i].err.status ? err_set(e, slots[i].err.status, "%s", slots[i].err.text) : finish(w, i, first + i, e);
    return rc;
}

int grid_write(const char *path, const struct train_config *c, struct kern *k, const struct tensor_table *weights,
               const char *vae, const volatile sig_atomic_t *stop, struct err *e) {
    struct work w = {.c = c, .k = k, .stop = stop};
    uint8_t *png;
    size_t size;
    int rc = open_all(&w, weights, vae, e);
    for (int i = 0; rc == OK && i < w.n; i += ROWS / 2) rc = sample(&w, i, w.n - i < ROWS / 2 ? w.n - i : ROWS / 2, e);
    if (rc == OK)
        rc = png_encode(&png, &size, w.pixels, w.columns * (w.side + GAP) + GAP, c->sample_each * (w.side + GAP) + GAP,
                        w.channels, 6, NULL, 0, e);
    if (rc == OK) {
        rc = file_write(path, png, size, e);
        mem_free(png);
    }
    runner_free(w.runner);
    vae_free(w.vae);
    vae_file_close(&w.file);
    mem_free(w.x), mem_free(w.picture), mem_free(w.pixels);
    return rc;
}
