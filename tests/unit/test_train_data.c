// SPDX-License-Identifier: MIT
#include <math.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zlib.h>

#include "core/base/mem.h"
#include "core/io/file.h"
#include "core/io/idx.h"
#include "core/io/png.h"
#include "core/io/resize.h"
#include "core/io/safetensors.h"
#include "core/train/feed.h"
#include "tests/test.h"

static char dir[64];

static const char *at(const char *name) {
    static char paths[4][256];
    static int turn;
    char *p = paths[turn++ % 4];
    snprintf(p, sizeof *paths, "%s/%s", dir, name);
    return p;
}

static void begin(void) {
    snprintf(dir, sizeof dir, "/tmp/sitd-data-XXXXXX");
    CHECK(mkdtemp(dir));
}

static void end(void) {
    char command[128];
    snprintf(command, sizeof command, "rm -r %s", dir);
    CHECK(system(command) == 0);
}

static void put(const char *name, const void *bytes, size_t n) {
    struct err e = {0};
    CHECK_OK(file_write(at(name), bytes, n, &e), &e);
}

/* ---- IDX ---- */

// An IDX file of n bytes behind a header that claims what it likes.
static size_t idx_bytes(unsigned char *to, int rank, const unsigned *dims, size_t n) {
    unsigned char *p = to;
    *p++ = 0, *p++ = 0, *p++ = 8, *p++ = (unsigned char)rank;
    for (int i = 0; i < rank; i++)
        for (int shift = 24; shift >= 0; shift -= 8) *p++ = (unsigned char)(dims[i] >> shift);
    for (size_t i = 0; i < n; i++) *p++ = (unsigned char)(i * 7);
    return (size_t)(p - to);
}

static void put_gz(const char *name, const void *bytes, size_t n) {
    gzFile f = gzopen(at(name), "wb9");
    CHECK(f && gzwrite(f, bytes, (unsigned)n) == (int)n && gzclose(f) == Z_OK);
}

static void make_idx(int n, int side, int labels, bool gz) {
    unsigned char bytes[65536];
    size_t size = idx_bytes(bytes, 3, (unsigned[]){(unsigned)n, (unsigned)side, (unsigned)side}, (size_t)(n * side * side));
    gz ? put_gz("train-images-idx3-ubyte.gz", bytes, size) : put("train-images-idx3-ubyte", bytes, size);
    size = idx_bytes(bytes, 1, (unsigned[]){(unsigned)labels}, (size_t)labels);
    for (int i = 0; i < labels; i++) bytes[8 + i] = (unsigned char)(i % 5);
    gz ? put_gz("train-labels-idx1-ubyte.gz", bytes, size) : put("train-labels-idx1-ubyte", bytes, size);
}

TEST(train_idx_is_padded_with_black) {
    struct data *d;
    struct err e = {0};
    float x[64];
    int32_t label;
    for (int gz = 0; gz < 2; gz++) {
        begin();
        make_idx(11, 6, 11, gz);
        CHECK_OK(data_open(&d, &(struct data_spec){.path = dir, .size = 8, .channels = 1, .seed = 3}, &e), &e);
        CHECK(data_info(d)->n == 11 && data_info(d)->classes == 5 && data_info(d)->size == 8 && data_info(d)->channels == 1);
        bool seen[11] = {0};
        for (uint64_t p = 0; p < 11; p++) {
            CHECK_OK(data_example(d, p, x, &label, &e), &e);
            int64_t index = (int64_t)data_order(3, 0, 11, p);
            seen[index] = true;
            CHECK(label == index % 5);
            for (int i = 0; i < 8; i++)
                for (int j = 0; j < 8; j++) {
                    bool inside = i > 0 && i < 7 && j > 0 && j < 7;
                    int v = (unsigned char)((index * 36 + (i - 1) * 6 + j - 1) * 7);
                    CHECK(x[i * 8 + j] == (inside ? (float)v / 127.5f - 1.0f : -1.0f));
                }
        }
        for (int i = 0; i < 11; i++) CHECK(seen[i]);
        data_close(d);
        end();
    }
}

static void idx_refused(const void *bytes, size_t n, const char *text) {
    struct idx x;
    struct err e = {0};
    put("x", bytes, n);
    CHECK(idx_read(&x, at("x"), &e) == E_FORMAT || e.status == E_RANGE);
    if (!strstr(e.text, text) || !strstr(e.text, dir)) test_fail(__FILE__, __LINE__, "\"%s\" does not say \"%s\"", e.text, text);
}

TEST(train_idx_malformed) {
    unsigned char b[4096], gz[4096];
    size_t n;
    begin();
    idx_refused("", 0, "too short");
    idx_refused("\0\0", 2, "too short");
    idx_refused("\0\0\x0d\1\0\0\0\1\0\0\0\0", 12, "not an IDX file of unsigned bytes");
    idx_refused("\0\0\x08\4", 4, "4 dimensions");
    idx_refused("\0\0\x08\0", 4, "0 dimensions");
    idx_refused("\0\0\x08\3\0\0\0\1\0\0", 10, "inside its header");
    n = idx_bytes(b, 2, (unsigned[]){3, 0}, 0);
    idx_refused(b, n, "dimension 1 is 0");
    n = idx_bytes(b, 3, (unsigned[]){0xffffffff, 0xffffffff, 0xffffffff}, 16);
    idx_refused(b, n, "more than 4 GiB");
    n = idx_bytes(b, 3, (unsigned[]){1000, 28, 28}, 64);
    idx_refused(b, n, "can hold");
    n = idx_bytes(b, 1, (unsigned[]){20}, 19);
    idx_refused(b, n, "ends before");
    n = idx_bytes(b, 1, (unsigned[]){20}, 21);
    idx_refused(b, n, "goes on behind");
    // gzip: cut, longer and shorter than it says, a wrong check sum, and a claim beyond what deflate can do
    for (int kind = 0; kind < 5; kind++) {
        n = idx_bytes(b, 1, (unsigned[]){kind == 4 ? 3u << 30 : 2000}, kind == 1 ? 2001 : kind == 2 ? 1999 : 2000);
        put_gz("y", b, n);
        FILE *f = fopen(at("y"), "rb");
        size_t size = fread(gz, 1, sizeof gz, f);
        fclose(f);
        if (kind == 0) size -= 12;
        if (kind == 3) gz[size - 6] ^= 1;
        idx_refused(gz, size, kind == 4 ? "can hold" : kind == 1 ? "goes on behind" : "ends before");
    }
    end();
}

static void refused(const struct data_spec *s, int status, const char *text) {
    struct data *d;
    struct err e = {0};
    int rc = data_open(&d, s, &e);
    if (rc != status || !d == 0 || !strstr(e.text, text))
        test_fail(__FILE__, __LINE__, "%d \"%s\", not %d \"%s\"", rc, e.text, status, text);
}

TEST(train_data_that_does_not_fit) {
    begin();
    refused(&(struct data_spec){.path = "/nonexistent"}, E_NOTFOUND, "/nonexistent");
    refused(&(struct data_spec){.path = dir}, E_NOTFOUND, "holds no data");
    make_idx(11, 6, 10, false);
    refused(&(struct data_spec){.path = dir}, E_CONFLICT, "11 images");
    make_idx(11, 6, 11, false);
    refused(&(struct data_spec){.path = dir, .size = 4}, E_CONFLICT, "more than the 4");
    unlink(at("train-labels-idx1-ubyte"));
    refused(&(struct data_spec){.path = dir}, E_NOTFOUND, "train-labels-idx1-ubyte");
    end();
}

/* ---- pictures ---- */

static void put_png(const char *name, int w, int h, int channels, uint8_t shade) {
    uint8_t pixels[64 * 64 * 3], *png;
    size_t n;
    struct err e = {0};
    for (size_t i = 0; i < sizeof pixels; i++)
        pixels[i] = (uint8_t)(shade + (i / (size_t)channels) % (size_t)w * 2); // brighter to the right
    CHECK_OK(png_encode(&png, &n, pixels, w, h, channels, 1, NULL, 0, &e), &e);
    put(name, png, n);
    mem_free(png);
}

TEST(train_pictures_by_class) {
    struct data *d;
    struct err e = {0};
    float x[3 * 64], y[3 * 64];
    int32_t label;
    begin();
    mkdir(at("cat"), 0777), mkdir(at("ant"), 0777), mkdir(at(".hidden"), 0777);
    put_png("cat/1.png", 20, 9, 3, 10);
    put_png("cat/2.PNG", 8, 8, 1, 20);
    put_png("ant/x.png", 33, 40, 1, 30);
    put("ant/readme.txt", "?", 1);
    struct data_spec spec = {.path = dir, .size = 8, .channels = 3, .seed = 1};
    CHECK_OK(data_open(&d, &spec, &e), &e);
    CHECK(data_info(d)->n == 3 && data_info(d)->classes == 2);
    CHECK_STR(data_info(d)->names[0], "ant");
    CHECK_STR(data_info(d)->names[1], "cat");
    int count[2] = {0};
    for (uint64_t p = 0; p < 3; p++) {
        CHECK_OK(data_example(d, p, x, &label, &e), &e);
        count[label]++;
        for (int i = 0; i < 192; i++) CHECK(x[i] >= -1 && x[i] <= 1);
        CHECK(x[7] > x[0]);
    }
    CHECK(count[0] == 1 && count[1] == 2);
    data_close(d);
    spec.flip = true; // some are mirrored, the same ones each time
    CHECK_OK(data_open(&d, &spec, &e), &e);
    int mirrored = 0;
    for (uint64_t p = 0; p < 60; p++) {
        CHECK_OK(data_example(d, p, x, &label, &e), &e);
        CHECK_OK(data_example(d, p, y, &label, &e), &e);
        CHECK(memcmp(x, y, sizeof x) == 0);
        mirrored += x[7] < x[0];
    }
    CHECK(mirrored > 15 && mirrored < 45);
    data_close(d);
    refused(&(struct data_spec){.path = dir}, E_RANGE, "--size");
    refused(&(struct data_spec){.path = dir, .size = 8, .channels = 4}, E_CONFLICT, "1 or 3 channels");
    mkdir(at("empty"), 0777);
    refused(&spec, E_FORMAT, "empty: the class has no PNG or JPEG");
    end();
}

static void picture_refused(const char *name, const void *bytes, size_t n, const char *text) {
    struct data *d;
    struct err e = {0};
    float x[192];
    int32_t label;
    begin();
    mkdir(at("a"), 0777);
    put(name, bytes, n);
    CHECK_OK(data_open(&d, &(struct data_spec){.path = dir, .size = 8}, &e), &e);
    int rc = data_example(d, 0, x, &label, &e);
    if (rc != E_FORMAT) test_fail(__FILE__, __LINE__, "%s of %zu bytes: %d %s", name, n, rc, e.text);
    if (!strstr(e.text, name) || !strstr(e.text, text)) test_fail(__FILE__, __LINE__, "\"%s\" does not say \"%s\"", e.text, text);
    data_close(d);
    end();
}

// A grey JPEG of 8 x 8, made by libjpeg; its size field is at 0x9e.
static const unsigned char tiny_jpeg[] = {
#include "tests/unit/tiny_jpeg.inc"
};

TEST(train_pictures_that_lie) {
    unsigned char b[sizeof tiny_jpeg + 16];
    struct data *d;
    struct err e = {0};
    float x[64];
    int32_t label;
    begin();
    mkdir(at("a"), 0777);
    put("a/x.jpeg", tiny_jpeg, sizeof tiny_jpeg);
    CHECK_OK(data_open(&d, &(struct data_spec){.path = dir, .size = 8, .channels = 1}, &e), &e);
    CHECK_OK(data_example(d, 0, x, &label, &e), &e);
    for (int i = 0; i < 64; i++) CHECK(fabsf(x[i] - (float)(i % 8 * 30 + 10) / 127.5f + 1) < 0.06f);
    data_close(d);
    end();
    picture_refused("a/x.png", "", 0, "PNG");
    picture_refused("a/x.jpg", "\xff\xd8\xff", 3, "JPEG");
    for (size_t cut = 3; cut < sizeof tiny_jpeg - 2; cut += 9) picture_refused("a/cut.jpg", tiny_jpeg, cut, "JPEG");
    memcpy(b, tiny_jpeg, sizeof tiny_jpeg);
    size_t sof = 0;
    while (b[sof] != 0xff || b[sof + 1] != 0xc0) sof++;
    memcpy(b + sof + 5, "\xf0\x00\xf0\x00", 4); // 61440 x 61440
    picture_refused("a/huge.jpg", b, sizeof tiny_jpeg, "64 megapixels");
    memcpy(b + sof + 5, "\x20\x00\x20\x00", 4); // 8192 x 8192: allowed, but not there
    picture_refused("a/lie.jpg", b, sizeof tiny_jpeg, "ends too early");
}

// What Pillow 13's BOX and BICUBIC and ADM's center_crop_arr make of the same pixels.
TEST(resize_agrees_with_pillow) {
    static const uint8_t want[64] = {156, 118, 128, 123, 149, 135, 137, 139, 78,  152, 130, 141, 187, 141, 111, 113,
                                     144, 138, 132, 123, 113, 131, 149, 119, 130, 124, 150, 137, 167, 137, 139, 125,
                                     148, 126, 136, 135, 157, 111, 129, 115, 118, 128, 138, 122, 131, 133, 135, 137,
                                     136, 162, 124, 146, 185, 107, 125, 143, 122, 116, 110, 117, 127, 129, 131, 117};
    uint8_t src[40 * 33], dst[64];
    struct err e = {0};
    for (int y = 0; y < 40; y++)
        for (int x = 0; x < 33; x++) src[y * 33 + x] = (uint8_t)((x * x * 7 + y * y * 13 + x * y) % 256);
    CHECK_OK(resize_center_crop(dst, 8, src, 33, 40, 1, &e), &e);
    CHECK(memcmp(dst, want, 64) == 0);
}

// A file of a few hundred bytes must not ask for gigabytes.
TEST(resize_refuses_what_is_too_long) {
    static uint8_t src[16384], dst[1024 * 1024];
    struct err e = {0};
    CHECK(resize_center_crop(dst, 1024, src, 1, 16384, 1, &e) == E_RANGE && strstr(e.text, "1 x 16384"));
    err_clear(&e);
    CHECK(resize_center_crop(dst, 1024, src, 16384, 1, 1, &e) == E_RANGE && strstr(e.text, "16384 x 1"));
    err_clear(&e);
    CHECK_OK(resize_center_crop(dst, 16, src, 1, 16384, 1, &e), &e);
}

/* ---- latents ---- */

static int to_file(void *f, const void *bytes, size_t n, struct err *e) { return file_out_write(f, bytes, n, e); }

static void put_latents(const char *name, int n, int side, int64_t label, float logvar, const char *scale) {
    float mean[2048], var[2048];
    int64_t labels[16];
    struct file_out out;
    struct err e = {0};
    size_t count = (size_t)(n * 4 * side * side);
    for (size_t i = 0; i < count; i++) mean[i] = (float)i, var[i] = logvar;
    for (int i = 0; i < n; i++) labels[i] = label;
    struct tensor t[3] = {
        {.name = "mean", .ndim = 4, .shape = {n, 4, side, side}, .data = mean, .count = count, .bytes = count * 4},
        {.name = "logvar", .ndim = 4, .shape = {n, 4, side, side}, .data = var, .count = count, .bytes = count * 4},
        {.name = "label", .dtype = DT_I64, .ndim = 1, .shape = {n}, .data = labels, .count = (size_t)n, .bytes = (size_t)n * 8}};
    struct meta_pair meta[] = {{(char *)"scaling_factor", (char *)(uintptr_t)scale}};
    CHECK_OK(file_out_open(&out, at(name), &e), &e);
    CHECK_OK(safetensors_write(&(struct tensor_table){t, 3}, meta, 1, to_file, &out, &e), &e);
    CHECK_OK(file_out_commit(&out, NULL, &e), &e);
}

TEST(train_latents_come_as_whole_sets) {
    struct data *d;
    struct err e = {0};
    begin();
    struct data_spec spec = {.path = dir, .seed = 5};
    put_latents("a-00001-of-00002.safetensors", 3, 4, 2, -30, "0.5");
    refused(&spec, E_CONFLICT, "a-00001-of-00002.safetensors: shard 2 of 2 was due");
    put_latents("a-00002-of-00002.safetensors", 2, 4, 7, -30, "0.5");
    put_latents("b.safetensors", 1, 4, 7, -30, "0.5"); // of no set
    CHECK_OK(data_open(&d, &spec, &e), &e);
    CHECK(data_info(d)->n == 6);
    data_close(d);
    put_latents("a-00001-of-00003.safetensors", 3, 4, 2, -30, "0.5"); // of another time
    refused(&spec, E_CONFLICT, "two sets are mixed");
    CHECK(unlink(at("a-00001-of-00003.safetensors")) == 0 && unlink(at("a-00001-of-00002.safetensors")) == 0);
    refused(&spec, E_CONFLICT, "a-00002-of-00002.safetensors: the shards before it are missing");
    end();
}

TEST(train_latents_are_sampled_and_scaled) {
    struct data *d;
    struct err e = {0};
    float x[64], y[64];
    int32_t label;
    begin();
    put_latents("a-00001-of-00002.safetensors", 3, 4, 2, -30, "0.5");
    put_latents("a-00002-of-00002.safetensors", 2, 4, 7, -30, "0.5");
    struct data_spec spec = {.path = dir, .seed = 5};
    CHECK_OK(data_open(&d, &spec, &e), &e);
    CHECK(data_info(d)->n == 5 && data_info(d)->classes == 8 && data_info(d)->channels == 4 && data_info(d)->size == 4);
    for (uint64_t p = 0; p < 5; p++) {
        uint64_t index = data_order(5, 0, 5, p);
        CHECK_OK(data_example(d, p, x, &label, &e), &e);
        CHECK(label == (index < 3 ? 2 : 7));
        CHECK_NEAR(x[9], 0.5 * (double)((index < 3 ? index : index - 3) * 64 + 9), 1e-4);
    }
    data_close(d);
    put_latents("a-00001-of-00002.safetensors", 3, 4, 2, 0, "0.5"); // deviation 1: another sample in each epoch
    CHECK_OK(data_open(&d, &(struct data_spec){.path = at("a-00001-of-00002.safetensors"), .seed = 5}, &e), &e);
    double sum = 0;
    for (uint64_t p = 0; p < 300; p++) {
        CHECK_OK(data_example(d, p, x, &label, &e), &e);
        CHECK_OK(data_example(d, p, y, &label, &e), &e);
        CHECK(memcmp(x, y, sizeof x) == 0);
        double off = (double)x[9] / 0.5 - (double)(data_order(5, p / 3, 3, p % 3) * 64 + 9);
        sum += off * off;
    }
    CHECK_NEAR(sum / 300, 1, 0.3);
    data_close(d);
    refused(&(struct data_spec){.path = dir, .flip = true}, E_CONFLICT, "sitd encode --flip");
    put_latents("a-00002-of-00002.safetensors", 2, 2, 7, -30, "0.5");
    refused(&spec, E_CONFLICT, "a-00002-of-00002.safetensors: 'mean' is [2, 4, 2, 2]");
    put_latents("a-00002-of-00002.safetensors", 2, 4, 7, -30, "0.25");
    refused(&spec, E_CONFLICT, "scaling_factor");
    put_latents("a-00002-of-00002.safetensors", 2, 4, -1, -30, "0.5");
    refused(&spec, E_RANGE, "label -1 of example 0");
    put_latents("a-00001-of-00002.safetensors", 3, 4, 2, -30, "0");
    refused(&(struct data_spec){.path = at("a-00001-of-00002.safetensors")}, E_RANGE, "scaling_factor is 0");
    end();
}

// The first four examples of a shard of one log-variance.
static void latents_of(float logvar, float x[4 * 64]) {
    struct data *d;
    struct err e = {0};
    int32_t label;
    put_latents("one.safetensors", 3, 4, 0, logvar, "0.5");
    CHECK_OK(data_open(&d, &(struct data_spec){.path = at("one.safetensors"), .seed = 5}, &e), &e);
    for (uint64_t p = 0; p < 4; p++) CHECK_OK(data_example(d, p, x + 64 * p, &label, &e), &e);
    data_close(d);
}

TEST(train_latents_have_their_variance_clamped) {
    float most[256], least[256], x[256];
    begin();
    latents_of(20, most);
    latents_of(-30, least);
    latents_of(19, x);
    CHECK(memcmp(x, most, sizeof x) != 0);
    latents_of(-29, x);
    CHECK(memcmp(x, least, sizeof x) != 0);
    latents_of(21, x);
    CHECK(memcmp(x, most, sizeof x) == 0);
    latents_of(1e30f, x); // its exponential alone would be infinite
    CHECK(memcmp(x, most, sizeof x) == 0);
    latents_of(-1e30f, x);
    CHECK(memcmp(x, least, sizeof x) == 0);
    end();
}

// An example is read when its turn comes; so is what is wrong with it found.
TEST(train_latents_are_read_when_they_are_wanted) {
    static const float bad[] = {NAN, -INFINITY};
    struct data *d;
    struct err e = {0};
    float x[256];
    int32_t label;
    begin();
    for (int i = 0; i < 2; i++) {
        put_latents("one.safetensors", 3, 4, 0, bad[i], "0.5");
        CHECK_OK(data_open(&d, &(struct data_spec){.path = at("one.safetensors"), .seed = 5}, &e), &e);
        CHECK(data_example(d, 0, x, &label, &e) == E_NONFINITE && strstr(e.text, "one.safetensors: tensor 'logvar' holds NaN or infinity"));
        err_clear(&e);
        data_close(d);
    }
    latents_of(-30, x);
    CHECK_OK(data_open(&d, &(struct data_spec){.path = at("one.safetensors"), .seed = 5}, &e), &e);
    CHECK(truncate(at("one.safetensors"), 500) == 0);
    CHECK(data_example(d, 0, x, &label, &e) == E_IO && strstr(e.text, "one.safetensors has become shorter"));
    data_close(d);
    end();
}

/* ---- order and feed ---- */

TEST(train_order_is_a_permutation_an_epoch) {
    for (uint64_t n = 1; n < 70; n += n < 20 ? 1 : 7) {
        int moved = 0;
        for (uint64_t epoch = 0; epoch < 3; epoch++) {
            bool seen[70] = {0};
            for (uint64_t i = 0; i < n; i++) {
                uint64_t k = data_order(9, epoch, n, i);
                CHECK(k < n && !seen[k]);
                seen[k] = true;
                moved += k != data_order(9, epoch + 1, n, i);
            }
        }
        CHECK(n < 8 || moved > (int)n);
    }
}

TEST(train_feed_gives_the_same_whatever_its_threads_and_start) {
    struct data *d;
    struct feed *f, *late;
    struct feed_batch b, c;
    struct err e = {0};
    begin();
    make_idx(11, 6, 11, false);
    CHECK_OK(data_open(&d, &(struct data_spec){.path = dir, .flip = true, .seed = 3}, &e), &e);
    struct feed_spec spec = {.batch = 8, .first = 0, .local = 8, .rows = 2, .threads = 3};
    CHECK_OK(feed_open(&f, d, &spec, &e), &e);
    for (int q = 0; q < 20; q++) CHECK_OK(feed_next(f, &b, &e), &e);
    spec = (struct feed_spec){
        .step = 5, .batch = 8, .first = 4, .local = 4, .rows = 4, .threads = 1}; // a second rank that begins at step 5
    CHECK_OK(feed_open(&late, d, &spec, &e), &e);
    for (int step = 5; step < 9; step++) {
        CHECK_OK(feed_next(late, &c, &e), &e);
        CHECK(c.first == 4);
        for (int q = 0; q < 4; q++) {
            CHECK_OK(feed_next(f, &b, &e), &e);
            CHECK(b.first == 2 * q);
            if (q < 2) continue;
            CHECK(memcmp(b.x, c.x + (q - 2) * 72, 72 * sizeof(float)) == 0);
            CHECK(memcmp(b.label, c.label + (q - 2) * 2, 2 * sizeof *b.label) == 0);
        }
    }
    feed_close(f);
    feed_close(late);
    data_close(d);
    end();
}
