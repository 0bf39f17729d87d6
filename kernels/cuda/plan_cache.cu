// SPDX-License-Identifier: MIT
/*
 * plan_cache: the algorithms that were found to be fastest, remembered for the life of the process and, in a folder, for the next one.
 *
 * Trying takes seconds. Within a process a choice holds for every later version of a model, on every card of the same kind. For some cards and
 * the papers' shapes choices come with the library, in the folder `products` beside it, so that a fresh container need not try. What comes
 * from a file is a hint and no more: plan.cu uses an algorithm only if it is one of the candidates of this very cuBLASLt and gives the reference bits here and
 * now, so that no file, whatever it holds, changes a picture.
 *
 * One file a kind of card, FOLDER/products-HASH, replaced as a whole:
 *   card: what the choice depends on: name, multiprocessors, cuBLASLt, and this format's number
 *   N K unit gelu fixed xt yt tf32 any-bits levels  lines:ALGORITHM ...  SUM      a line a product; ALGORITHM: 128 hex digits; SUM: FNV-1a of the line before it
 * A file that says anything else is ignored as a whole, with a note, and overwritten by the next choice.
 */
#include "kernels/cuda/linear.cuh"

#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define FORMAT 2
#define LINE 4096
#define MOST_LINES 4096 // of a file
#define ALGO_WORDS (sizeof(cublasLtMatmulAlgo_t) / 8)

struct known {
    struct known *next;
    char card[sizeof((struct cuda *)0)->card];
    struct plan_key key;
    bool tf32, any_bits, tried; // tried: by this process
    int n;
    struct plan_level level[PLAN_LEVELS];
};

struct seen { // a file that was read
    struct seen *next;
    char path[640];
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct known *choices; // for ever
static struct seen *files;

void plan_cache_open(struct cuda *c, const struct cudaDeviceProp *p, const char *folder) {
    Dl_info here = {};
    snprintf(c->card, sizeof c->card, "%d, %.80s, %d.%d, %d multiprocessors, cuBLASLt %zu", FORMAT, p->name, p->major, p->minor,
             p->multiProcessorCount, cublasLtGetVersion());
    if (folder && strlen(folder) < sizeof c->cache) strcpy(c->cache, folder);
    const char *slash = dladdr((const void *)plan_cache_open, &here) && here.dli_fname ? strrchr(here.dli_fname, '/') : NULL;
    int n = slash ? (int)(slash - here.dli_fname) : 0;
    if (slash && (size_t)n + sizeof "/products" <= sizeof c->shipped) snprintf(c->shipped, sizeof c->shipped, "%.*s/products", n, here.dli_fname);
}

static uint64_t fnv(const char *text) {
    uint64_t h = 14695981039346656037u;
    for (; *text; text++) h = (h ^ (unsigned char)*text) * 1099511628211u;
    return h;
}

static void file_path(const struct cuda *c, const char *folder, char path[640]) {
    snprintf(path, 640, "%s/products-%016llx", folder, (unsigned long long)fnv(c->card));
}

static bool same_key(const struct known *m, const struct cuda *c, const struct plan_key *key) {
    return m->key.N == key->N && m->key.K == key->K && m->key.unit == key->unit && m->key.gelu == key->gelu && m->key.fixed == key->fixed &&
           m->key.xt == key->xt && m->key.yt == key->yt && m->tf32 == c->tf32 && m->any_bits == (c->workspace != NULL) && strcmp(m->card, c->card) == 0;
}

static struct known *find(const struct cuda *c, const struct plan_key *key) {
    struct known *m = choices;
    while (m && !same_key(m, c, key)) m = m->next;
    return m;
}

/* ---- the file ---- */

static void print_known(FILE *f, const struct known *m) {
    char line[LINE];
    int at = snprintf(line, sizeof line, "%d %d %d %d %d %d %d %d %d %d", m->key.N, m->key.K, m->key.unit, m->key.gelu, m->key.fixed, (int)m->key.xt,
                      (int)m->key.yt, m->tf32, m->any_bits, m->n);
    for (int i = 0; i < m->n; i++) {
        at += snprintf(line + at, sizeof line - at, " %ld:", m->level[i].lines);
        for (size_t w = 0; w < ALGO_WORDS; w++)
            at += snprintf(line + at, sizeof line - at, "%016llx", (unsigned long long)m->level[i].algo.data[w]);
    }
    fprintf(f, "%s %016llx\n", line, (unsigned long long)fnv(line));
}

static bool parse_level(struct plan_level *l, char **at) {
    char *end, digits[17] = "";
    l->lines = strtol(*at, &end, 10);
    if (end == *at || *end++ != ':') return false;
    for (size_t w = 0; w < ALGO_WORDS; w++, end += 16) {
        char *stop;
        if (strnlen(end, 16) < 16) return false;
        memcpy(digits, end, 16);
        l->algo.data[w] = strtoull(digits, &stop, 16);
        if (*stop) return false;
    }
    return *at = end, true;
}

static bool parse_known(struct known *m, char *line) {
    int xt, yt, gelu, fixed, tf32, any, used = 0;
    size_t n = strlen(line);
    if (n < 18 || line[n - 1] != '\n' || line[n - 18] != ' ') return false;
    line[n - 1] = line[n - 18] = 0;
    char *stop;
    if (strtoull(line + n - 17, &stop, 16) != fnv(line) || *stop) return false;
    if (sscanf(line, "%d %d %d %d %d %d %d %d %d %d%n", &m->key.N, &m->key.K, &m->key.unit, &gelu, &fixed, &xt, &yt, &tf32, &any, &m->n, &used) != 10)
        return false;
    m->key.gelu = gelu, m->key.fixed = fixed, m->key.xt = (enum kern_dtype)xt, m->key.yt = (enum kern_dtype)yt, m->tf32 = tf32, m->any_bits = any;
    if (m->n < 1 || m->n > PLAN_LEVELS) return false;
    char *at = line + used;
    for (int i = 0; i < m->n; i++)
        if (*at++ != ' ' || !parse_level(&m->level[i], &at)) return false;
    return *at == 0;
}

// What the file says, as a list; false: it is not to be believed
static bool parse_file(FILE *f, const struct cuda *c, struct known **list) {
    char line[LINE], card[sizeof c->card + 8];
    snprintf(card, sizeof card, "card: %s\n", c->card);
    if (!fgets(line, sizeof line, f) || strcmp(line, card) != 0) return false;
    for (int n = 0; n < MOST_LINES && fgets(line, sizeof line, f); n++) {
        struct known *m = (struct known *)calloc(1, sizeof *m);
        if (!m) return false;
        m->next = *list, *list = m;
        strcpy(m->card, c->card);
        if (!parse_known(m, line)) return false;
    }
    return true;
}

static void read_file(struct kern *k, const char *folder) { // once; folder: "": none
    struct cuda *c = cuda_of(k);
    struct known *list = NULL;
    struct seen *s = files;
    char path[sizeof s->path];
    if (!folder[0]) return;
    file_path(c, folder, path);
    while (s && strcmp(s->path, path) != 0) s = s->next;
    if (s || !(s = (struct seen *)calloc(1, sizeof *s))) return;
    strcpy(s->path, path);
    s->next = files, files = s;
    FILE *f = fopen(path, "re");
    if (!f) return; // there is none yet
    bool good = parse_file(f, c, &list);
    fclose(f);
    if (!good) snprintf(k->note, sizeof k->note, "%.200s is damaged or of another card: ignored", path);
    for (struct known *next; list; list = next) {
        next = list->next;
        bool wanted = good && !find(c, &list->key);
        if (wanted) list->next = choices, choices = list;
        else free(list);
    }
}

static void make_folder(const char *path) { // and the one above it
    char above[512];
    snprintf(above, sizeof above, "%s", path);
    char *slash = strrchr(above, '/');
    if (slash && slash > above) *slash = 0, (void)mkdir(above, 0777);
    (void)mkdir(path, 0777);
}

// Under a name of its own first: a reader sees all or nothing, two writers do not mix.
static void write_file(struct kern *k) {
    const struct cuda *c = cuda_of(k);
    char path[640], temp[680];
    file_path(c, c->cache, path);
    snprintf(temp, sizeof temp, "%s.%d", path, (int)getpid());
    make_folder(c->cache);
    FILE *f = fopen(temp, "we");
    bool good = f != NULL;
    if (f) fprintf(f, "card: %s\n", c->card);
    for (const struct known *m = choices; f && m; m = m->next)
        if (strcmp(m->card, c->card) == 0) print_known(f, m);
    if (f) good = !ferror(f) & (fclose(f) == 0);
    if (good) good = rename(temp, path) == 0;
    if (good) return;
    snprintf(k->note, sizeof k->note, "the choice of products cannot be kept in %.120s: %.80s", path, strerror(errno));
    unlink(temp);
}

/* ---- finding and keeping ---- */

enum plan_memory plan_cache_find(struct kern *k, const struct plan_key *key, int n, struct plan_level *level) {
    struct cuda *c = cuda_of(k);
    pthread_mutex_lock(&lock);
    read_file(k, c->cache);
    read_file(k, c->shipped);
    const struct known *m = find(c, key);
    bool fits = m && m->n == n;
    for (int i = 0; fits && i < n; i++) fits = m->level[i].lines == level[i].lines;
    for (int i = 0; fits && i < n; i++) level[i] = m->level[i];
    enum plan_memory found = !fits ? PLAN_UNKNOWN : m->tried ? PLAN_TRIED : PLAN_REMEMBERED;
    pthread_mutex_unlock(&lock);
    return found;
}

void plan_cache_keep(struct kern *k, const struct plan_key *key, int n, const struct plan_level *level) {
    struct cuda *c = cuda_of(k);
    pthread_mutex_lock(&lock);
    struct known *m = find(c, key);
    bool news = !m || m->n != n || memcmp(m->level, level, (size_t)n * sizeof *level) != 0;
    if (!m && (m = (struct known *)calloc(1, sizeof *m))) {
        strcpy(m->card, c->card);
        m->key = *key;
        m->tf32 = c->tf32, m->any_bits = c->workspace != NULL;
        m->next = choices, choices = m;
    }
    if (m) {
        m->tried = true;
        m->n = n;
        memcpy(m->level, level, (size_t)n * sizeof *level);
        if (news && c->cache[0]) write_file(k);
    }
    pthread_mutex_unlock(&lock);
}
