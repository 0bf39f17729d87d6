// SPDX-License-Identifier: MIT
// The unpickler and the archive beneath checkpoints; malformed ones are in tests/bad/pt.
#include "core/base/mem.h"
#include "core/io/checkpoint.h"
#include "core/io/file.h"
#include "core/io/pickle.h"
#include "core/io/zip.h"
#include "tests/test.h"

static void load(struct checkpoint *c, void **bytes, const char *path) {
    size_t n;
    struct err e = {0};
    CHECK_OK(file_read(bytes, &n, path, 1 << 20, &e), &e);
    CHECK_OK(checkpoint_parse(c, *bytes, n, path, &e), &e);
}

// tests/bad/make.py: ema {a: [2,3] at 0, b: [3,2] with strides 1,3 at 5} over a storage whose byte i is i; args and steps beside
// it.
static void check_full(const char *path) {
    struct checkpoint c;
    void *bytes;
    load(&c, &bytes, path);
    CHECK_STR(c.chosen, "ema");
    CHECK(c.table.n == 2);
    const struct tensor *a = tensor_find(&c.table, "a"), *b = tensor_find(&c.table, "b");
    CHECK(a && b && a->dtype == DT_F32 && a->count == 6 && b->ndim == 2 && b->shape[0] == 3 && b->shape[1] == 2);
    const unsigned char *pa = a->data, *pb = b->data;
    for (int i = 0; i < 24; i++) CHECK(pa[i] == i);
    for (int r = 0; r < 3; r++) // straightened: element (r, k) was storage element 5 + r + 3k
        for (int k = 0; k < 2; k++)
            for (int byte = 0; byte < 4; byte++) CHECK(pb[(2 * r + k) * 4 + byte] == (5 + r + 3 * k) * 4 + byte);
    CHECK_STR(checkpoint_meta(&c, "model"), "SiT-S/2");
    CHECK_STR(checkpoint_meta(&c, "lr"), "0.0001");
    CHECK_STR(checkpoint_meta(&c, "num_heads"), "6");
    CHECK_STR(checkpoint_meta(&c, "flag"), "true");
    CHECK_STR(checkpoint_meta(&c, "steps"), "12");
    CHECK(!checkpoint_meta(&c, "none") && !checkpoint_meta(&c, "tags"));
    checkpoint_close(&c);
    mem_free(bytes);
}

TEST(pt_protocols_2_to_5) {
    char path[64];
    for (int protocol = 2; protocol <= 5; protocol++) {
        snprintf(path, sizeof path, "tests/fuzz/corpus/pt/good-protocol-%d", protocol);
        check_full(path);
    }
}

TEST(pt_other_makers) { // _rebuild_tensor_v3 over an untyped storage, a Parameter, unknown objects in args
    struct checkpoint c;
    void *bytes;
    load(&c, &bytes, "tests/fuzz/corpus/pt/good-v3");
    CHECK(c.table.n == 1 && c.table.tensors[0].dtype == DT_F32 && c.table.tensors[0].bytes == 16);
    checkpoint_close(&c);
    mem_free(bytes);
    load(&c, &bytes, "tests/fuzz/corpus/pt/good-parameter");
    CHECK(c.table.n == 1 && c.table.tensors[0].count == 4);
    checkpoint_close(&c);
    mem_free(bytes);
    load(&c, &bytes, "tests/fuzz/corpus/pt/good-unknown-in-args");
    CHECK_STR(c.chosen, "model");
    CHECK_STR(checkpoint_meta(&c, "lr"), "0.1");
    CHECK(!checkpoint_meta(&c, "out"));
    checkpoint_close(&c);
    mem_free(bytes);
}

TEST(pickle_limits) { // inputs too large to keep in tests/bad
    struct pickle p;
    struct err e = {0};
    size_t n = (1 << 20) + 100;
    char *deep = malloc(n);
    memset(deep, 'N', n);
    memcpy(deep, "\x80\2", 2);
    CHECK(pickle_parse(&p, deep, n, &e) == E_FORMAT && strstr(e.text, "stack is deeper"));
    err_clear(&e);
    memset(deep + 2, '2', n - 2); // DUP of one value
    deep[2] = 'N';
    CHECK(pickle_parse(&p, deep, n, &e) == E_FORMAT && strstr(e.text, "stack is deeper"));
    free(deep);
    err_clear(&e);
    n = (size_t)16 << 20; // a list of empty lists: bounded by memory
    char *wide = malloc(n);
    for (size_t i = 0; i < n; i++) wide[i] = i % 2 ? 'a' : ']';
    memcpy(wide, "\x80\2]", 3);
    for (size_t i = 3; i < n; i++) wide[i] = i % 2 ? ']' : 'a';
    CHECK(pickle_parse(&p, wide, n, &e) == E_FORMAT && strstr(e.text, "256 MiB"));
    free(wide);
}

TEST(pickle_values) {
    static const char text[] =
        "\x80\2}(X\1\0\0\0aJ\xff\xff\xff\xffX\1\0\0\0b\x8a\2\0\x80X\1\0\0\0cG\x3f\xf0\0\0\0\0\0\0X\1\0\0\0d\x8a\0u.";
    struct pickle p;
    struct err e = {0};
    CHECK_OK(pickle_parse(&p, text, sizeof text - 1, &e), &e);
    CHECK(p.root.kind == P_DICT && pickle_get(&p.root, "a")->u.i == -1 && pickle_get(&p.root, "b")->u.i == -32768);
    CHECK(pickle_get(&p.root, "c")->u.d == 1 && pickle_get(&p.root, "d")->u.i == 0 && !pickle_get(&p.root, "e"));
    pickle_close(&p);
}

TEST(zip64_directory) { // one stored member "a" = "xyz" behind a ZIP64 end record and with a ZIP64 extra field
    static const char file[] = "PK\3\4\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\1\0\0\0axyz" // 34 bytes
                               "PK\1\2\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff\1\0\x1c\0\0\0\0\0\0\0\0\0"
                               "\0\0\xff\xff\xff\xff"
                               "a"                                                          // 47
                               "\1\0\x18\0\3\0\0\0\0\0\0\0\3\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0" // 28
                               "PK\6\6\x2c\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\1\0\0\0\0\0\0\0\1\0\0\0\0\0\0\0\x4b\0\0\0\0\0\0"
                               "\0\x22\0\0\0\0\0\0\0" // 56 at 109
                               "PK\6\7\0\0\0\0\x6d\0\0\0\0\0\0\0\1\0\0\0"
                               "PK\5\6\0\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\0\0";
    struct zip z;
    struct err e = {0};
    CHECK_OK(zip_parse(&z, file, sizeof file - 1, &e), &e);
    const struct zip_entry *a = zip_find(&z, "a", 1);
    CHECK(z.n == 1 && a && a->size == 3 && memcmp(a->data, "xyz", 3) == 0 && !zip_find(&z, "b", 1) && !zip_find(&z, "", 0));
    zip_close(&z);
}
