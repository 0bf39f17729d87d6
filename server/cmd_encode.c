// SPDX-License-Identifier: MIT
/*
 * sitd encode: pictures to latents, once, so that training and evaluation need no VAE.
 *
 * One folder a class, classes in the order of their names (bytes compared, as Python's sorted and torchvision's ImageFolder do) and PNGs and JPEGs in the
 * order of theirs within a class, become safetensors files with
 *   mean, logvar [n, latent channels, h, w] (float32)   the posterior: z = mean + exp(logvar/2)*noise, latent = z*scale
 *   label [n] (int64)                                   the class's place
 * and the classes' names, sizes, scale and the VAE's path in __metadata__. A shard is held in memory until it is written whole; files appear under
 * their names when they are complete. Pictures have one size, or --size cuts a square out of each as ADM, DiT and SiT do.
 */
#include <dirent.h>
#include <errno.h>
#include <getopt.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "core/base/clock.h"
#include "core/base/mem.h"
#include "core/io/file.h"
#include "core/io/picture.h"
#include "core/io/safetensors.h"
#include "core/model/vae.h"
#include "server/cmd.h"

static const char help[] =
    "usage: sitd encode --vae PATH --images DIR --out FILE.safetensors [options]\n\n"
    "Encodes a folder of PNGs and JPEGs by class (DIR/CLASS/*.png, *.jpg, *.jpeg) to latents: mean and logvar of the posterior, and labels.\n\n"
    "  --vae PATH         an AutoencoderKL: a diffusers folder, .safetensors, .pt, .bin or .ckpt\n"
    "  --images DIR       one folder a class, in the order of their names\n"
    "  --size N           cut each to N x N as ADM, DiT and SiT do (default: all are of one size, and stay so)\n"
    "  --out FILE         where to write; with more than one shard FILE-00001-of-00004.safetensors and so on\n"
    "  --flip             every picture twice, the second mirrored left and right: latents cannot be mirrored when training reads them\n"
    "  --shard N          pictures a file (default 10000)\n"
    "  --threads N        compute threads (default: what the machine allows)\n"
    "  --backend NAME     cpu (default), cuda, ref, or auto\n"
    "  --help\n";

struct options {
    const char *vae, *images, *out;
    int shard, size; // size 0: the pictures' own
    bool flip;
    struct kern_config kern;
};

struct picture { char *path; int label; bool mirrored; };
struct set { // what is to be encoded
    struct picture *pictures;
    int n, room;
    char **classes;
    int n_classes;
};

static int fail(const struct err *e) {
    fprintf(stderr, "sitd encode: %s\n", e->text);
    return status_exit_code(e->status);
}

static int usage(const char *what, const char *value) {
    fprintf(stderr, "sitd encode: %s%s\n%s", what, value, help);
    return 2;
}

/* ---- the folder ---- */

static int visible(const struct dirent *d) { return d->d_name[0] != '.'; }
static int by_bytes(const struct dirent **a, const struct dirent **b) { return strcmp((*a)->d_name, (*b)->d_name); }

static int add_picture(struct set *s, const char *folder, const char *name, bool mirrored, struct err *e) {
    if (s->n == s->room) {
        struct picture *grown = mem_resize(s->pictures, (size_t)s->room * 2 + 1024, sizeof *grown);
        if (!grown) return err_set(e, E_NOMEM, "no memory for a list of %d pictures", s->n);
        s->pictures = grown;
        s->room = s->room * 2 + 1024;
    }
    char *path = mem_printf("%s/%s", folder, name);
    if (!path) return err_set(e, E_NOMEM, "no memory for a list of %d pictures", s->n);
    s->pictures[s->n++] = (struct picture){path, s->n_classes, mirrored};
    return OK;
}

static int list(const char *folder, struct dirent ***names, int *n, struct err *e) {
    *n = scandir(folder, names, visible, by_bytes);
    return *n >= 0 ? OK : err_set(e, errno == ENOENT || errno == ENOTDIR ? E_NOTFOUND : E_IO, "%s: %s", folder, strerror(errno));
}

static void drop_list(struct dirent **names, int n) {
    for (int i = 0; i < n; i++) free(names[i]);
    free(names);
}

static int add_class(struct set *s, const char *folder, const char *name, bool flip, struct err *e) {
    struct dirent **names = NULL;
    int n = 0, before = s->n, rc = list(folder, &names, &n, e);
    for (int i = 0; i < n; i++)
        for (int side = 0; rc == OK && side <= flip && picture_named(names[i]->d_name); side++)
            rc = add_picture(s, folder, names[i]->d_name, side, e);
    if (n >= 0) drop_list(names, n);
    if (rc == OK && s->n == before) rc = err_set(e, E_FORMAT, "%s: the class has no PNG or JPEG", folder); // as for train
    char **grown = rc == OK ? mem_resize(s->classes, (size_t)s->n_classes + 1, sizeof *grown) : NULL;
    if (grown) s->classes = grown;
    char *copy = grown ? mem_strdup(name) : NULL;
    if (rc == OK && !copy) rc = err_set(e, E_NOMEM, "no memory for a list of classes");
    if (copy) s->classes[s->n_classes++] = copy;
    return rc;
}

static int find_pictures(struct set *s, const char *dir, bool flip, struct err *e) {
    struct dirent **names = NULL;
    int n = 0, rc = list(dir, &names, &n, e);
    for (int i = 0; rc == OK && i < n; i++) {
        char *path = mem_printf("%s/%s", dir, names[i]->d_name);
        struct stat st;
        if (!path) rc = err_set(e, E_NOMEM, "no memory for a path");
        else if (stat(path, &st) == 0 && S_ISDIR(st.st_mode)) rc = add_class(s, path, names[i]->d_name, flip, e);
        mem_free(path);
    }
    if (n >= 0) drop_list(names, n);
    if (rc == OK && s->n == 0) rc = err_set(e, E_NOTFOUND, "%s: no CLASS/*.png, *.jpg or *.jpeg is in it", dir);
    return rc;
}

static void set_free(struct set *s) {
    for (int i = 0; i < s->n; i++) mem_free(s->pictures[i].path);
    for (int i = 0; i < s->n_classes; i++) mem_free(s->classes[i]);
    mem_free(s->pictures);
    mem_free(s->classes);
}

/* ---- one picture ---- */

struct work {
    const struct options *o;
    struct set set;
    struct vae_file file;
    struct kern *kern;
    struct vae *vae;
    int width, height; // of the pictures
    float *planes, *moments;
    size_t latent;     // floats of a mean
};

// As it is encoded
static int read_picture(const struct options *o, uint8_t **pixels, int *w, int *h, int *channels, const char *path, struct err *e) {
    if (!o->size) return picture_read(pixels, w, h, channels, path, e);
    *w = *h = o->size;
    return picture_read_square(pixels, o->size, channels, path, e);
}

// Planes in -1..1, as torchvision's ToTensor and Normalize(0.5, 0.5) give; grey becomes as many equal planes as the VAE takes.
static int load_planes(const struct work *w, const struct picture *p, struct err *e) {
    const char *path = p->path;
    int width, height, channels, want = w->file.arch.image_channels;
    uint8_t *pixels;
    int rc = read_picture(w->o, &pixels, &width, &height, &channels, path, e);
    if (rc != OK) return rc;
    if (width != w->width || height != w->height)
        rc = err_set(e, E_CONFLICT, "%s is %d x %d pixels, the first picture %d x %d: all must have one size, or --size cuts them", path, width, height, w->width, w->height);
    else if (channels != 1 && channels != want)
        rc = err_set(e, E_CONFLICT, "%s has %d channels, the VAE takes %d", path, channels, want);
    size_t plane = (size_t)width * (size_t)height;
    for (size_t c = 0; rc == OK && c < (size_t)want; c++)
        for (size_t i = 0; i < plane; i++) {
            size_t column = i % (size_t)width, from = p->mirrored ? i - column + (size_t)width - 1 - column : i;
            uint8_t v = pixels[from * (size_t)channels + (channels == 1 ? 0 : c)];
            w->planes[c * plane + i] = ((float)v / 255.0f - 0.5f) / 0.5f;
        }
    mem_free(pixels);
    return rc;
}

static int open_vae(struct work *w, struct err *e) {
    int channels, factor;
    uint8_t *pixels;
    char why[256];
    int rc = read_picture(w->o, &pixels, &w->width, &w->height, &channels, w->set.pictures[0].path, e);
    if (rc != OK) return rc;
    mem_free(pixels);
    rc = vae_file_open(&w->file, w->o->vae, NULL, e);
    if (rc != OK) return rc;
    factor = vae_factor(&w->file.arch);
    if (w->width % factor || w->height % factor)
        return err_set(e, E_CONFLICT, "%s is %d x %d pixels; the VAE needs multiples of %d", w->set.pictures[0].path, w->width, w->height, factor);
    if (kern_open(&w->kern, &w->o->kern, why, sizeof why)) return err_set(e, E_DEVICE, "%s", why);
    struct vae_size size = {.height = w->height / factor, .width = w->width / factor, .encode = true};
    rc = vae_new(&w->vae, w->kern, &w->file.arch, &w->file.table, &size, e);
    if (rc != OK) return rc;
    w->latent = vae_numel(w->vae, VAE_ENCODE) / 2;
    w->moments = mem_array(2 * w->latent, sizeof *w->moments);
    w->planes = mem_array((size_t)w->width * (size_t)w->height * (size_t)w->file.arch.image_channels, sizeof *w->planes);
    return w->moments && w->planes ? OK : err_set(e, E_NOMEM, "no memory for a picture");
}

/* ---- shards ---- */

static char *class_names(const struct set *s) {
    json_t *all = json_array();
    for (int i = 0; i < s->n_classes; i++) json_array_append_new(all, json_string(s->classes[i]));
    char *text = json_array_size(all) == (size_t)s->n_classes ? json_dumps(all, JSON_COMPACT) : NULL;
    json_decref(all);
    return text;
}

static int to_file(void *file, const void *bytes, size_t n, struct err *e) { return file_out_write(file, bytes, n, e); }

static int write_shard(const struct work *w, const char *path, const float *mean, const float *logvar, const int64_t *label, int n, struct err *e) {
    const struct vae_arch *a = &w->file.arch;
    int64_t h = w->height / vae_factor(a), width = w->width / vae_factor(a);
    size_t count = w->latent * (size_t)n;
    struct tensor t[3] = {
        {.name = "mean", .ndim = 4, .shape = {n, a->latent_channels, h, width}, .data = mean, .count = count, .bytes = count * sizeof *mean},
        {.name = "logvar", .ndim = 4, .shape = {n, a->latent_channels, h, width}, .data = logvar, .count = count, .bytes = count * sizeof *mean},
        {.name = "label", .dtype = DT_I64, .ndim = 1, .shape = {n}, .data = label, .count = (size_t)n, .bytes = (size_t)n * sizeof *label}};
    char scale[32], shift[32], size[48], *classes = class_names(&w->set);
    struct file_out out;
    if (!classes) return err_set(e, E_FORMAT, "no memory for the classes' names, or one is not UTF-8");
    snprintf(scale, sizeof scale, "%.17g", w->file.scale);
    snprintf(shift, sizeof shift, "%.17g", w->file.shift);
    snprintf(size, sizeof size, "%dx%d", w->width, w->height);
    struct meta_pair meta[] = {{(char *)"kind", (char *)"latents"},        {(char *)"vae", (char *)w->o->vae}, {(char *)"scaling_factor", scale},
                               {(char *)"shift_factor", shift}, {(char *)"size", size},             {(char *)"classes", classes}};
    int rc = file_out_open(&out, path, e);
    if (rc == OK) {
        rc = safetensors_write(&(struct tensor_table){t, 3}, meta, (int)(sizeof meta / sizeof *meta), to_file, &out, e);
        if (rc == OK) rc = file_out_commit(&out, NULL, e);
        else file_out_abort(&out);
    }
    free(classes);
    return rc;
}

static char *shard_path(const char *out, int shard, int shards) {
    static const char ending[] = ".safetensors";
    size_t n = strlen(out), tail = sizeof ending - 1;
    if (shards == 1) return mem_strdup(out);
    if (n > tail && strcmp(out + n - tail, ending) == 0) n -= tail;
    return mem_printf("%.*s-%05d-of-%05d%s", (int)n, out, shard + 1, shards, ending);
}

static void tell(const struct work *w, int done, double seconds) {
    if (!isatty(2)) return;
    double left = seconds / done * (w->set.n - done);
    fprintf(stderr, "\r%d of %d pictures, %.2f s each, %.0f s left   ", done, w->set.n, seconds / done, left);
}

static int encode_shard(struct work *w, int first, int n, float *mean, float *logvar, int64_t *label, double start, struct err *e) {
    for (int i = 0; i < n; i++) {
        const struct picture *p = &w->set.pictures[first + i];
        if (load_planes(w, p, e) || vae_run(w->vae, VAE_ENCODE, w->planes, w->moments, e)) return e->status;
        for (size_t j = 0; j < 2 * w->latent; j++) // NaN less itself is not 0, nor is infinity
            if (w->moments[j] - w->moments[j] != 0) return err_set(e, E_NONFINITE, "%s: its latent is not finite", p->path);
        memcpy(mean + (size_t)i * w->latent, w->moments, w->latent * sizeof *mean);
        memcpy(logvar + (size_t)i * w->latent, w->moments + w->latent, w->latent * sizeof *logvar);
        label[i] = p->label;
        tell(w, first + i + 1, clock_seconds() - start);
    }
    return OK;
}

static int encode(struct work *w, struct err *e) {
    int most = w->o->shard < w->set.n ? w->o->shard : w->set.n, shards = (w->set.n + most - 1) / most, rc = OK;
    double start = clock_seconds();
    float *mean = mem_array((size_t)most * w->latent, sizeof *mean), *logvar = mem_array((size_t)most * w->latent, sizeof *logvar);
    int64_t *label = mem_array((size_t)most, sizeof *label);
    if (!mean || !logvar || !label) rc = err_set(e, E_NOMEM, "no memory for a shard of %d pictures: make --shard smaller", most);
    for (int i = 0; rc == OK && i < shards; i++) {
        int first = i * most, n = w->set.n - first < most ? w->set.n - first : most;
        char *path = shard_path(w->o->out, i, shards);
        rc = path ? encode_shard(w, first, n, mean, logvar, label, start, e) : err_set(e, E_NOMEM, "no memory for a path");
        if (rc == OK) rc = write_shard(w, path, mean, logvar, label, n, e);
        if (rc == OK) fprintf(stderr, "%s%s: %d pictures\n", isatty(2) ? "\n" : "", path, n);
        mem_free(path);
    }
    mem_free(mean), mem_free(logvar), mem_free(label);
    return rc;
}

/* ---- options ---- */

static bool number(int *out, const char *text) {
    char *end;
    long v = strtol(text, &end, 10);
    *out = (int)v;
    return *text && !*end && v >= 1 && v <= 10000000;
}

// 0, or the exit status + 1
static int parse(struct options *o, int argc, char **argv) {
    static const struct option longs[] = {{"vae", 1, 0, 'v'},     {"images", 1, 0, 'i'},  {"out", 1, 0, 'o'},  {"shard", 1, 0, 's'}, {"size", 1, 0, 'z'}, {"flip", 0, 0, 'f'},
                                          {"threads", 1, 0, 't'}, {"backend", 1, 0, 'b'}, {"help", 0, 0, 'h'}, {0}};
    for (int c; (c = getopt_long(argc, argv, "", longs, NULL)) != -1;) switch (c) {
        case 'v': o->vae = optarg; break;
        case 'i': o->images = optarg; break;
        case 'o': o->out = optarg; break;
        case 's':
            if (!number(&o->shard, optarg)) return 1 + usage("--shard wants a number, not ", optarg);
            break;
        case 't':
            if (!number(&o->kern.threads, optarg) || o->kern.threads > 4096) return 1 + usage("--threads wants 1..4096, not ", optarg);
            break;
        case 'z':
            if (!number(&o->size, optarg) || o->size > 8192) return 1 + usage("--size wants 1..8192, not ", optarg);
            break;
        case 'f': o->flip = true; break;
        case 'b': o->kern.backend = optarg; break;
        case 'h': return fputs(help, stdout), 1;
        default: return 1 + usage("see the options", "");
        }
    if (optind < argc) return 1 + usage("not an option: ", argv[optind]);
    if (!o->vae || !o->images || !o->out) return 1 + usage(!o->vae ? "--vae" : !o->images ? "--images" : "--out", " is missing");
    return 0;
}

static int make_folder(const char *out, struct err *e) { // now: it would be missed after hours
    const char *slash = strrchr(out, '/');
    char *folder = mem_printf("%.*s", slash ? (int)(slash - out) : 0, out);
    if (!folder) return err_set(e, E_NOMEM, "no memory for a path");
    int rc = *folder ? file_make_dir(folder, e) : OK;
    mem_free(folder);
    return rc;
}

int cmd_encode(int argc, char **argv) {
    struct options o = {.shard = 10000, .kern = {.backend = "cpu"}};
    struct work w = {.o = &o};
    struct err e = {0};
    int rc = parse(&o, argc, argv);
    if (rc) return rc - 1;
    rc = find_pictures(&w.set, o.images, o.flip, &e);
    if (rc == OK) rc = open_vae(&w, &e);
    if (rc == OK) rc = make_folder(o.out, &e);
    if (rc == OK) rc = encode(&w, &e);
    mem_free(w.planes), mem_free(w.moments);
    vae_free(w.vae);
    kern_close(w.kern);
    vae_file_close(&w.file);
    set_free(&w.set);
    return rc == OK ? 0 : fail(&e);
}
