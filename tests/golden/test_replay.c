// SPDX-License-Identifier: MIT
/*
 * What replay does with cases that were tampered with: a recorded case is read, one of its lines or tensors is changed, and the copy
 * replayed. A case that cannot be run is an error that names the culprit, never a skip and never a read outside a table.
 */
#include <math.h>
#include <unistd.h>

#include "core/base/mem.h"
#include "core/engine/replay.h"
#include "core/io/checkpoint.h"
#include "core/io/file.h"
#include "core/io/safetensors.h"
#include "tests/test.h"

#define SIT "tests/golden/sit-tiny.safetensors"
#define FORWARD "tests/golden/sit-tiny.forward.safetensors"
#define SDE "tests/golden/transport/Linear.velocity.sde.Euler.sigma.Mean.cfg4.0.safetensors"
#define TRAIN "tests/golden/train/train.GVP.noise.likelihood.safetensors"
#define BUNDLED "deploy/models/fashion-sit"
#define PICTURES "tests/golden/bundled/fashion-sit.ode.euler.cfg4.0.safetensors"

struct change {
    const char *key, *value;  // metadata; value NULL: the line is taken out
    const char *tensor;       // of float64 in the copy, all elements `fill`
    double fill;
    const char *cut;          // a tensor that is left its first `rows` rows
    int rows;
    const char *regrouped;    // a tensor of twice the rows, each of half as many
};

static int to_file(void *ctx, const void *bytes, size_t n, struct err *e) { return file_out_write(ctx, bytes, n, e); }

static void write_copy(const char *to, struct tensor_table *table, const struct meta_pair *meta, int n_meta, const struct change *how) {
    struct meta_pair lines[64];
    struct file_out out;
    struct err e = {0};
    double filled[1024];
    int n = 0;
    CHECK(n_meta < 64);
    for (int i = 0; i < n_meta; i++)
        if (!how->key || strcmp(meta[i].key, how->key) != 0) lines[n++] = meta[i];
    if (how->key && how->value) lines[n++] = (struct meta_pair){(char *)how->key, (char *)how->value};
    for (int i = 0; i < table->n; i++) {
        struct tensor *t = &table->tensors[i];
        if (how->tensor && !strcmp(t->name, how->tensor)) {
            CHECK(t->count <= 1024);
            for (size_t j = 0; j < t->count; j++) filled[j] = how->fill;
            t->dtype = DT_F64, t->bytes = 8 * t->count, t->data = filled;
        }
        if (how->regrouped && !strcmp(t->name, how->regrouped)) t->shape[0] *= 2, t->shape[1] /= 2;
        if (how->cut && !strcmp(t->name, how->cut)) {
            size_t row = t->count / (size_t)t->shape[0], size = t->bytes / t->count;
            t->shape[0] = how->rows, t->count = row * (size_t)how->rows, t->bytes = t->count * size;
        }
    }
    CHECK_OK(file_out_open(&out, to, &e), &e);
    CHECK_OK(safetensors_write(table, lines, n, to_file, &out, &e), &e);
    CHECK_OK(file_out_commit(&out, NULL, &e), &e);
}

static void tamper(char path[64], const char *original, const struct change *how) {
    struct checkpoint c;
    struct err e = {0};
    snprintf(path, 64, "/tmp/sitd-replay-XXXXXX");
    int fd = mkstemp(path);
    CHECK(fd >= 0);
    close(fd);
    CHECK_OK(checkpoint_open(&c, original, &e), &e);
    write_copy(path, &c.table, c.meta, c.n_meta, how);
    checkpoint_close(&c);
}

// Replays a changed case on the reference; the status, and the error's culprit.
static int replay_changed(const char *model, int heads, const char *original, const struct change *how, char param[64], struct replay_result *result) {
    struct kern_config config = {.backend = strcmp(model, BUNDLED) ? "ref" : "cpu", .threads = 2};
    char why[256] = "", path[64];
    struct kern *k;
    struct replay *r;
    struct err e = {0};
    if (kern_open(&k, &config, why, sizeof why)) test_fail(__FILE__, __LINE__, "%s", why);
    CHECK_OK(replay_open(&r, k, model, heads, &e), &e);
    tamper(path, original, how);
    int rc = replay_case(r, path, result, &e);
    unlink(path);
    snprintf(param, 64, "%s", e.param);
    replay_close(r);
    kern_close(k);
    return rc;
}

TEST(replay_refuses_what_it_cannot_run) {
    static const struct {
        const char *original, *culprit;
        int status;
        struct change how;
    } cases[] = {
        {FORWARD, "kind", E_UNSUPPORTED, {.key = "kind", .value = "backward"}},
        {FORWARD, "kind", E_UNSUPPORTED, {.key = "kind"}},
        {FORWARD, "family", E_UNSUPPORTED, {.key = "family", .value = "unet"}},
        {FORWARD, "depth", E_CONFLICT, {.key = "config", .value = "{\"depth\": 3}"}},
        {FORWARD, "config", E_FORMAT, {.key = "config", .value = "[]"}},
        {FORWARD, "num_heads", E_CONFLICT, {.key = "config", .value = "{\"depth\": 2}"}},
        {FORWARD, "y", E_RANGE, {.tensor = "y", .fill = 11}},
        {FORWARD, "y", E_RANGE, {.tensor = "y", .fill = -1}},
        {FORWARD, "y", E_RANGE, {.tensor = "y", .fill = 0.5}},
        {FORWARD, "y", E_RANGE, {.tensor = "y", .fill = (double)NAN}},
        {FORWARD, "out", E_CONFLICT, {.cut = "out", .rows = 3}},
        {FORWARD, "t", E_FORMAT, {.cut = "t", .rows = 3}},
        {TRAIN, "path", E_UNSUPPORTED, {.key = "path", .value = "Cosine"}},
        {TRAIN, "prediction", E_UNSUPPORTED, {.key = "prediction"}},
        {TRAIN, "loss_weight", E_UNSUPPORTED, {.key = "loss_weight", .value = "lognormal"}},
        {TRAIN, "family", E_UNSUPPORTED, {.key = "family", .value = "maskdit"}},
        {TRAIN, "t", E_RANGE, {.tensor = "t", .fill = 1.5}},
        {TRAIN, "t", E_RANGE, {.tensor = "t", .fill = (double)NAN}},
        {TRAIN, "y", E_RANGE, {.tensor = "y", .fill = 11}},
        {TRAIN, "x0", E_FORMAT, {.cut = "x0", .rows = 3}},
        {TRAIN, "loss", E_FORMAT, {.cut = "loss", .rows = 3}},
        {TRAIN, "grad.final_layer.linear.bias", E_FORMAT, {.cut = "grad.final_layer.linear.bias", .rows = 3}},
        {SDE, "path", E_UNSUPPORTED, {.key = "path", .value = "Cosine"}},
        {SDE, "path", E_UNSUPPORTED, {.key = "path"}},
        {SDE, "prediction", E_UNSUPPORTED, {.key = "prediction", .value = "x1"}},
        {SDE, "sampler", E_UNSUPPORTED, {.key = "sampler", .value = "ddpm"}},
        {SDE, "method", E_UNSUPPORTED, {.key = "method", .value = "bosh3"}},
        {SDE, "diffusion_form", E_UNSUPPORTED, {.key = "diffusion_form", .value = "knots"}},
        {SDE, "last_step", E_UNSUPPORTED, {.key = "last_step", .value = "Last"}},
        {SDE, "num_steps", E_RANGE, {.key = "num_steps", .value = "1"}},
        {SDE, "num_steps", E_RANGE, {.key = "num_steps", .value = "nan"}},
        {SDE, "num_steps", E_FORMAT, {.key = "num_steps", .value = "12 steps"}},
        {SDE, "cfg", E_FORMAT, {.key = "cfg"}},
        {SDE, "noise", E_CONFLICT, {.key = "num_steps", .value = "13"}},
        {SDE, "noise", E_CONFLICT, {.cut = "noise", .rows = 10}},
        {SDE, "noise", E_FORMAT, {.regrouped = "noise"}},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct replay_result result;
        char culprit[64];
        int rc = replay_changed(SIT, 0, cases[i].original, &cases[i].how, culprit, &result);
        if (rc != cases[i].status || strcmp(culprit, cases[i].culprit) != 0)
            test_fail(__FILE__, __LINE__, "case %zu: status %d on '%s', not %d on '%s'", i, rc, culprit, cases[i].status, cases[i].culprit);
    }
}

TEST(replay_heads_override_the_case) {
    static const struct change wrong = {.key = "config", .value = "{\"num_heads\": 4}"};
    struct replay_result result;
    char culprit[64];
    CHECK(replay_changed(SIT, 2, FORWARD, &wrong, culprit, &result) == OK && result.rel_l2 < 1e-5);
    CHECK(replay_changed(SIT, 0, FORWARD, &wrong, culprit, &result) == OK && result.rel_l2 > 1e-2);
    CHECK(replay_changed(SIT, 3, FORWARD, &wrong, culprit, &result) != OK);
}

// NaN never passes, and where all that was recorded is 0 (an untrained network) the difference stands for itself.
TEST(replay_measures_odd_outputs) {
    static const struct change noisy = {.tensor = "t", .fill = (double)NAN}, dark = {.tensor = "out", .fill = 0};
    struct replay_result result;
    char culprit[64];
    CHECK(replay_changed(SIT, 0, FORWARD, &noisy, culprit, &result) == OK && !result.finite);
    CHECK(replay_changed(SIT, 0, SDE, &dark, culprit, &result) == OK && result.finite && result.rel_l2 > 1);
}

// What a case does not say of path and prediction the model directory says; what it does say goes first.
TEST(replay_path_of_the_model_directory) {
    struct replay_result result;
    char culprit[64];
    CHECK(replay_changed(BUNDLED, 0, PICTURES, &(struct change){.key = "path"}, culprit, &result) == OK && result.rel_l2 < 1e-5);
    CHECK(replay_changed(BUNDLED, 0, PICTURES, &(struct change){.key = "prediction", .value = "noise"}, culprit, &result) == OK && result.rel_l2 > 1e-2);
}

// A network trained without label dropout: its table is all classes, and no null class may be asked of it.
TEST(replay_without_label_dropout) {
    static const struct change eleven = {.key = "config", .value = "{\"num_heads\": 2, \"num_classes\": 11}"};
    static const struct change one_row = {.cut = "y_embedder.embedding_table.weight", .rows = 1};
    static const struct change one_class = {.key = "config", .value = "{\"num_heads\": 2, \"num_classes\": 1}", .tensor = "y", .fill = 0};
    struct replay_result result;
    char culprit[64], lone[64];
    CHECK(replay_changed(SIT, 0, SDE, &eleven, culprit, &result) == E_RANGE); // guided, so the null class is wanted
    CHECK_STR(culprit, "y");
    tamper(lone, SIT, &one_row);
    int rc = replay_changed(lone, 0, FORWARD, &one_class, culprit, &result); // has out_null
    unlink(lone);
    CHECK(rc == E_RANGE);
    CHECK_STR(culprit, "y");
}
