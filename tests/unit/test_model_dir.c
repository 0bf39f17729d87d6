// SPDX-License-Identifier: MIT
#include <math.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/base/mem.h"
#include "core/io/checkpoint.h"
#include "core/io/file.h"
#include "core/io/model_publish.h"
#include "tests/test.h"

static char dir[64];

static const char *temp_dir(void) {
    snprintf(dir, sizeof dir, "/tmp/sitd-test-XXXXXX");
    CHECK(mkdtemp(dir));
    return dir;
}

static void remove_all(const char *d) {
    char command[128];
    snprintf(command, sizeof command, "rm -rf %s", d);
    CHECK(system(command) == 0);
}

static void tiny(struct checkpoint *c, struct model_desc *d) {
    struct err e = {0};
    CHECK_OK(checkpoint_open(c, "tests/golden/sit-tiny.safetensors", &e), &e);
    *d = (struct model_desc){.family = "sit", .path = "linear", .prediction = "velocity", .guide_channels = 3, .step = 7};
    CHECK_OK(arch_infer(&d->arch, &c->table, &e), &e);
    CHECK(d->arch.num_heads == 0); // 64 is no published width
    d->arch.num_heads = 2;
}

TEST(arch_infer_tiny) {
    struct checkpoint c;
    struct model_desc d;
    tiny(&c, &d);
    CHECK(d.arch.input_size == 8 && d.arch.patch_size == 2 && d.arch.in_channels == 4 && d.arch.hidden_size == 64 &&
          d.arch.depth == 2);
    CHECK(d.arch.num_classes == 10 && d.arch.class_dropout && d.arch.learn_sigma && d.arch.mlp_ratio == 4);
    struct err e = {0};
    CHECK_OK(arch_check(&d.arch, &e), &e);
    checkpoint_close(&c);
}

TEST(arch_match_names_the_tensor) {
    struct checkpoint c;
    struct model_desc d;
    struct err e = {0};
    tiny(&c, &d);
    struct arch a = d.arch;
    a.hidden_size = 72;
    CHECK(arch_match(&a, &c.table, &e) == E_CONFLICT && strstr(e.text, "has shape"));
    err_clear(&e);
    a = d.arch;
    a.depth = 3;
    CHECK(arch_match(&a, &c.table, &e) == E_CONFLICT);
    CHECK_STR(e.param, "blocks.2.attn.qkv.weight");
    err_clear(&e);
    a.depth = 1;
    CHECK(arch_match(&a, &c.table, &e) == E_CONFLICT && strstr(e.param, "blocks.1."));
    err_clear(&e);
    for (int i = 0; i < c.table.n; i++) { // each tensor but pos_embed is needed
        struct tensor_table less = {c.table.tensors, c.table.n};
        struct tensor t = less.tensors[i], *all = less.tensors;
        all[i] = (struct tensor){.name = "projectors.0.weight", .dtype = DT_F32};
        int rc = arch_match(&d.arch, &less, &e);
        CHECK(rc == (strcmp(t.name, "pos_embed") ? E_CONFLICT : OK));
        if (rc) CHECK_STR(e.param, t.name);
        err_clear(&e);
        all[i] = t;
    }
    c.table.tensors[3].name = "blocks.0.attn.q_norm.weight";
    CHECK(arch_match(&d.arch, &c.table, &e) == E_CONFLICT);
    CHECK_STR(e.param, "blocks.0.attn.q_norm.weight");
    checkpoint_close(&c);
}

TEST(arch_infer_without_pos_embed) {
    struct checkpoint c;
    struct model_desc d;
    struct err e = {0};
    tiny(&c, &d);
    for (int i = 0; i < c.table.n; i++)
        if (!strcmp(c.table.tensors[i].name, "pos_embed")) c.table.tensors[i] = c.table.tensors[--c.table.n];
    CHECK_OK(arch_infer(&d.arch, &c.table, &e), &e);
    CHECK(d.arch.input_size == 0 && d.arch.hidden_size == 64);
    checkpoint_close(&c);
}

TEST(arch_check_limits) {
    struct arch good = {.input_size = 32,
                        .patch_size = 4,
                        .in_channels = 1,
                        .hidden_size = 192,
                        .depth = 8,
                        .num_heads = 3,
                        .num_classes = 10,
                        .mlp_ratio = 4};
    static const struct {
        const char *field;
        size_t offset;
        int value;
    } cases[] = {
        {"input_size", offsetof(struct arch, input_size), 0},
        {"input_size", offsetof(struct arch, input_size), 8192},
        {"patch_size", offsetof(struct arch, patch_size), 5},
        {"patch_size", offsetof(struct arch, patch_size), -1},
        {"in_channels", offsetof(struct arch, in_channels), 0},
        {"hidden_size", offsetof(struct arch, hidden_size), 1 << 30},
        {"depth", offsetof(struct arch, depth), 0},
        {"depth", offsetof(struct arch, depth), 1 << 20},
        {"num_heads", offsetof(struct arch, num_heads), 5},
        {"num_heads", offsetof(struct arch, num_heads), 0},
        {"num_heads", offsetof(struct arch, num_heads), 1},
        {"num_classes", offsetof(struct arch, num_classes), 0},
        {"num_classes", offsetof(struct arch, num_classes), 1 << 24},
    };
    struct err e = {0};
    CHECK_OK(arch_check(&good, &e), &e);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct arch a = good;
        char param[64];
        memcpy((char *)&a + cases[i].offset, &cases[i].value, sizeof(int));
        snprintf(param, sizeof param, "architecture.%s", cases[i].field);
        err_clear(&e);
        CHECK(arch_check(&a, &e) == E_RANGE);
        CHECK_STR(e.param, param);
    }
}

TEST(model_dir_round_trip) {
    struct checkpoint c;
    struct model_desc d;
    struct model_dir m;
    struct err e = {0};
    tiny(&c, &d);
    const char *at = temp_dir();
    CHECK_OK(model_publish(at, &d, &c.table, &e), &e);
    CHECK_STR(d.weights_file, "weights-00000007.safetensors");
    CHECK_OK(model_dir_open(&m, at, &e), &e);
    CHECK_STR(m.desc.family, "sit");
    CHECK_STR(m.desc.path, "linear");
    CHECK_STR(m.desc.weights_sha256, d.weights_sha256);
    CHECK(m.desc.guide_channels == 3 && m.desc.step == 7 && !m.desc.is_default && !m.desc.labels && m.desc.arch.num_heads == 2);
    CHECK(strlen(m.digest) == 64 && m.weights->n == c.table.n);
    for (int i = 0; i < c.table.n; i++) {
        const struct tensor *a = &c.table.tensors[i], *b = tensor_find(m.weights, a->name);
        CHECK(b && a->dtype == b->dtype && tensor_shape_is(b, a->ndim, a->shape) && memcmp(a->data, b->data, a->bytes) == 0);
    }
    model_dir_close(&m);
    checkpoint_close(&c);
    remove_all(at);
}

// A second publication of the same step must not change the bytes that the first model.json names.
TEST(model_dir_same_step_other_bytes) {
    struct checkpoint c;
    struct model_desc d;
    struct model_dir first;
    struct err e = {0};
    char old_file[256];
    tiny(&c, &d);
    const char *at = temp_dir();
    CHECK_OK(model_publish(at, &d, &c.table, &e), &e);
    snprintf(old_file, sizeof old_file, "%s", d.weights_file);
    CHECK_OK(model_publish(at, &d, &c.table, &e), &e);
    CHECK_STR(d.weights_file, old_file); // the same bytes: the same name
    float *changed = mem_dup(c.table.tensors[0].data, c.table.tensors[0].bytes);
    changed[0] += 1;
    c.table.tensors[0].data = changed;
    CHECK_OK(model_publish(at, &d, &c.table, &e), &e);
    CHECK(strcmp(d.weights_file, old_file) != 0);
    CHECK_OK(model_dir_open(&first, at, &e), &e);
    model_dir_close(&first);
    mem_free(changed);
    checkpoint_close(&c);
    remove_all(at);
}

TEST(model_dir_wrong_digest) {
    struct checkpoint c;
    struct model_desc d;
    struct model_dir m;
    struct err e = {0};
    char path[512];
    tiny(&c, &d);
    const char *at = temp_dir();
    CHECK_OK(model_publish(at, &d, &c.table, &e), &e);
    snprintf(path, sizeof path, "%s/%s", at, d.weights_file);
    void *bytes;
    size_t n;
    CHECK_OK(file_read(&bytes, &n, path, 1 << 24, &e), &e);
    ((char *)bytes)[n - 1] ^= 1;
    CHECK_OK(file_write(path, bytes, n, &e), &e);
    CHECK(model_dir_open(&m, at, &e) == E_CONFLICT);
    CHECK_STR(e.param, "weights.sha256");
    CHECK(strstr(e.text, d.weights_file) && strstr(e.text, d.weights_sha256));
    err_clear(&e);
    CHECK_OK(model_dir_begin(&m, at, &e), &e); // they parse, so it is for verify to say
    for (int again = 0; again < 2; again++) {
        CHECK(model_dir_verify(&m, &e) == E_CONFLICT);
        CHECK_STR(e.param, "weights.sha256");
        err_clear(&e);
    }
    model_dir_close(&m);
    CHECK_OK(file_write(path, bytes, n - 1, &e), &e);
    CHECK(model_dir_begin(&m, at, &e) == E_CONFLICT); // they do not, and that they are not those that were meant says it better
    CHECK_STR(e.param, "weights.sha256");
    err_clear(&e);
    CHECK(unlink(path) == 0);
    CHECK(model_dir_open(&m, at, &e) == E_NOTFOUND && strstr(e.text, d.weights_file));
    err_clear(&e);
    snprintf(path, sizeof path, "%s/none", at);
    CHECK(model_dir_open(&m, path, &e) == E_NOTFOUND && strstr(e.text, "model.json"));
    mem_free(bytes);
    checkpoint_close(&c);
    remove_all(at);
}

TEST(model_dir_refuses_what_it_could_not_read) {
    struct checkpoint c;
    struct model_desc d;
    struct err e = {0};
    tiny(&c, &d);
    const char *at = temp_dir();
    snprintf(d.path, sizeof d.path, "spline");
    CHECK(model_publish(at, &d, &c.table, &e) == E_UNSUPPORTED);
    CHECK_STR(e.param, "path");
    CHECK(rmdir(at) == 0); // nothing was written
    checkpoint_close(&c);
}

TEST(digest_of_abc) {
    char hex[DIGEST_HEX];
    CHECK(digest_hex(hex, "abc", 3) == OK);
    CHECK_STR(hex, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
}

TEST(desc_dump_and_parse) {
    char *one[] = {(char *)"t-shirt", (char *)"tee"}, *two[] = {(char *)"Hose \xc3\xbc"};
    struct model_desc d = {.family = "dit", .guide_channels = -1, .is_default = true, .step = 1LL << 40, .weights_file = "w.pt"},
                      back;
    struct err e = {0};
    d.arch = (struct arch){.input_size = 32,
                           .patch_size = 4,
                           .in_channels = 1,
                           .hidden_size = 192,
                           .depth = 8,
                           .num_heads = 3,
                           .num_classes = 2,
                           .mlp_ratio = 2.5};
    d.labels = mem_array(2, sizeof *d.labels);
    d.labels[0].names = one, d.labels[0].n = 2;
    d.labels[1].names = two, d.labels[1].n = 1;
    memset(d.weights_sha256, 'a', 64);
    char *text = model_desc_dump(&d, &e);
    CHECK(text);
    CHECK_OK(model_desc_parse(&back, text, strlen(text), &e), &e);
    CHECK_STR(back.family, "dit");
    CHECK(back.guide_channels == -1 && back.is_default && back.step == 1LL << 40 && back.arch.mlp_ratio == 2.5 &&
          !back.arch.class_dropout);
    CHECK(back.labels[0].n == 2 && back.labels[1].n == 1);
    CHECK_STR(back.labels[0].names[1], "tee");
    CHECK_STR(back.labels[1].names[0], "Hose \xc3\xbc");
    model_desc_deinit(&back);
    mem_free(text);
    mem_free(d.labels);
}

TEST(file_limits) {
    struct err e = {0};
    void *bytes;
    size_t n;
    CHECK(file_read(&bytes, &n, "/tmp", 100, &e) == E_UNSUPPORTED && strstr(e.text, "/tmp"));
    err_clear(&e);
    CHECK(file_read(&bytes, &n, "tests/golden/sit-tiny.safetensors", 100, &e) == E_RANGE);
    err_clear(&e);
    CHECK(file_read(&bytes, &n, "/dev/null", 100, &e) == E_UNSUPPORTED);
    err_clear(&e);
    CHECK(file_read(&bytes, &n, "no-such-file", 100, &e) == E_NOTFOUND && strstr(e.text, "no-such-file"));
    err_clear(&e);
    char pipe[128];
    struct stat st;
    snprintf(pipe, sizeof pipe, "%s/pipe", temp_dir()); // as good as /dev/null, whose place no rename may take
    CHECK(mkfifo(pipe, 0600) == 0);
    CHECK(file_write(pipe, "x", 1, &e) == E_UNSUPPORTED && strstr(e.text, pipe));
    CHECK(stat(pipe, &st) == 0 && S_ISFIFO(st.st_mode));
    remove_all(dir);
}

// What a daemon would refuse to load is not published.
TEST(model_dir_refuses_infinite_weights) {
    static const float bad[] = {(float)NAN, -INFINITY};
    for (int i = 0; i < 2; i++) {
        struct checkpoint c;
        struct model_desc d;
        struct err e = {0};
        float row[64] = {[3] = bad[i]};
        char path[128];
        tiny(&c, &d);
        ((struct tensor *)tensor_find(&c.table, "blocks.0.attn.proj.bias"))->data = row;
        const char *at = temp_dir();
        CHECK(model_publish(at, &d, &c.table, &e) == E_NONFINITE);
        CHECK_STR(e.param, "blocks.0.attn.proj.bias");
        snprintf(path, sizeof path, "%s/model.json", at);
        CHECK(access(path, F_OK) != 0);
        checkpoint_close(&c);
        remove_all(at);
    }
}
