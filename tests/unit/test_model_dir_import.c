// SPDX-License-Identifier: MIT
// What import proves, what it takes from flags and args, and what it refuses to guess.
#include <getopt.h>
#include <math.h>

#include "core/base/mem.h"
#include "core/io/import.h"
#include "server/cmd.h"
#include "tests/test.h"

static const struct import_fact *fact(const struct import_fact *facts, int n, const char *field) {
    for (int i = 0; i < n; i++)
        if (strcmp(facts[i].field, field) == 0) return &facts[i];
    test_fail(__FILE__, __LINE__, "no fact '%s'", field);
}

TEST(import_names_the_flag_that_would_tell) {
    static const char *const wanted[] = {"--heads", "--family", "--path", "--prediction"};
    struct checkpoint c;
    struct model_desc d;
    struct import_fact facts[IMPORT_FACTS];
    struct import_flags f = {.step = -1};
    struct err e = {0};
    int n;
    CHECK_OK(checkpoint_open(&c, "tests/golden/sit-tiny-bf16-bare.pt", &e), &e); // bare: it has no args
    for (int i = 0; i < 4; i++) {
        err_clear(&e);
        CHECK_OK(import_describe(&d, facts, &n, &c, &f, &e), &e);
        CHECK(import_require(facts, n, &e) == E_CONFLICT);
        CHECK_STR(e.param, wanted[i]);
        if (i == 0) f.heads = 2;
        if (i == 1) f.family = "SiT";
        if (i == 2) f.path = "GVP";
        if (i == 3) f.prediction = "noise";
    }
    err_clear(&e);
    CHECK_OK(import_describe(&d, facts, &n, &c, &f, &e), &e);
    CHECK_OK(import_require(facts, n, &e), &e);
    CHECK_STR(d.family, "sit");
    CHECK_STR(d.path, "gvp");
    CHECK_STR(d.prediction, "noise");
    CHECK(d.arch.num_heads == 2 && d.guide_channels == 3 && d.step == 0 && d.arch.num_classes == 10 && d.arch.class_dropout);
    checkpoint_close(&c);
}

TEST(import_order_of_truth) { // sit-tiny.pt has args with num_heads 2 and num_classes 10
    struct checkpoint c;
    struct model_desc d;
    struct import_fact facts[IMPORT_FACTS];
    struct import_flags f = {.step = -1};
    struct err e = {0};
    int n;
    CHECK_OK(checkpoint_open(&c, "tests/golden/sit-tiny.pt", &e), &e);
    CHECK_OK(import_describe(&d, facts, &n, &c, &f, &e), &e);
    CHECK_STR(fact(facts, n, "num_heads")->source, "the file's args");
    CHECK_STR(fact(facts, n, "num_heads")->value, "2");
    CHECK_STR(fact(facts, n, "hidden_size")->source, "the tensors");
    CHECK_STR(fact(facts, n, "family")->value, "");
    f = (struct import_flags){.step = 9, .heads = 4, .guide_channels = -1, .family = "dit"};
    CHECK_OK(import_describe(&d, facts, &n, &c, &f, &e), &e);
    CHECK_STR(fact(facts, n, "num_heads")->source, "--heads");
    CHECK(d.arch.num_heads == 4 && d.guide_channels == -1 && d.step == 9 && !d.path[0]);
    CHECK_OK(import_require(facts, n, &e), &e); // a dit needs neither path nor prediction
    f.path = "linear";
    CHECK(import_describe(&d, facts, &n, &c, &f, &e) == E_CONFLICT);
    CHECK_STR(e.param, "--path");
    err_clear(&e);
    f = (struct import_flags){.step = -1, .classes = 11};
    CHECK_OK(import_describe(&d, facts, &n, &c, &f, &e), &e);
    CHECK(d.arch.num_classes == 11 && !d.arch.class_dropout);
    f.classes = 12;
    CHECK(import_describe(&d, facts, &n, &c, &f, &e) == E_CONFLICT && strstr(e.text, "11 rows"));
    err_clear(&e);
    f = (struct import_flags){.step = -1, .family = "unet"};
    CHECK(import_describe(&d, facts, &n, &c, &f, &e) == E_RANGE);
    CHECK_STR(e.param, "--family");
    checkpoint_close(&c);
}

TEST(import_convert_dtypes) {
    float big[4] = {1, -2, 3, 7e4f}, vector[2] = {1e-7f, 2};
    struct tensor t[] = {
        {.name = "m", .dtype = DT_F32, .ndim = 2, .shape = {2, 2}, .data = big, .bytes = 16, .count = 4},
        {.name = "v", .dtype = DT_F32, .ndim = 1, .shape = {2}, .data = vector, .bytes = 8, .count = 2},
        {.name = "projectors.0.weight", .dtype = DT_F32, .ndim = 1, .shape = {2}, .data = vector, .bytes = 8, .count = 2}};
    struct tensor_table table = {t, 3};
    struct import_table it;
    struct err e = {0};
    CHECK(import_convert(&it, &table, DT_F16, &e) == E_RANGE && strstr(e.text, "'m' holds 70000"));
    err_clear(&e);
    big[3] = NAN; // not import's business: the model refuses it when it loads
    CHECK_OK(import_convert(&it, &table, DT_F16, &e), &e);
    CHECK(it.table.n == 2 && it.table.tensors[0].dtype == DT_F16 && it.table.tensors[0].bytes == 8);
    CHECK(((const uint16_t *)it.table.tensors[0].data)[1] == 0xc000 && it.table.tensors[1].dtype == DT_F32 &&
          it.table.tensors[1].data == vector);
    import_free(&it);
    CHECK_OK(import_convert(&it, &table, DT_OTHER, &e), &e);
    CHECK(it.table.tensors[0].data == big && it.table.tensors[0].dtype == DT_F32);
    import_free(&it);
}

TEST(labels_from_lines) {
    struct model_desc d = {.arch.num_classes = 3};
    struct err e = {0};
    static const char text[] = "t-shirt, tee\r\ntrouser\n ankle boot ,boot";
    CHECK_OK(model_desc_labels(&d, text, sizeof text - 1, &e), &e);
    CHECK(d.labels[0].n == 2 && d.labels[1].n == 1 && d.labels[2].n == 2);
    CHECK_STR(d.labels[0].names[1], "tee");
    CHECK_STR(d.labels[1].names[0], "trouser");
    CHECK_STR(d.labels[2].names[0], "ankle boot");
    model_desc_deinit(&d);
    d.arch.num_classes = 2;
    CHECK(model_desc_labels(&d, text, sizeof text - 1, &e) == E_CONFLICT);
    model_desc_deinit(&d);
    err_clear(&e);
    d.arch.num_classes = 2;
    CHECK(model_desc_labels(&d, "a\n,", 3, &e) == E_FORMAT);
    model_desc_deinit(&d);
}

TEST(import_and_inspect_commands) {
    char out[] = "/tmp/sitd-import-XXXXXX", path[64], command[64];
    CHECK(mkdtemp(out));
    snprintf(path, sizeof path, "%s/tiny", out);
    char *import[] = {"import",       "tests/golden/sit-tiny.pt",
                      "--name",       "tiny",
                      "--out",        out,
                      "--family",     "sit",
                      "--path",       "linear",
                      "--prediction", "velocity",
                      "--storage",    "bf16",
                      "--default",    NULL};
    char *inspect[] = {"inspect", path, NULL};
    CHECK(freopen("/dev/null", "w", stdout) && freopen("/dev/null", "w", stderr));
    bool imported = cmd_import(15, import) == 0;
    struct model_dir m;
    struct err e = {0};
    int rc = model_dir_open(&m, path, &e), heads = rc == OK ? m.desc.arch.num_heads : 0;
    const struct tensor *t = rc == OK ? tensor_find(m.weights, "blocks.1.mlp.fc2.weight") : NULL;
    bool bf16 = t && t->dtype == DT_BF16 && m.desc.is_default;
    if (rc == OK) model_dir_close(&m);
    snprintf(command, sizeof command, "rm -rf %s", out);
    CHECK(imported && rc == OK && heads == 2 && bf16);
    optind = 0;
    CHECK(cmd_inspect(2, inspect) == 0);
    char *unknown[] = {"import", "tests/golden/sit-tiny.pt", "--name", "tiny", "--out", out, "--family", "unet", NULL};
    char *cut[] = {"import", "tests/golden/sit-tiny.pt", "--name", "tiny", "--out", out, "--family", NULL};
    optind = 0; // getopt begins anew (and has moved the words of the first call about)
    CHECK(cmd_import(8, unknown) == 78);
    optind = 0;
    CHECK(cmd_import(7, cut) == 2);
    CHECK(system(command) == 0);
}

// The bundled model is whole: its digest, its tensors, its labels.
TEST(bundled_model) {
    struct model_dir m;
    struct err e = {0};
    CHECK_OK(model_dir_open(&m, "deploy/models/fashion-sit", &e), &e);
    CHECK(m.desc.is_default && m.desc.step == 9000 && m.desc.arch.num_heads == 3 && m.desc.guide_channels == 3);
    CHECK_STR(m.desc.labels[0].names[0], "t-shirt");
    CHECK_STR(m.desc.labels[9].names[1], "boot");
    CHECK(m.weights->n == 91);
    for (int i = 0; i < m.weights->n; i++) {
        const struct tensor *t = &m.weights->tensors[i];
        float *x = mem_array(t->count, sizeof *x);
        CHECK_OK(tensor_to_f32(x, t, &e), &e);
        for (size_t k = 0; k < t->count; k++) CHECK(isfinite(x[k]));
        mem_free(x);
    }
    model_dir_close(&m);
}
