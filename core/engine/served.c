// SPDX-License-Identifier: MIT
/*
 * One version of one model, from a model directory's bytes to slots on the device that are known to work.
 *
 * Everything a step needs is reserved here, so that no step can fail for want of memory. The canary is one guided evaluation of
 * one image (or an unguided one where there is no null class), and its picture where there is a VAE: weights that are finite one by
 * one can still overflow together, and it is better to learn that before the first client does. It also gives the first measurement of a row's time, without which
 * Retry-After would start as a guess.
 */
#include "core/engine/engine_int.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/base/fault.h"
#include "core/base/log.h"
#include "core/base/mem.h"
#include "core/io/checkpoint.h"
#include "core/model/dit.h"

void facts_unref(struct facts *f) {
    if (!f || atomic_fetch_sub(&f->refs, 1) != 1) return;
    model_desc_deinit(&f->model.desc);
    mem_free(f);
}

/* ---- what a family is to a sampler ---- */

static int path_model(const struct model_desc *d, struct sampler_model *m, struct err *e) {
    int path = path_parse(d->path), prediction = prediction_parse(d->prediction), n = d->n_loss_curve;
    if (path < 0) return err_param(e, E_UNSUPPORTED, "path", "no path is called '%s'", d->path);
    if (prediction < 0) return err_param(e, E_UNSUPPORTED, "prediction", "no prediction is called '%s'", d->prediction);
    *m = (struct sampler_model){.kind = MODEL_PATH, .path = (enum path_kind)path, .prediction = (enum prediction)prediction};
    m->loss.n = n < SAMPLER_KNOTS ? n : SAMPLER_KNOTS; // a finer curve is thinned evenly; its ends stay
    for (int i = 0; i < m->loss.n; i++) {
        const struct loss_knot *knot = &d->loss_curve[n <= SAMPLER_KNOTS ? i : i * (n - 1) / (SAMPLER_KNOTS - 1)];
        m->loss.t[i] = knot->t;
        m->loss.v[i] = knot->loss;
    }
    return 0;
}

static int check_pictures(const struct model_desc *d, const struct vae_arch *vae, struct err *e) {
    int channels = d->arch.in_channels, made = vae ? vae->image_channels : channels;
    bool latents = d->latent.scale > 0 || d->latent.mean;
    if (vae && !vae->decoder) return err_param(e, E_CONFLICT, "latent.vae", "its VAE has no decoder");
    if (vae && vae->latent_channels != channels)
        return err_param(e, E_CONFLICT, "latent.vae", "its VAE decodes latents of %d channels, the network makes %d", vae->latent_channels, channels);
    if (!vae && (latents || (channels != 1 && channels != 3)))
        return err_param(e, E_UNSUPPORTED, latents ? "latent.vae" : "architecture.in_channels",
                         "it makes latents of %d channels, which need a VAE to become pictures: name one in latent.vae", channels);
    if (made == 1 || made == 3) return OK;
    return err_param(e, E_UNSUPPORTED, "latent.vae", "its VAE makes pictures of %d channels; 1 or 3 can be served", made);
}

int served_check(const struct model_desc *d, const struct vae_arch *vae, struct sampler_model *sampler, struct err *e) {
    if (check_pictures(d, vae, e)) return e->status;
    if (strcmp(d->family, "sit") == 0) return path_model(d, sampler, e);
    if (strcmp(d->family, "dit") == 0)
        *sampler = (struct sampler_model){.kind = MODEL_DISCRETE, .learned_variance = d->arch.learn_sigma};
    else if (strcmp(d->family, "maskdit") == 0 || strcmp(d->family, "sd-dit") == 0)
        *sampler = (struct sampler_model){.kind = MODEL_EDM, .sigma_data = 0.5}; // of every published model, whatever its data's size
    else return err_param(e, E_UNSUPPORTED, "family", "family '%s' is not served by this build", d->family);
    return 0;
}

// SiT and MaskDiT guide channels of the picture. DiT's code cuts the network's output after the third channel, so that with fewer than three
// in the picture its variance is guided too; "all" are the picture's, as diffusers has it.
static void guide_rule(struct engine_model *m, const struct model_desc *d) {
    m->max_guide_channels = strcmp(d->family, "dit") == 0 ? dit_channels(&d->arch) : d->arch.in_channels;
    m->guide_channels = d->guide_channels < 0 ? d->arch.in_channels : d->guide_channels;
    if (m->guide_channels > m->max_guide_channels) m->guide_channels = m->max_guide_channels;
}

static void remember(struct engine_model *m, const struct engine_model *before) {
    if (!before) return;
    memcpy(m->before[0].digest, before->digest, sizeof before->digest);
    m->before[0].step = before->desc.step;
    memcpy(&m->before[1], before->before, (ENGINE_BEFORE - 1) * sizeof *m->before);
}

int facts_new(struct facts **out, const struct source *from, struct err *e) {
    *out = NULL;
    const struct model_desc *d = &from->dir.desc;
    const struct vae_arch *vae = from->has_vae ? &from->vae.arch : NULL;
    struct facts *f = mem_alloc(sizeof *f);
    if (!f) return err_set(e, E_NOMEM, "no memory for a model");
    atomic_init(&f->refs, 1);
    struct engine_model *m = &f->model;
    int rc = served_check(d, vae, &m->sampler, e);
    if (rc) return mem_free(f), rc;
    snprintf(m->name, sizeof m->name, "%s", from->name);
    memcpy(m->digest, from->dir.digest, sizeof m->digest);
    remember(m, from->before);
    m->image_size = d->arch.input_size * (vae ? vae_factor(vae) : 1);
    m->image_channels = vae ? vae->image_channels : d->arch.in_channels;
    guide_rule(m, d);
    m->desc.arch = d->arch; // what the canary reads
    *out = f;
    return OK;
}

void facts_take(struct facts *f, struct source *from) {
    f->model.desc = from->dir.desc;
    from->dir.desc = (struct model_desc){0};
}

static int make_vae(struct served *s, const struct source *from, struct err *e) {
    const struct arch *a = &from->dir.desc.arch;
    struct vae_size size = {.height = a->input_size, .width = a->input_size, .decode = true};
    if (!from->has_vae) return OK;
    if (vae_new(&s->vae, s->kern, &from->vae.arch, &from->vae.table, &size, e)) {
        err_prefix(e, "its VAE");
        return e->status;
    }
    size_t most = (size_t)vae_pictures(s->vae);
    s->z = mem_array(most * runner_numel(s->runner), sizeof *s->z);
    s->picture = mem_array(most * vae_numel(s->vae, VAE_DECODE), sizeof *s->picture);
    s->facts->model.decode_rows = (int)ceil(vae_flops(s->vae, VAE_DECODE) / dit_flops(a));
    return s->z && s->picture ? OK : err_set(e, E_NOMEM, "no memory for a picture");
}

static int make_slots(struct served *s, int slots, struct err *e) {
    size_t n = (size_t)slots;
    s->runs = mem_array(n, sizeof *s->runs);
    s->batch = mem_array(n, sizeof(struct runner_slot *));
    s->slots = mem_array(n, sizeof *s->slots);
    s->freed = mem_array(n, sizeof *s->freed);
    s->pixels = mem_array(runner_numel(s->runner), sizeof *s->pixels);
    if (!s->runs || !s->batch || !s->slots || !s->freed || !s->pixels)
        return err_set(e, E_NOMEM, "no memory for %d slots", slots);
    return 0;
}

int served_pixels(uint8_t *dst, const float *x, int channels, int side, bool edm, struct err *e) {
    size_t plane = (size_t)side * (size_t)side;
    for (size_t i = 0; i < plane; i++)
        for (int c = 0; c < channels; c++) {
            float v = x[(size_t)c * plane + i];
            if (!isfinite(v)) return err_set(e, E_NONFINITE, "the sample is not finite: channel %d, pixel %zu", c, i);
            v = edm ? (v + 1) * 127.5f : 127.5f * v + 128.0f;
            *dst++ = v <= 0 ? 0 : v >= 255 ? 255 : (uint8_t)v;
        }
    return 0;
}

static int canary(struct served *s, struct err *e) {
    const struct engine_model *m = &s->facts->model;
    struct runner_slot slot = {.slot = 0, .label = 0, .seed = 1, .null_of = -1}, *one = &slot;
    struct sampler_spec spec;
    int rows = 1;
    sampler_defaults(&spec, &m->sampler, sampler_home_type(&m->sampler));
    spec.method = METHOD_EULER;
    spec.steps = spec.type == SAMPLER_DDPM ? 2 : 1; // of two the first is at full noise and reads the variance
    spec.guide_from = 0;
    spec.guide_to = 1;
    spec.guidance = m->desc.arch.class_dropout ? 2 : 1;
    spec.guide_channels = m->guide_channels;
    int rc = runner_start(s->runner, one, &spec, &m->sampler, e);
    if (!rc && slot.done)
        rc = err_set(e, slot.err.status ? slot.err.status : E_INTERNAL, "the trial evaluation was not made: %s", slot.err.text);
    int64_t start = engine_now_us();
    if (!rc) rc = runner_step(s->runner, &one, 1, &rows, e);
    if (!rc) rc = runner_read(s->runner, 0, s->pixels, e); // a device is done only now
    s->row_ms = (double)(engine_now_us() - start) / 1000 / rows;
    if (!rc && !floats_finite(s->pixels, runner_numel(s->runner)))
        rc = err_set(e, E_NONFINITE, "a trial evaluation of its network gave numbers that are not finite");
    return rc;
}

// What the canary left in s->pixels, through the VAE.
static int canary_picture(struct served *s, struct err *e) {
    if (!s->vae) return OK;
    model_desc_to_vae(&s->facts->model.desc, s->z, s->pixels);
    int rc = vae_run(s->vae, VAE_DECODE, s->z, s->picture, e);
    if (!rc && !floats_finite(s->picture, vae_numel(s->vae, VAE_DECODE)))
        rc = err_set(e, E_NONFINITE, "a trial picture of its VAE has numbers that are not finite");
    return rc;
}

static int open_kern(struct served *s, const struct kern_config *config, struct err *e) {
    char why[256] = "";
    int rc = kern_open(&s->kern, config, why, sizeof why);
    return rc ? err_set(e, rc == KERN_ENOMEM ? E_NOMEM : E_DEVICE, "back end '%s': %s", config->backend, why) : OK;
}

size_t served_estimate(const struct model_desc *d, const struct sched_limits *limits) {
    char name[64];
    int64_t shape[TENSOR_MAX_DIMS];
    size_t side = (size_t)d->arch.input_size;
    size_t bytes = (size_t)limits->max_rows * KERN_COLS * (size_t)d->arch.in_channels * side * side * sizeof(float);
    for (long i = 0, ndim; (ndim = arch_tensor(&d->arch, i, name, shape, NULL)); i++) {
        size_t count = 1;
        for (long k = 0; k < ndim; k++) count *= (size_t)shape[k];
        bytes += count * sizeof(float);
    }
    return bytes;
}

#define SPARE ((size_t)64 << 20) // for everybody else

int served_room(struct kern *k, size_t bytes, struct err *e) {
    size_t there = fault_hit(FAULT_ROOM) ? 0 : k ? k->device_memory(k) : kern_host_memory();
    if (there >= SPARE && there - SPARE >= bytes) return OK;
    return err_set(e, E_NOMEM, "it needs about %zu MB of %s memory beside what is served; %zu MB are free, of which %zu stay so", bytes >> 20,
                   k ? "device" : "host", there >> 20, SPARE >> 20);
}

// What it takes on a device with memory of its own is known to be there.
static int check_device_room(const struct served *s, const struct engine *g, const struct source *from, struct err *e) {
    return from->bytes && !g->on_host ? served_room(s->kern, from->bytes, e) : OK;
}

static int build(struct served **out, struct device *d, const struct kern_config *config, struct facts *facts, const struct source *from, struct err *e) {
    const struct model_dir *dir = &from->dir;
    const struct sched_limits *limits = &d->engine->limits;
    *out = NULL;
    struct served *s = mem_alloc(sizeof *s);
    if (!s) return err_set(e, E_NOMEM, "no memory for a model");
    s->device = d;
    s->facts = facts;
    atomic_fetch_add(&facts->refs, 1);
    int rc = open_kern(s, config, e), slots = limits->max_rows;
    if (!rc) rc = check_device_room(s, d->engine, from, e);
    if (!rc) rc = sched_new(&s->sched, limits, e);
    if (!rc) rc = runner_new(&s->runner, s->kern, &dir->desc.arch, dir->weights, slots, limits->max_rows, e);
    if (!rc) rc = make_slots(s, slots, e);
    if (!rc) rc = make_vae(s, from, e);
    if (!rc) {
        s->bytes = facts->model.device_bytes = runner_bytes(s->runner) + (s->vae ? vae_bytes(s->vae) : 0);
        rc = canary(s, e);
        if (!rc) rc = canary_picture(s, e);
    }
    if (s->kern && *s->kern->note) log_warn("back end", log_str("device", d->name), log_str("note", s->kern->note));
    if (rc) {
        served_free(s);
        return err_set(e, rc, "it could not be built");
    }
    *out = s;
    return OK;
}

// A network whose residual stream leaves float16's range gets one in float32.
int served_new(struct served **out, struct device *d, struct facts *facts, const struct source *from, struct err *e) {
    struct kern_config config = d->config;
    int rc = build(out, d, &config, facts, from, e);
    bool beyond = !rc && (*out)->kern->overflows && (*out)->kern->overflows((*out)->kern);
    if ((rc != E_NONFINITE && !beyond) || config.act == KERN_F32 || config.exact_stream) return rc;
    log_warn("residual stream in float32", log_str("model", from->name), log_str("device", d->name),
             log_str("because", rc ? e->text : "a trial evaluation left the range of float16"));
    if (!rc) served_free(*out);
    config.exact_stream = true;
    err_clear(e);
    return build(out, d, &config, facts, from, e);
}

void served_free(struct served *s) {
    if (!s) return;
    if (s->kern) s->kern->use(s->kern);
    decode_drop(s, NULL);
    vae_free(s->vae);
    runner_free(s->runner);
    kern_close(s->kern);
    sched_free(s->sched);
    facts_unref(s->facts);
    void *arrays[] = {s->runs, s->batch, s->slots, s->freed, s->pixels, s->z, s->picture};
    for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++) mem_free(arrays[i]);
    mem_free(s);
}
