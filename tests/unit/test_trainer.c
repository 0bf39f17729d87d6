// SPDX-License-Identifier: MIT
#include <math.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/base/fault.h"
#include "core/base/mem.h"
#include "core/io/checkpoint.h"
#include "core/io/file.h"
#include "core/io/pt.h"
#include "core/train/snapshot.h"
#include "core/train/trainer.h"
#include "tests/test.h"
#include "tests/unit/tiny_train.h"

static char dir[64], out[96];
static struct train_config config;
static struct data *data;
static volatile sig_atomic_t stop;

// A tiny SiT on thirteen pictures of noise. out: a fresh folder.
static void begin(void) {
    data = tiny_data(dir, true);
    snprintf(out, sizeof out, "%s/run", dir);
    config = tiny_train(out);
    config.objective.drop = 0.2, config.objective.seed = 5, config.flip = true;
    config.steps = 20, config.batch = 6, config.microbatch = 3, config.log_every = 5, config.keep = 3, config.data_threads = 2;
    config.decay = 0.01, config.clip = 1, config.schedule = LR_COSINE, config.warmup = 3;
    config.n_ema = 2, config.ema[1] = 0.99;
    config.sample_steps = 2, config.sample_each = 1, config.sample_guidance = 2;
    stop = 0;
}

static void end(void) {
    char command[128];
    data_close(data);
    snprintf(command, sizeof command, "rm -r %s", dir);
    CHECK(system(command) == 0);
}

static const char *in_run(const char *name) {
    static char paths[4][256];
    static int turn;
    char *p = paths[turn++ % 4];
    snprintf(p, sizeof *paths, "%s/%s", out, name);
    return p;
}

/* ---- what happens on the way ---- */

struct heard {
    int saved, published, pictures, trouble, stats;
    int64_t published_at[32];
    double first_loss, last_loss;
    char text[1400];
    int64_t stop_at, fault_at; // steps at which the run is stopped, or the disk becomes full until that was noticed
    const char *before_fault;  // a file that must be there first
};

static void on_step(void *ctx, int64_t step, double loss, double left) {
    struct heard *h = ctx;
    (void)loss, (void)left;
    if (step == h->stop_at) stop = 1;
    if (step != h->fault_at) return;
    for (int i = 0; i < 5000 && access(h->before_fault, F_OK); i++) usleep(1000);
    fault_arm(FAULT_WRITE, 1, true);
}
static void on_stats(void *ctx, const struct train_stats *s) {
    struct heard *h = ctx;
    if (!h->stats++) h->first_loss = s->loss;
    h->last_loss = s->loss;
    CHECK(s->grad_norm > 0 && s->update_norm > 0 && s->images_per_second > 0 && s->mfu == 0);
}
static void on_note(void *ctx, enum train_note kind, int64_t step, const char *text) {
    struct heard *h = ctx;
    if (kind == NOTE_PUBLISHED) h->published_at[h->published % 32] = step;
    h->saved += kind == NOTE_SAVED, h->published += kind == NOTE_PUBLISHED, h->pictures += kind == NOTE_PICTURES;
    if (kind != NOTE_TROUBLE) return;
    fault_disarm();
    h->trouble++;
    snprintf(h->text, sizeof h->text, "%s", text);
}

// Runs the configuration; the arrays are copied out where asked.
static int run(struct heard *h, float *arrays[SNAPSHOT_ARRAYS], size_t *n, struct err *e) {
    struct trainer *t;
    struct train_events on = {h, on_stats, on_step, on_note};
    int rc = trainer_new(&t, &config, data, NULL, &on, e);
    if (rc != OK) return rc;
    rc = trainer_run(t, &stop, e);
    for (int i = 0; arrays && i < SNAPSHOT_EMA + config.n_ema; i++) {
        const float *v = trainer_weights(t, i, e);
        CHECK(v);
        *n = trainer_params(t); // at most the floats of an array: gaps come on top
        arrays[i] = mem_dup(v, *n * sizeof(float));
    }
    trainer_free(t);
    return rc;
}

TEST_LIMIT(trainer_continues_bit_for_bit, 120) {
    float *whole[SNAPSHOT_ARRAYS], *cut[SNAPSHOT_ARRAYS];
    size_t n, m;
    struct err e = {0};
    struct heard h = {0}, g = {.stop_at = 7};
    begin();
    CHECK_OK(run(&h, whole, &n, &e), &e);
    CHECK(h.stats == 4 && h.saved == 1 && h.last_loss < h.first_loss);
    CHECK(access(in_run("checkpoints/step-00000020.safetensors"), F_OK) == 0);
    snprintf(out, sizeof out, "%s/second", dir);
    config.resume = "auto"; // nothing there yet: it begins
    CHECK_OK(run(&g, NULL, NULL, &e), &e);
    CHECK(access(in_run("checkpoints/step-00000007.safetensors"), F_OK) == 0);
    stop = 0, g.stop_at = 13, config.data_threads = 1;
    CHECK_OK(run(&g, NULL, NULL, &e), &e);
    stop = 0, g.stop_at = 0;
    CHECK_OK(run(&g, cut, &m, &e), &e);
    CHECK(n == m);
    for (int i = 0; i < SNAPSHOT_EMA + 2; i++) {
        CHECK(memcmp(whole[i], cut[i], n * sizeof(float)) == 0);
        mem_free(whole[i]), mem_free(cut[i]);
    }
    end();
}

// A cut falls into a window of losses, and what the window was is in the last checkpoint's `best` as well.
TEST_LIMIT(trainer_publishes_on_improvement_as_if_never_cut, 120) {
    struct err e = {0};
    struct heard h = {0}, g = {0};
    void *whole, *cut;
    size_t n, m;
    char models[128];
    begin();
    snprintf(models, sizeof models, "%s/models/x", dir);
    config.publish = models, config.publish_every = 5, config.publish_improved = true, config.steps = 40;
    CHECK_OK(run(&h, NULL, NULL, &e), &e);
    CHECK_OK(file_read(&whole, &n, in_run("checkpoints/step-00000040.safetensors"), 1 << 24, &e), &e);
    CHECK(h.published > 1 && h.published < 8);
    snprintf(out, sizeof out, "%s/second", dir);
    config.resume = "auto", config.desc.step = 0;
    for (int64_t at = 4; at <= 44; at += 5) { // windows of four steps and one
        stop = 0, g.stop_at = at;
        CHECK_OK(run(&g, NULL, NULL, &e), &e);
    }
    CHECK(g.published == h.published && memcmp(g.published_at, h.published_at, sizeof h.published_at) == 0);
    CHECK_OK(file_read(&cut, &m, in_run("checkpoints/step-00000040.safetensors"), 1 << 24, &e), &e);
    CHECK(n == m && memcmp(whole, cut, n) == 0);
    mem_free(whole), mem_free(cut);
    end();
}

static void put_text(const char *from, const char *to, const char *key, const char *instead) { // of equal length: no offset moves
    struct err e = {0};
    void *bytes;
    size_t n;
    CHECK_OK(file_read(&bytes, &n, from, 1 << 24, &e), &e);
    char *at = memmem(bytes, n, key, strlen(key));
    CHECK(at && strlen(key) == strlen(instead));
    memcpy(at, instead, strlen(key));
    CHECK_OK(file_write(to, bytes, n, &e), &e);
    mem_free(bytes);
}

TEST_LIMIT(trainer_reads_checkpoints_without_a_window, 120) {
    struct err e = {0};
    struct heard h = {.stop_at = 7};
    char path[256], old[256];
    begin();
    CHECK_OK(run(&h, NULL, NULL, &e), &e);
    snprintf(path, sizeof path, "%s", in_run("checkpoints/step-00000007.safetensors"));
    snprintf(old, sizeof old, "%s", in_run("old.safetensors"));
    config.resume = old;
    put_text(path, old, "\"window_steps\"", "\"window_other\"");
    stop = 0, h.stop_at = 0;
    CHECK_OK(run(&h, NULL, NULL, &e), &e);
    put_text(path, old, "\"window_steps\":\"7\"", "\"window_steps\":\"8\"");
    CHECK(run(&h, NULL, NULL, &e) == E_FORMAT && !strcmp(e.param, "window_steps"));
    end();
}

TEST_LIMIT(trainer_keeps_the_newest_and_every_kth, 120) {
    struct err e = {0};
    struct heard h = {0};
    begin();
    config.save_every = 2, config.keep = 2, config.keep_every = 6;
    CHECK_OK(run(&h, NULL, NULL, &e), &e);
    CHECK(h.saved == 10 && h.trouble == 0);
    for (int step = 2; step <= 20; step += 2) {
        char name[64];
        snprintf(name, sizeof name, "checkpoints/step-%08d.safetensors", step);
        CHECK((access(in_run(name), F_OK) == 0) == (step % 6 == 0 || step >= 18));
    }
    end();
}

// A checkpoint that was cut, as by a machine that lost power, is told and passed over; the run ends as it would have
TEST_LIMIT(trainer_continues_before_a_broken_checkpoint, 120) {
    struct err e = {0};
    struct heard h = {0};
    void *whole, *again;
    size_t n, m;
    char last[256];
    begin();
    config.save_every = 5;
    CHECK_OK(run(&h, NULL, NULL, &e), &e);
    snprintf(last, sizeof last, "%s", in_run("checkpoints/step-00000020.safetensors"));
    CHECK_OK(file_read(&whole, &n, last, 1 << 24, &e), &e);
    CHECK(truncate(last, (off_t)n / 2) == 0);
    config.resume = "auto";
    CHECK_OK(run(&h, NULL, NULL, &e), &e);
    CHECK(h.trouble == 1 && strstr(h.text, last) && strstr(h.text, "before it"));
    CHECK_OK(file_read(&again, &m, last, 1 << 24, &e), &e);
    CHECK(n == m && memcmp(whole, again, n) == 0);
    ((char *)again)[m - 20000] ^= 1; // one bit of a tensor
    CHECK_OK(file_write(last, again, m, &e), &e);
    h = (struct heard){0};
    CHECK_OK(run(&h, NULL, NULL, &e), &e);
    CHECK(h.trouble == 1 && strstr(h.text, "damaged") && strstr(h.text, "before it"));
    mem_free(whole), mem_free(again);
    // options that do not fit are no reason to look further, and what cannot be read at all is no new run
    CHECK(truncate(last, 100) == 0);
    config.batch = 12;
    CHECK(run(&h, NULL, NULL, &e) == E_CONFLICT && strstr(e.text, "batch") && strstr(e.text, "step-00000015"));
    config.batch = 6, h = (struct heard){0};
    for (int step = 5; step < 20; step += 5) {
        char name[64];
        snprintf(name, sizeof name, "checkpoints/step-%08d.safetensors", step);
        if (access(in_run(name), F_OK) == 0) CHECK(truncate(in_run(name), 9) == 0);
    }
    err_clear(&e);
    CHECK(run(&h, NULL, NULL, &e) == E_FORMAT && h.trouble >= 2 && strstr(e.text, last) && strstr(e.text, "begin anew"));
    end();
}

TEST_LIMIT(trainer_goes_on_when_the_disk_is_full, 120) {
    struct err e = {0};
    begin();
    struct heard h = {.fault_at = 6, .before_fault = in_run("checkpoints/step-00000005.safetensors")};
    config.save_every = 5;
    CHECK_OK(run(&h, NULL, NULL, &e), &e);
    CHECK(h.trouble == 1 && h.saved == 3);
    CHECK(strstr(h.text, "step-00000010.safetensors") && strstr(h.text, "The last one:") &&
          strstr(h.text, "step-00000005.safetensors"));
    CHECK(access(in_run("checkpoints/step-00000005.safetensors"), F_OK) == 0 &&
          access(in_run("checkpoints/step-00000010.safetensors"), F_OK) != 0);
    CHECK(access(in_run("checkpoints/step-00000020.safetensors"), F_OK) == 0);
    // Full at the end too: the run says that it could not save, and what is there stays
    config.steps = 40, config.resume = "auto", config.save_every = 0;
    h = (struct heard){.fault_at = 25, .before_fault = out};
    CHECK(run(&h, NULL, NULL, &e) == E_IO);
    CHECK(h.trouble == 1 && access(in_run("checkpoints/step-00000020.safetensors"), F_OK) == 0);
    end();
}

TEST_LIMIT(trainer_stops_at_numbers_that_are_not_finite, 120) {
    struct err e = {0};
    struct heard h = {0};
    begin();
    config.save_every = 1, config.lr = 1e30, config.clip = 0, config.warmup = 0, config.schedule = LR_CONSTANT;
    CHECK(run(&h, NULL, NULL, &e) == E_NONFINITE);
    CHECK(strstr(e.text, "step 2: ") && strstr(e.text, e.param) && strstr(e.text, "step-00000001.safetensors") && e.param[0]);
    CHECK(access(in_run("checkpoints/step-00000001.safetensors"), F_OK) == 0 &&
          access(in_run("checkpoints/step-00000002.safetensors"), F_OK) != 0);
    end();
}

TEST_LIMIT(trainer_refuses_what_does_not_fit, 120) {
    static const struct {
        const char *param, *text;
    } cases[] = {{"batch", "batch = 6, this one 12"},     {"depth", "depth = 1"}, {"ema", "ema = 0.9,0.99"}, {"seed", "seed = 5"},
                 {"path", "path = linear, this one gvp"}, {"width", "width = 16"}};
    struct heard h = {0};
    struct err e = {0};
    begin();
    config.steps = 2, config.warmup = 0;
    CHECK_OK(run(&h, NULL, NULL, &e), &e);
    struct train_config good = config;
    good.resume = "auto";
    for (int i = 0; i < 6; i++) {
        config = good;
        err_clear(&e);
        if (i == 0) config.batch = 12;
        if (i == 1) config.desc.arch.depth = 2;
        if (i == 2) config.ema[1] = 0.999;
        if (i == 3) config.objective.seed = 6;
        if (i == 4) config.objective.path = PATH_GVP;
        if (i == 5) config.desc.arch.hidden_size = 32;
        int rc = run(&h, NULL, NULL, &e);
        if (rc != E_CONFLICT || strcmp(e.param, cases[i].param) || !strstr(e.text, cases[i].text))
            test_fail(__FILE__, __LINE__, "%d %s: %s", rc, e.param, e.text);
    }
    config = good, h = (struct heard){0};
    err_clear(&e);
    CHECK_OK(run(&h, NULL, NULL, &e), &e); // done already: nothing is left to do
    CHECK(h.stats == 0 && h.saved == 0);
    config.steps = 1;
    CHECK(run(&h, NULL, NULL, &e) == E_CONFLICT && !strcmp(e.param, "steps") && strstr(e.text, "step-00000002.safetensors is of step 2") &&
          strstr(e.text, "a run of 1:"));
    config = good;
    err_clear(&e);
    config.resume = in_run("none.safetensors");
    CHECK(run(&h, NULL, NULL, &e) == E_NOTFOUND);
    err_clear(&e);
    CHECK_OK(file_write(in_run("x.safetensors"), "garbage", 7, &e), &e);
    config.resume = in_run("x.safetensors");
    CHECK(run(&h, NULL, NULL, &e) == E_FORMAT && strstr(e.text, "x.safetensors"));
    err_clear(&e);
    config.resume = "tests/golden/sit-tiny.safetensors";
    CHECK(run(&h, NULL, NULL, &e) == E_UNSUPPORTED && strstr(e.text, "--init"));
    err_clear(&e);
    config = good, config.resume = NULL, config.desc.arch.num_classes = 2, config.objective.null_label = 2;
    CHECK(run(&h, NULL, NULL, &e) == E_RANGE && strstr(e.text, "labels up to 2"));
    err_clear(&e);
    config = good, config.microbatch = 4;
    CHECK(run(&h, NULL, NULL, &e) == E_CONFLICT && !strcmp(e.param, "microbatch"));
    end();
}

/* ---- what it writes and reads ---- */

TEST_LIMIT(trainer_publishes_and_shows, 120) {
    struct err e = {0};
    struct heard h = {0};
    struct model_dir m;
    char models[128];
    begin();
    snprintf(models, sizeof models, "%s/models/x", dir);
    config.publish = models, config.publish_every = 5, config.sample_every = 10;
    CHECK_OK(run(&h, NULL, NULL, &e), &e);
    CHECK(h.published == 4 && h.pictures == 2 && h.trouble == 0);
    CHECK_OK(model_dir_open(&m, models, &e), &e);
    CHECK(m.desc.step == 20 && m.desc.n_loss_curve > 1 && m.desc.guide_channels == -1);
    model_dir_close(&m);
    CHECK(access(in_run("samples/step-00000010.png"), F_OK) == 0 && access(in_run("samples/step-00000020.png"), F_OK) == 0);
    // On improvement only: at a rate of almost 0 the lowest mean is seen early
    snprintf(out, sizeof out, "%s/still", dir);
    config.publish_improved = true, config.lr = 1e-12, config.publish_every = 1, config.sample_every = 0, config.desc.step = 0;
    h = (struct heard){0};
    CHECK_OK(run(&h, NULL, NULL, &e), &e);
    CHECK(h.published >= 1 && h.published < 12);
    end();
}

// The fixture's network as the authors' code saves it: 64 wide, 4 channels of 8 x 8, 10 classes.
static void as_authors(struct train_config *c) {
    c->desc.arch = (struct arch){.input_size = 8,
                                 .patch_size = 2,
                                 .in_channels = 4,
                                 .hidden_size = 64,
                                 .depth = 2,
                                 .num_heads = 2,
                                 .num_classes = 10,
                                 .mlp_ratio = 4,
                                 .class_dropout = true,
                                 .learn_sigma = true};
    c->objective.null_label = 10;
}

static void check_array(const struct dit_train *net, const float *flat, const struct tensor_table *want) {
    const struct dit_param *p;
    struct err e = {0};
    int n = dit_train_params(net, &p);
    for (int i = 0; i < n; i++) {
        const struct tensor *t = tensor_find(want, p[i].name);
        CHECK(t && t->count == p[i].count);
        float *v = mem_array(t->count, sizeof *v);
        CHECK_OK(tensor_to_f32(v, t, &e), &e);
        CHECK(memcmp(v, flat + p[i].offset, t->count * sizeof *v) == 0);
        mem_free(v);
    }
}

static void check_moments(const struct dit_train *net, const float *flat, const struct tensor_table *opt,
                          const struct tensor_table *model, const char *which) {
    const struct dit_param *p;
    int n = dit_train_params(net, &p), seen = 0;
    for (int number = 0; number < model->n; number++) {
        char key[64];
        snprintf(key, sizeof key, "%d.%s", number, which);
        const struct tensor *t = tensor_find(opt, key);
        CHECK(!t == !strcmp(model->tensors[number].name, "pos_embed"));
        for (int i = 0; t && i < n; i++)
            if (strcmp(p[i].name, model->tensors[number].name) == 0) {
                CHECK(memcmp(t->data, flat + p[i].offset, t->bytes) == 0);
                seen++;
            }
    }
    CHECK(seen == n);
}

TEST_LIMIT(trainer_continues_the_authors_files, 120) {
    struct err e = {0};
    struct dit_train *net;
    struct snapshot s;
    struct kern *k;
    struct pt pt, model;
    void *bytes;
    size_t n;
    char why[256];
    begin();
    as_authors(&config);
    CHECK(kern_open(&k, &config.kern, why, sizeof why) == 0);
    CHECK_OK(dit_train_new(&net, k, &config.desc.arch, 2, RECOMPUTE_NONE, &e), &e);
    CHECK_OK(snapshot_new(&s, net, 2, &e), &e);
    CHECK_OK(snapshot_read(&s, "tests/golden/sit-tiny.pt", &config, &e), &e);
    CHECK_OK(file_read(&bytes, &n, "tests/golden/sit-tiny.pt", 1 << 24, &e), &e);
    for (int part = 0; part < 2; part++) {
        CHECK_OK(pt_parse_part(&pt, bytes, n, part ? "ema" : "model", &e), &e);
        check_array(net, s.array[part ? SNAPSHOT_EMA + 1 : SNAPSHOT_WEIGHTS], &pt.table);
        pt_close(&pt);
    }
    CHECK_OK(pt_parse_part(&model, bytes, n, "model", &e), &e);
    CHECK_OK(pt_parse_part(&pt, bytes, n, "opt", &e), &e);
    check_moments(net, s.array[SNAPSHOT_MOMENT1], &pt.table, &model.table, "exp_avg");
    check_moments(net, s.array[SNAPSHOT_MOMENT2], &pt.table, &model.table, "exp_avg_sq");
    CHECK(s.step > 0);
    pt_close(&pt);
    pt_close(&model);
    mem_free(bytes);
    CHECK(snapshot_read(&s, "tests/golden/sit-tiny-bf16-bare.pt", &config, &e) == E_CONFLICT && strstr(e.text, "'model'"));
    CHECK(strstr(e.text, "use --init"));
    err_clear(&e);
    CHECK(snapshot_read(&s, "tests/golden/sit-tiny.safetensors", &config, &e) == E_UNSUPPORTED && strstr(e.text, "use --init"));
    snapshot_free(&s);
    dit_train_free(net);
    kern_close(k);
    end();
}

TEST_LIMIT(trainer_begins_from_weights_with_other_classes, 120) {
    struct err e = {0};
    struct dit_train *net;
    struct snapshot s;
    struct kern *k;
    struct checkpoint ck;
    const struct dit_param *p;
    char why[256];
    begin();
    as_authors(&config);
    config.desc.arch.num_classes = 3, config.objective.null_label = 3;
    CHECK(kern_open(&k, &config.kern, why, sizeof why) == 0);
    CHECK_OK(dit_train_new(&net, k, &config.desc.arch, 2, RECOMPUTE_NONE, &e), &e);
    CHECK_OK(snapshot_new(&s, net, 2, &e), &e);
    dit_train_init(net, s.array[SNAPSHOT_WEIGHTS], 1);
    int n = dit_train_params(net, &p), labels = 0;
    while (strcmp(p[labels].name, "y_embedder.embedding_table.weight")) labels++;
    float *fresh = mem_dup(s.array[SNAPSHOT_WEIGHTS] + p[labels].offset, p[labels].count * sizeof(float));
    CHECK_OK(snapshot_init(&s, "tests/golden/sit-tiny.safetensors", &config, &e), &e);
    CHECK_OK(checkpoint_open(&ck, "tests/golden/sit-tiny.safetensors", &e), &e);
    CHECK(memcmp(fresh, s.array[SNAPSHOT_WEIGHTS] + p[labels].offset, p[labels].count * sizeof(float)) == 0);
    for (int i = 0; i < n; i++) {
        const struct tensor *t = tensor_find(&ck.table, p[i].name);
        if (i != labels) CHECK(memcmp(t->data, s.array[SNAPSHOT_WEIGHTS] + p[i].offset, t->bytes) == 0);
        for (int a = SNAPSHOT_EMA; a < s.n_arrays; a++)
            CHECK(memcmp(s.array[a] + p[i].offset, s.array[SNAPSHOT_WEIGHTS] + p[i].offset, p[i].count * sizeof(float)) == 0);
    }
    config.desc.arch.hidden_size = 64, config.desc.arch.depth = 1;
    CHECK(snapshot_init(&s, "tests/golden/sit-tiny.safetensors", &config, &e) == E_CONFLICT && strstr(e.text, "blocks.1."));
    checkpoint_close(&ck);
    mem_free(fresh);
    snapshot_free(&s);
    dit_train_free(net);
    kern_close(k);
    // and from one of our own checkpoints
    err_clear(&e);
    struct heard h = {0};
    config.desc.arch = tiny_train(NULL).desc.arch;
    config.steps = 2, config.warmup = 0;
    CHECK_OK(run(&h, NULL, NULL, &e), &e);
    char path[200];
    snprintf(path, sizeof path, "%s", in_run("checkpoints/step-00000002.safetensors"));
    config.init = path, config.desc.arch.num_classes = 5, config.objective.null_label = 5;
    snprintf(out, sizeof out, "%s/fine", dir);
    CHECK_OK(run(&h, NULL, NULL, &e), &e);
    end();
}

TEST(trainer_learning_rates) {
    struct train_config c = {.lr = 2, .lr_end = 0.5, .steps = 14, .warmup = 4};
    CHECK_NEAR(train_config_lr(&c, 0), 0.5, 1e-12);
    CHECK_NEAR(train_config_lr(&c, 3), 2, 1e-12);
    CHECK_NEAR(train_config_lr(&c, 9), 2, 1e-12);
    c.schedule = LR_LINEAR;
    CHECK_NEAR(train_config_lr(&c, 9), 1.5, 1e-12);
    CHECK_NEAR(train_config_lr(&c, 14), 1, 1e-12);
    c.schedule = LR_COSINE;
    CHECK_NEAR(train_config_lr(&c, 4), 2, 1e-12);
    CHECK_NEAR(train_config_lr(&c, 9), 1.5, 1e-12);
    CHECK_NEAR(train_config_lr(&c, 14), 1, 1e-12);
}
