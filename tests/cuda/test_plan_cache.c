// SPDX-License-Identifier: MIT
// Products' choices on disk: used by the next process, never believed blindly, and without any effect on bytes. Needs a GPU.
#include <dirent.h>
#include <stdint.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "kernels/kern.h"
#include "tests/test.h"

enum { N = 384, K = 256, UNIT = 64, UNITS = 5, OUT = UNITS * UNIT * N };

struct result { // what a process of its own found
    uint16_t y[OUT];
    char note[256];
};

static void multiply(struct result *r, const char *folder) {
    struct kern *k;
    struct kern_linear *l;
    void *x, *y;
    static float w[N * K], host[UNITS * UNIT * K];
    static uint16_t half[UNITS * UNIT * K];
    char why[256];
    if (kern_open(&k, &(struct kern_config){.backend = "cuda", .act = KERN_BF16, .cache = folder}, why, sizeof why)) test_fail(__FILE__, __LINE__, "%s", why);
    for (int i = 0; i < N * K; i++) w[i] = (float)(int32_t)((uint32_t)i * 2654435761u) * 0x1p-33f;
    for (int i = 0; i < UNITS * UNIT * K; i++) {
        host[i] = (float)(int32_t)((uint32_t)i * 668265263u) * 0x1p-31f;
        memcpy(&half[i], (char *)&host[i] + 2, 2);
    }
    CHECK(k->linear_new(k, &(struct kern_linear_spec){.out = N, .in = K, .unit = UNIT, .act = KERN_GELU_TANH}, w, NULL, &l) == 0);
    CHECK(k->alloc(k, sizeof half, &x) == 0 && k->alloc(k, sizeof r->y, &y) == 0 && k->upload(k, x, half, sizeof half) == 0);
    CHECK(k->linear(k, l, y, x, UNITS, NULL) == 0 && k->download(k, r->y, y, sizeof r->y) == 0);
    snprintf(r->note, sizeof r->note, "%s", k->note);
    k->linear_free(k, l);
    k->free(k, x), k->free(k, y);
    kern_close(k);
}

// In a process of its own, as a cache in memory would be found first
static void elsewhere(struct result *r, const char *folder) {
    int pipes[2], status;
    CHECK(pipe(pipes) == 0);
    pid_t child = fork();
    if (child == 0) {
        static struct result mine;
        multiply(&mine, folder);
        for (size_t at = 0; at < sizeof mine;) {
            ssize_t n = write(pipes[1], (char *)&mine + at, sizeof mine - at);
            if (n <= 0) _exit(3);
            at += (size_t)n;
        }
        _exit(0);
    }
    close(pipes[1]);
    for (size_t at = 0; at < sizeof *r;) {
        ssize_t n = read(pipes[0], (char *)r + at, sizeof *r - at);
        if (n <= 0) break;
        at += (size_t)n;
    }
    close(pipes[0]);
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

static char text[2][65536];
static size_t load(char path[512], const char *folder, char *to) { // the folder's only file
    DIR *d = opendir(folder);
    size_t n = 0;
    int files = 0;
    CHECK(d);
    for (struct dirent *f; (f = readdir(d));)
        if (f->d_name[0] != '.') snprintf(path, 512, "%s/%.200s", folder, f->d_name), files++;
    closedir(d);
    CHECK(files == 1);
    FILE *f = fopen(path, "r");
    CHECK(f && (n = fread(to, 1, sizeof text[0] - 1, f)) > 0);
    fclose(f);
    return to[n] = 0, n;
}

static void store(const char *path, const char *from, size_t n) {
    FILE *f = fopen(path, "w");
    CHECK(f && fwrite(from, 1, n, f) == n && fclose(f) == 0);
}

TEST(cuda_choice_of_products_is_kept_and_never_changes_a_byte) {
    static struct result first, again;
    char folder[] = "/tmp/sitd-cache-XXXXXX", inside[64], path[512], command[128];
    CHECK(mkdtemp(folder));
    snprintf(inside, sizeof inside, "%s/made/here", folder);
    elsewhere(&first, NULL);
    elsewhere(&again, inside); // writes it
    CHECK(memcmp(&first, &again, sizeof first) == 0 && !again.note[0]);
    size_t n = load(path, inside, text[0]);
    CHECK(strstr(text[0], "card: ") == text[0] && strstr(text[0], "\n384 256 64 "));
    elsewhere(&again, inside); // reads it, and finds nothing to add
    CHECK(memcmp(&first, &again, sizeof first) == 0);
    CHECK(load(path, inside, text[1]) == n && memcmp(text[0], text[1], n) == 0);
    for (int way = 0; way < 4; way++) { // damage: a digit, its end, the card, everything
        memcpy(text[1], text[0], n + 1);
        size_t size = n;
        if (way == 0) text[1][n - 40] = text[1][n - 40] == '0' ? '1' : '0';
        if (way == 1) size -= 30;
        if (way == 2) text[1][8] ^= 1;
        if (way == 3) memset(text[1], 'x', size = 5000);
        store(path, text[1], size);
        elsewhere(&again, inside);
        CHECK(memcmp(first.y, again.y, sizeof first.y) == 0 && strstr(again.note, "ignored"));
        CHECK(load(path, inside, text[1]) == n); // and is whole again
    }
    snprintf(command, sizeof command, "rm -rf %s", folder);
    CHECK(system(command) == 0);
    snprintf(inside, sizeof inside, "/proc/nowhere");
    elsewhere(&again, inside); // cannot be written: said, and no more
    CHECK(memcmp(first.y, again.y, sizeof first.y) == 0 && strstr(again.note, "cannot be kept"));
}

// Steps are queued no further ahead than one.
TEST(cuda_pace_keeps_the_host_by_the_device) {
    enum { SIDE = 4096, STEPS = 30, PRODUCTS = 20 };
    struct kern *k;
    struct kern_linear *l;
    void *x, *y;
    char why[256];
    CHECK(kern_open(&k, &(struct kern_config){.backend = "cuda", .act = KERN_BF16}, why, sizeof why) == 0);
    float *w = calloc((size_t)SIDE * SIDE, 4), one;
    CHECK(w && k->linear_new(k, &(struct kern_linear_spec){.out = SIDE, .in = SIDE, .unit = SIDE}, w, NULL, &l) == 0);
    CHECK(k->alloc(k, (size_t)SIDE * SIDE * 2, &x) == 0 && k->alloc(k, (size_t)SIDE * SIDE * 2, &y) == 0);
    struct timespec t[3];
    CHECK(k->download(k, &one, y, 4) == 0);
    clock_gettime(CLOCK_MONOTONIC, &t[0]);
    for (int s = 0; s < STEPS; s++) {
        for (int i = 0; i < PRODUCTS; i++) CHECK(k->linear(k, l, y, x, 1, NULL) == 0);
        CHECK(k->pace(k) == 0);
    }
    clock_gettime(CLOCK_MONOTONIC, &t[1]);
    CHECK(k->download(k, &one, y, 4) == 0);
    clock_gettime(CLOCK_MONOTONIC, &t[2]);
    double queued = (double)(t[1].tv_sec - t[0].tv_sec) + 1e-9 * (double)(t[1].tv_nsec - t[0].tv_nsec),
           rest = (double)(t[2].tv_sec - t[1].tv_sec) + 1e-9 * (double)(t[2].tv_nsec - t[1].tv_nsec);
    CHECK(rest < 3 * (queued + rest) / STEPS && rest > 0.3 * (queued + rest) / STEPS); // one step is left
    k->linear_free(k, l);
    k->free(k, x), k->free(k, y);
    free(w);
    kern_close(k);
}
