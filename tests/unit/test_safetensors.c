// SPDX-License-Identifier: MIT
#include <unistd.h>

#include "core/base/mem.h"
#include "core/io/safetensors.h"
#include "tests/test.h"

struct buffer {
    char *data;
    size_t n;
};

static int sink(void *ctx, const void *bytes, size_t n, struct err *e) {
    struct buffer *b = ctx;
    (void)e;
    b->data = realloc(b->data, b->n + n + 1);
    memcpy(b->data + b->n, bytes, n);
    b->n += n;
    return OK;
}

static struct tensor make(const char *name, enum dtype t, int ndim, int64_t d0, int64_t d1, const void *data) {
    struct tensor x = {.name = name, .dtype = t, .ndim = ndim, .shape = {d0, d1}, .data = data, .count = 1};
    for (int i = 0; i < ndim; i++) x.count *= (size_t)x.shape[i];
    x.bytes = x.count * dtype_size(t);
    return x;
}

// Every type, a scalar, an empty tensor; written, read, and equal. The order in the file is by falling size, so everything is
// aligned.
TEST(safetensors_round_trip) {
    static const char data[64] = "0123456789abcdefghijklmnopqrstuvwxyz";
    struct tensor t[] = {
        make("c", DT_U8, 1, 3, 0, data),       make("b", DT_F32, 2, 2, 3, data),  make("a", DT_F32, 0, 0, 0, data),
        make("h", DT_BF16, 1, 5, 0, data + 1), make("d", DT_F64, 1, 1, 0, data),  make("e", DT_I64, 2, 0, 7, data),
        make("f", DT_F16, 1, 1, 0, data),      make("g", DT_BOOL, 1, 1, 0, data), make("i", DT_I32, 1, 2, 0, data),
        make("j", DT_I16, 1, 2, 0, data),      make("k", DT_I8, 1, 1, 0, data)};
    int n = (int)(sizeof t / sizeof *t);
    struct tensor_table table = {t, n};
    struct meta_pair meta[] = {{(char *)"format", (char *)"pt"}, {(char *)"note", (char *)"Gr\xc3\xbc\xc3\x9f\x65 \"quoted\"\n"}};
    struct buffer b = {0};
    struct safetensors st;
    struct err e = {0};
    CHECK_OK(safetensors_write(&table, meta, 2, sink, &b, &e), &e);
    CHECK_OK(safetensors_parse(&st, b.data, b.n, &e), &e);
    CHECK(st.table.n == n && st.n_meta == 2);
    CHECK_STR(st.meta[1].value, meta[1].value);
    for (int i = 0; i < n; i++) {
        const struct tensor *x = tensor_find(&st.table, t[i].name);
        CHECK(x && x->dtype == t[i].dtype && tensor_shape_is(x, t[i].ndim, t[i].shape) && x->count == t[i].count);
        CHECK(x->bytes == t[i].bytes && memcmp(x->data, t[i].data, x->bytes) == 0);
        size_t header = (unsigned char)b.data[0] + 256u * (unsigned char)b.data[1],
               at = (size_t)((const char *)x->data - b.data) - 8 - header;
        CHECK(header % 8 == 0 && at % dtype_size(x->dtype) == 0);
    }
    // the header alone says the same, and where in the file the bytes are
    char path[] = "/tmp/sitd-safetensors-XXXXXX";
    struct file_in f;
    int fd = mkstemp(path);
    CHECK(fd >= 0 && write(fd, b.data, b.n) == (ssize_t)b.n);
    CHECK_OK(file_in_open(&f, path, &e), &e);
    struct safetensors head;
    CHECK_OK(safetensors_read_header(&head, &f, &e), &e);
    CHECK(head.table.n == n && head.n_meta == 2);
    for (int i = 0; i < n; i++) {
        const struct tensor *x = &head.table.tensors[i], *y = &st.table.tensors[i];
        CHECK(strcmp(x->name, y->name) == 0 && x->bytes == y->bytes && x->data == NULL);
        CHECK(b.data + safetensors_place(&head, x) == (const char *)y->data);
    }
    safetensors_close(&head);
    file_in_close(&f);
    for (size_t cut = 0; cut < b.n; cut++) {
        CHECK(ftruncate(fd, (off_t)cut) == 0 && pwrite(fd, b.data, cut, 0) == (ssize_t)cut);
        CHECK_OK(file_in_open(&f, path, &e), &e);
        CHECK(safetensors_read_header(&head, &f, &e) == E_FORMAT && strstr(e.text, path));
        err_clear(&e);
        file_in_close(&f);
    }
    close(fd);
    unlink(path);
    safetensors_close(&st);
    free(b.data);
}

TEST(safetensors_unaligned_bytes) { // a file may begin anywhere in memory
    static const char text[] = "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}";
    char *raw = malloc(8 + sizeof text - 1 + 4 + 1), *file = raw + 1;
    memset(file, 0, 8);
    file[0] = (char)(sizeof text - 1);
    memcpy(file + 8, text, sizeof text - 1);
    memcpy(file + 8 + sizeof text - 1, "\0\0\x80\x3f", 4);
    struct safetensors st;
    struct err e = {0};
    float one;
    CHECK_OK(safetensors_parse(&st, file, 8 + sizeof text - 1 + 4, &e), &e);
    CHECK_OK(tensor_to_f32(&one, &st.table.tensors[0], &e), &e);
    CHECK(one == 1);
    safetensors_close(&st);
    free(raw);
}

TEST(safetensors_no_tensors) {
    struct safetensors st;
    struct err e = {0};
    CHECK_OK(safetensors_parse(&st, "\2\0\0\0\0\0\0\0{}", 10, &e), &e);
    CHECK(st.table.n == 0 && st.n_meta == 0);
    safetensors_close(&st);
    CHECK_OK(safetensors_parse(&st, "\5\0\0\0\0\0\0\0{}   ", 13, &e), &e); // padded
    safetensors_close(&st);
}

TEST(safetensors_write_refuses) {
    float x[2] = {1, 2};
    struct tensor t[] = {make("a", DT_F32, 1, 2, 0, x), make("a", DT_F32, 1, 2, 0, x)};
    struct tensor_table table = {t, 2};
    struct buffer b = {0};
    struct err e = {0};
    CHECK(safetensors_write(&table, NULL, 0, sink, &b, &e) == E_FORMAT && strstr(e.text, "twice"));
    err_clear(&e);
    t[1] = make("b", DT_OTHER, 1, 2, 0, x);
    CHECK(safetensors_write(&table, NULL, 0, sink, &b, &e) == E_UNSUPPORTED);
    CHECK_STR(e.param, "b");
    err_clear(&e);
    t[1] = make("b", DT_F32, 1, 2, 0, x);
    t[1].bytes = 4;
    CHECK(safetensors_write(&table, NULL, 0, sink, &b, &e) == E_FORMAT);
    CHECK(b.n == 0); // refused before a byte was written
}
