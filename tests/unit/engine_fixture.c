// SPDX-License-Identifier: MIT
#include "tests/unit/engine_fixture.h"

#include <ftw.h>
#include <unistd.h>

#include "core/base/mem.h"
#include "core/io/file.h"
#include "core/io/model_publish.h"
#include "core/io/safetensors.h"
#include "tests/test.h"

/* ---- models ---- */

static char folder[256];

static int remove_one(const char *path, const struct stat *st, int flag, struct FTW *ftw) {
    (void)st, (void)flag, (void)ftw;
    return remove(path);
}

static void remove_folder(void) { nftw(folder, remove_one, 16, FTW_DEPTH | FTW_PHYS); }

const char *fixture_dir(void) {
    if (folder[0]) return folder;
    const char *tmp = getenv("TMPDIR");
    snprintf(folder, sizeof folder, "%s/sitd-engine-XXXXXX", tmp ? tmp : "/tmp");
    CHECK(mkdtemp(folder) != NULL);
    atexit(remove_folder);
    return folder;
}

#define MAX_TENSORS 64
struct weights {
    struct tensor t[MAX_TENSORS];
    struct tensor_table table;
    uint32_t random;
};

static float *add(struct weights *w, float scale, const char *name, int ndim, int64_t a, int64_t b, int64_t c, int64_t d) {
    CHECK(w->table.n < MAX_TENSORS);
    struct tensor *t = &w->t[w->table.n++];
    *t = (struct tensor){.name = mem_strdup(name), .dtype = DT_F32, .ndim = ndim, .shape = {a, b, c, d}, .count = 1};
    for (int i = 0; i < ndim; i++) t->count *= (size_t)t->shape[i];
    t->bytes = t->count * sizeof(float);
    float *data = mem_array(t->count, sizeof *data);
    for (size_t i = 0; i < t->count; i++) {
        w->random = w->random * 1664525u + 1013904223u;
        data[i] = scale * ((float)(w->random >> 8) / (float)(1 << 23) - 1);
    }
    t->data = data;
    return data;
}

static void add_linear(struct weights *w, const char *name, int out, int in) {
    char full[96];
    snprintf(full, sizeof full, "%s.weight", name);
    add(w, 0.25f, full, 2, out, in, 0, 0);
    snprintf(full, sizeof full, "%s.bias", name);
    add(w, 0.1f, full, 1, out, 0, 0, 0);
}

// width: of the blocks; cond: of the vectors that condition them
static void add_blocks(struct weights *w, const char *blocks, int depth, int width, int cond) {
    const struct {
        const char *name;
        int out, in;
    } layers[] = {{"attn.qkv", 3 * width, width},
                  {"attn.proj", width, width},
                  {"mlp.fc1", 4 * width, width},
                  {"mlp.fc2", width, 4 * width},
                  {"adaLN_modulation.1", 6 * width, cond}};
    for (int i = 0; i < depth; i++)
        for (size_t k = 0; k < sizeof layers / sizeof *layers; k++) {
            char name[64];
            snprintf(name, sizeof name, "%s.%d.%s", blocks, i, layers[k].name);
            add_linear(w, name, layers[k].out, layers[k].in);
        }
}

static void make_weights(struct weights *w, const struct arch *a, const struct tiny *tiny) {
    int d = a->hidden_size, p = a->patch_size, rows = a->num_classes + a->class_dropout;
    int last_width = a->decoder.depth ? a->decoder.hidden_size : d;
    *w = (struct weights){.random = (uint32_t)tiny->seed * 7919u + 17u};
    w->table.tensors = w->t;
    add(w, 0.4f, "x_embedder.proj.weight", 4, d, a->in_channels, p, p);
    add(w, 0.1f, "x_embedder.proj.bias", 1, d, 0, 0, 0);
    add_linear(w, "t_embedder.mlp.0", d, 256);
    add_linear(w, "t_embedder.mlp.2", d, d);
    if (a->one_hot) add(w, 0.8f, "y_embedder.embedding_table.weight", 2, d, a->num_classes, 0, 0);
    else {
        float *labels = add(w, 0.8f, "y_embedder.embedding_table.weight", 2, rows, d, 0, 0);
        for (int i = 0; tiny->bad_class > 0 && i < d; i++) labels[tiny->bad_class * d + i] = 3e38f;
    }
    add_blocks(w, "blocks", a->depth, d, d);
    if (a->decoder.depth) {
        add_linear(w, "decoder_layer.linear", last_width, d);
        add_linear(w, "decoder_layer.adaLN_modulation.1", 2 * d, d);
        add_blocks(w, "decoder_blocks", a->decoder.depth, last_width, d);
    }
    add_linear(w, "final_layer.adaLN_modulation.1", 2 * last_width, d);
    add_linear(w, "final_layer.linear", (1 + a->learn_sigma) * a->in_channels * p * p, last_width);
    const struct tensor *last = &w->t[w->table.n - 2]; // its weight
    for (size_t i = 0; tiny->huge && i < last->count; i++) ((float *)last->data)[i] = 3e38f;
}

static int collect(void *file, const void *bytes, size_t n, struct err *e) { return file_out_write(file, bytes, n, e); }

static void write_vae(const char *model, const struct tiny *tiny, char sha256[65]) {
    struct vae_weights w;
    struct file_out out;
    struct err e = {0};
    char path[700], config[64];
    void *bytes;
    size_t n;
    CHECK_OK(vae_random(&w, tiny->vae, (uint64_t)tiny->seed, &e), &e);
    snprintf(path, sizeof path, "%s/vae", model);
    CHECK_OK(file_make_dir(path, &e), &e);
    snprintf(path, sizeof path, "%s/vae/config.json", model);
    int length = snprintf(config, sizeof config, "{\"norm_num_groups\": %d}", tiny->vae->groups);
    CHECK_OK(file_write(path, config, (size_t)length, &e), &e);
    snprintf(path, sizeof path, "%s/vae/diffusion_pytorch_model.safetensors", model);
    CHECK_OK(file_out_open(&out, path, &e), &e);
    CHECK_OK(safetensors_write(&w.table, NULL, 0, collect, &out, &e), &e);
    CHECK_OK(file_out_commit(&out, NULL, &e), &e);
    CHECK_OK(file_read(&bytes, &n, path, (size_t)1 << 30, &e), &e);
    CHECK(digest_hex(sha256, bytes, n) == 0);
    mem_free(bytes);
    vae_weights_free(&w);
}

void fixture_model(const struct tiny *tiny) {
    static struct weights w;
    bool sit = !tiny->family || strcmp(tiny->family, "sit") == 0, masked = !sit && strcmp(tiny->family, "maskdit") == 0;
    struct model_desc d = {.guide_channels = sit || masked ? -1 : 3,
                           .is_default = tiny->is_default,
                           .step = 7};
    d.arch = (struct arch){.input_size = tiny->side ? tiny->side : 8,
                           .patch_size = 2,
                           .in_channels = tiny->channels ? tiny->channels : 1,
                           .hidden_size = 32,
                           .depth = 2,
                           .num_heads = 4,
                           .num_classes = 10,
                           .mlp_ratio = 4,
                           .class_dropout = !tiny->no_null_class,
                           .learn_sigma = !masked,
                           .one_hot = masked};
    if (masked) d.arch.decoder.hidden_size = 16, d.arch.decoder.depth = 1, d.arch.decoder.num_heads = 2;
    strcpy(d.family, tiny->family ? tiny->family : "sit");
    if (sit) strcpy(d.path, "linear"), strcpy(d.prediction, "velocity");
    struct err e = {0};
    char path[512];
    make_weights(&w, &d.arch, tiny);
    snprintf(path, sizeof path, "%s/%s", fixture_dir(), tiny->name);
    if (tiny->vae || tiny->latents) d.latent.scale = 0.5;
    if (tiny->vae) {
        strcpy(d.latent.vae_file, "vae");
        write_vae(path, tiny, d.latent.vae_sha256);
        if (tiny->vae_sha256) strcpy(d.latent.vae_sha256, tiny->vae_sha256);
    }
    CHECK_OK(model_publish(path, &d, &w.table, &e), &e);
    for (int i = 0; i < w.table.n; i++) {
        mem_free((void *)w.t[i].name);
        mem_free((void *)w.t[i].data);
    }
}

/* ---- listening ---- */

void hear_start(struct heard *h) {
    *h = (struct heard){0};
    pthread_mutex_init(&h->lock, NULL);
    pthread_cond_init(&h->more, NULL);
    h->jobs = calloc(HEARD_JOBS, sizeof *h->jobs);
    CHECK(h->jobs != NULL);
}

void hear_stop(struct heard *h) {
    CHECK(h->broken == 0);
    free(h->jobs);
    pthread_cond_destroy(&h->more);
    pthread_mutex_destroy(&h->lock);
}

static void hear_image(struct heard *h, struct heard_job *j, const struct engine_image *m) {
    size_t bytes = (size_t)m->width * (size_t)m->height * (size_t)m->channels;
    if (m->index < 0 || m->index >= HEARD_IMAGES || j->seen[m->index] || !j->started || bytes > sizeof j->pixels[0]) h->broken++;
    else {
        j->seen[m->index] = true;
        memcpy(j->pixels[m->index], m->pixels, bytes);
    }
    j->images++;
    mem_free(m->pixels);
}

static void hear_job(struct heard *h, const struct engine_event *ev) {
    struct heard_job *j = &h->jobs[ev->job % HEARD_JOBS];
    if (!ev->job || j->ended) h->broken++;
    if (ev->kind == EV_STARTED) h->broken += j->started++ > 0;
    else if (ev->kind == EV_IMAGE) hear_image(h, j, &ev->image);
    else if (ev->kind == EV_PROGRESS) {
        h->broken += ev->progress < j->progress || ev->progress > 1;
        j->progress = ev->progress;
        j->tellings++;
    } else {
        j->ended++;
        j->end = *ev;
        h->broken += (ev->kind == EV_FAILED) != (ev->err.status != 0);
    }
}

void hear(void *ctx, const struct engine_event *ev) {
    struct heard *h = ctx;
    pthread_mutex_lock(&h->lock);
    if (ev->kind == EV_MODEL) {
        h->models[h->n_models % 8] = ev->err;
        strcpy(h->names[h->n_models++ % 8], ev->model);
    } else hear_job(h, ev);
    pthread_cond_broadcast(&h->more);
    pthread_mutex_unlock(&h->lock);
}

const struct heard_job *hear_end(struct heard *h, uint64_t id) {
    struct heard_job *j = &h->jobs[id % HEARD_JOBS];
    pthread_mutex_lock(&h->lock);
    while (!j->ended) pthread_cond_wait(&h->more, &h->lock);
    pthread_mutex_unlock(&h->lock);
    return j;
}

void hear_started(struct heard *h, uint64_t id) {
    struct heard_job *j = &h->jobs[id % HEARD_JOBS];
    pthread_mutex_lock(&h->lock);
    while (!j->started) pthread_cond_wait(&h->more, &h->lock);
    pthread_mutex_unlock(&h->lock);
}

const struct err *hear_model(struct heard *h, const char *name) {
    const struct err *found = NULL;
    pthread_mutex_lock(&h->lock);
    for (;;) {
        for (int i = 0; i < h->n_models; i++)
            if (!strcmp(h->names[i], name)) found = &h->models[i];
        if (found) break;
        pthread_cond_wait(&h->more, &h->lock);
    }
    pthread_mutex_unlock(&h->lock);
    return found;
}

/* ---- engines and jobs ---- */

struct engine_options fixture_options(struct heard *h) {
    return (struct engine_options){.models_dir = fixture_dir(),
                                   .backend = "ref",
                                   .precision = "f32",
                                   .max_rows = 8,
                                   .threads = 1,
                                   .max_jobs = 4096,
                                   .max_images = 8192,
                                   .event = hear,
                                   .ctx = h};
}

struct engine *fixture_open(struct heard *h, const struct engine_options *o) {
    struct engine *g;
    struct err e = {0};
    struct engine_stats s;
    CHECK_OK(engine_open(&g, o, &e), &e);
    engine_stats(g, &s);
    int models = s.models_loading + s.models_ready + s.models_failed;
    pthread_mutex_lock(&h->lock);
    while (h->n_models < models) pthread_cond_wait(&h->more, &h->lock);
    pthread_mutex_unlock(&h->lock);
    return g;
}

struct engine_job fixture_job(const char *model, int n, const int32_t *classes, enum sampler_type type,
                              enum sampler_method method, int steps) {
    struct engine_job job = {.n = n, .classes = classes, .seed = 42};
    struct sampler_model linear = {.path = PATH_LINEAR, .prediction = PRED_VELOCITY};
    snprintf(job.model, sizeof job.model, "%s", model);
    sampler_defaults(&job.sampler, &linear, type);
    job.sampler.method = method;
    if (method != METHOD_DOPRI5) job.sampler.steps = steps;
    job.sampler.guide_channels = 1;
    return job;
}

uint64_t fixture_submit(struct engine *g, const struct engine_job *job) {
    struct err e = {0};
    uint64_t id;
    CHECK_OK(engine_submit(g, job, &id, NULL, &e), &e);
    CHECK(id != 0);
    return id;
}

void fixture_same(const struct heard_job *a, const struct heard_job *b, int images) {
    CHECK(a->end.kind == EV_DONE && b->end.kind == EV_DONE && a->images == images && b->images == images);
    for (int i = 0; i < images; i++)
        CHECK(a->seen[i] && b->seen[i] && memcmp(a->pixels[i], b->pixels[i], sizeof a->pixels[i]) == 0);
}
