// SPDX-License-Identifier: MIT
/*
 * The network is compiled, when it is made, into a list of steps over three pictures in memory (x, the stream; h, inside a block;
 * s, what becomes the next x): convolutions with norm and SiLU on their input and the residual added to their output, the
 * statistics of norms, attention. A residual block is then coef <- norm1(x);  h <- conv1(silu(coef x));  coef <- norm2(h);  x +=
 * conv2(silu(coef h)) and where the width changes the last is s <- shortcut(x); s += conv2(silu(coef h)); s and x change places.
 * Running is walking that list; a step of many strips may be left half done.
 */
#include "core/model/vae.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/base/mem.h"

#define EPS 1e-6f
#define BUFFERS 3
#define MOST_PICTURES 64

enum step_kind { STEP_NORM, STEP_CONV, STEP_WIDE };
struct step {
    enum step_kind kind;
    int from, to; // buffers
    struct kern_conv *conv;
    struct kern_wide *wide;
    float *gamma, *beta; // one allocation, gamma first
    size_t pixels;       // of the norm
    int channels, strips;
    bool normed;
    double flops;
};

struct program {
    struct step *steps;
    int n, room;
    int in, out; // buffers
    size_t in_pixels, out_pixels;
    int in_channels, out_channels;
    double flops;
};

struct vae {
    struct kern *k;
    struct vae_arch a;
    struct program way[2];
    void *buffer[BUFFERS]; // elements of k->picture; of float32 before the first and behind the last convolutions
    float *coef;
    double *sums;
    size_t need[BUFFERS]; // bytes of a picture
    int widest;           // channels of the widest norm
    int pictures;         // at most
    float *host;          // pictures or latents on their way in or out
    size_t bytes;
    /* the pictures in hand */
    struct program *run; // NULL: none
    int count, step, strip;
};

static int kern_failed(const struct kern *k, int rc, struct err *e) {
    return err_set(e,
                   rc == KERN_ENOMEM         ? E_NOMEM
                   : rc == KERN_EUNSUPPORTED ? E_UNSUPPORTED
                                             : E_DEVICE,
                   "%s: %s", k->name, k->why);
}

/* ---- building ---- */

struct build {
    struct vae *v;
    struct program *p;
    const struct tensor_table *table;
    struct err *e;
    int x, h, s;                 // buffers
    int height, width, channels; // of x
    int rc;                      // the first failure; later calls do nothing
};

static void fail(struct build *b, int rc) {
    if (b->rc == OK) b->rc = rc;
}

static void *reserve(struct build *b, size_t bytes) {
    void *p = NULL;
    if (b->rc != OK) return NULL;
    int rc = b->v->k->alloc(b->v->k, bytes, &p);
    if (rc) fail(b, kern_failed(b->v->k, rc, b->e));
    else b->v->bytes += bytes;
    return p;
}

// A tensor's values behind *at, which moves on; finite
static void floats(struct build *b, const char *name, const char *part, float **at, size_t count) {
    char full[112];
    snprintf(full, sizeof full, "%s.%s", name, part);
    const struct tensor *t = tensor_find(b->table, full);
    if (b->rc != OK) return;
    if (!t) return fail(b, err_param(b->e, E_CONFLICT, full, "tensor '%s' is missing", full));
    if (t->count != count)
        return fail(b, err_param(b->e, E_CONFLICT, full, "tensor '%s' has %zu elements, not %zu", full, t->count, count));
    if (tensor_to_f32(*at, t, b->e)) return fail(b, E_UNSUPPORTED);
    for (size_t i = 0; i < count; i++)
        if (!isfinite((*at)[i]))
            return fail(b, err_param(b->e, E_NONFINITE, full, "tensor '%s' holds NaN or infinity at element %zu", full, i));
    *at += count;
}

static struct step *append(struct build *b, struct step step) {
    struct program *p = b->p;
    if (b->rc == OK && p->n == p->room) {
        struct step *grown = mem_resize(p->steps, (size_t)p->room * 2 + 32, sizeof *grown);
        if (!grown) fail(b, err_set(b->e, E_NOMEM, "no memory for a VAE"));
        else p->steps = grown, p->room = p->room * 2 + 32;
    }
    if (b->rc != OK) return NULL;
    p->steps[p->n] = step;
    return &p->steps[p->n++];
}

static void need(struct build *b, int buffer, size_t pixels, int channels, bool f32) {
    size_t bytes = pixels * (size_t)channels * kern_dtype_size(f32 ? KERN_F32 : b->v->k->picture);
    if (bytes > b->v->need[buffer]) b->v->need[buffer] = bytes;
}

static void norm(struct build *b, int from, const char *name, int channels) {
    size_t c = (size_t)channels;
    float *host = mem_array(2 * c, sizeof *host), *at = host;
    struct step *s = append(
        b,
        (struct step){
            .kind = STEP_NORM, .from = from, .pixels = (size_t)b->height * (size_t)b->width, .channels = channels, .strips = 1});
    if (!host) fail(b, err_set(b->e, E_NOMEM, "no memory for tensor '%s'", name));
    floats(b, name, "weight", &at, c);
    floats(b, name, "bias", &at, c);
    float *gamma = reserve(b, 2 * c * sizeof *gamma);
    if (s) s->gamma = gamma, s->beta = gamma ? gamma + c : NULL;
    if (b->rc == OK && b->v->k->upload(b->v->k, gamma, host, 2 * c * sizeof *host))
        fail(b, kern_failed(b->v->k, KERN_EDEVICE, b->e));
    if (channels > b->v->widest) b->v->widest = channels;
    mem_free(host);
}

struct layer { // of the picture as it is now
    enum kern_conv_kind kind;
    int from, to, in, out, side;
    bool norm, silu, add, x_f32, y_f32;
};

// A convolution whose outputs come from n layers of equal shape, stacked
static void convs(struct build *b, struct layer l, const char (*names)[96], int n) {
    struct kern *k = b->v->k;
    struct kern_conv_spec spec = {.kind = l.kind,
                                  .out = n * l.out,
                                  .in = l.in,
                                  .side = l.side,
                                  .height = b->height,
                                  .width = b->width,
                                  .norm = l.norm,
                                  .act = l.silu ? KERN_SILU : KERN_NONE,
                                  .add = l.add,
                                  .x_f32 = l.x_f32,
                                  .y_f32 = l.y_f32};
    size_t count = (size_t)l.out * (size_t)l.in * (size_t)(l.side * l.side), out = (size_t)(n * l.out);
    float *w = mem_array(count * (size_t)n, sizeof *w), *bias = mem_array(out, sizeof *bias), *w_at = w, *b_at = bias;
    struct step *s = append(b, (struct step){.kind = STEP_CONV, .from = l.from, .to = l.to, .normed = l.norm});
    if (!w || !bias) fail(b, err_set(b->e, E_NOMEM, "no memory for tensor '%s.weight'", names[0]));
    for (int i = 0; i < n; i++) {
        floats(b, names[i], "weight", &w_at, count);
        floats(b, names[i], "bias", &b_at, (size_t)l.out);
    }
    int rc = b->rc == OK ? k->conv_new(k, &spec, w, bias, &s->conv) : 0;
    if (rc) fail(b, kern_failed(k, rc, b->e));
    mem_free(w);
    mem_free(bias);
    if (b->rc != OK) return;
    int up = l.kind == KERN_CONV_UP ? 4 : 1, down = l.kind == KERN_CONV_DOWN ? 4 : 1;
    size_t pixels = (size_t)b->height * (size_t)b->width * (size_t)up / (size_t)down;
    s->strips = k->conv_strips(k, s->conv);
    s->flops = 2.0 * (double)(count * (size_t)n) * (double)pixels;
    b->p->flops += s->flops;
    b->v->bytes += count * (size_t)n * sizeof(float) * (l.kind == KERN_CONV_UP ? 16 : 9) / 9;
    need(b, l.to, pixels, n * l.out, l.y_f32);
}

static void conv(struct build *b, struct layer l, const char *prefix, const char *name) {
    char names[1][96];
    snprintf(names[0], sizeof names[0], "%s%s", prefix, name);
    convs(b, l, (const char(*)[96])names, 1);
}

static void swap(struct build *b) { // s becomes the stream
    int x = b->x;
    b->x = b->s, b->s = x;
}

static void resnet(struct build *b, const char *prefix, int out) {
    char name[96];
    int in = b->channels, to = in == out ? b->x : b->s;
    snprintf(name, sizeof name, "%snorm1", prefix);
    norm(b, b->x, name, in);
    conv(b, (struct layer){.from = b->x, .to = b->h, .in = in, .out = out, .side = 3, .norm = true, .silu = true}, prefix,
         "conv1");
    snprintf(name, sizeof name, "%snorm2", prefix);
    norm(b, b->h, name, out);
    if (to == b->s) conv(b, (struct layer){.from = b->x, .to = to, .in = in, .out = out, .side = 1}, prefix, "conv_shortcut");
    conv(b, (struct layer){.from = b->h, .to = to, .in = out, .out = out, .side = 3, .norm = true, .silu = true, .add = true},
         prefix, "conv2");
    if (to == b->s) swap(b);
    b->channels = out;
}

static void attention(struct build *b, const char *half) {
    static const char *const parts[] = {"group_norm", "to_q", "to_k", "to_v", "to_out.0"};
    struct kern *k = b->v->k;
    int C = b->channels, T = b->height * b->width;
    char names[5][96];
    for (int i = 0; i < 5; i++) snprintf(names[i], sizeof names[i], "%s.mid_block.attentions.0.%s", half, parts[i]);
    norm(b, b->x, names[0], C);
    convs(b, (struct layer){.from = b->x, .to = b->h, .in = C, .out = C, .side = 1, .norm = true}, (const char(*)[96])names + 1,
          3);
    struct step *s = append(b, (struct step){.kind = STEP_WIDE, .from = b->h, .to = b->s, .flops = 4.0 * T * T * C});
    int rc = b->rc == OK ? k->wide_new(k, T, C, b->v->pictures, &s->wide) : 0;
    if (rc) fail(b, kern_failed(k, rc, b->e));
    if (b->rc == OK) s->strips = k->wide_strips(k, s->wide), b->p->flops += s->flops;
    need(b, b->s, (size_t)T, C, false);
    convs(b, (struct layer){.from = b->s, .to = b->x, .in = C, .out = C, .side = 1, .add = true}, (const char(*)[96])names + 4,
          1);
}

static void middle(struct build *b, const char *half, bool attends) {
    char prefix[96];
    for (int i = 0; i < 2; i++) {
        snprintf(prefix, sizeof prefix, "%s.mid_block.resnets.%d.", half, i);
        resnet(b, prefix, b->channels);
        if (i == 0 && attends) attention(b, half);
    }
}

enum edge { INSIDE = 0, X_F32 = 1, Y_F32 = 2 }; // what comes in and what goes out is float32, and so is what lies between two edges

// A convolution from x to s, which becomes x
static void through(struct build *b, enum kern_conv_kind kind, const char *name, int out, int side, bool normed, enum edge edge) {
    conv(b,
         (struct layer){.kind = kind,
                        .from = b->x,
                        .to = b->s,
                        .in = b->channels,
                        .out = out,
                        .side = side,
                        .norm = normed,
                        .silu = normed,
                        .x_f32 = edge & X_F32,
                        .y_f32 = edge & Y_F32},
         "", name);
    swap(b);
    b->channels = out;
    if (kind == KERN_CONV_UP) b->height *= 2, b->width *= 2;
    if (kind == KERN_CONV_DOWN) b->height /= 2, b->width /= 2;
}

static void begin(struct build *b, int height, int width, int channels) {
    b->height = height, b->width = width, b->channels = channels;
    b->p->in = b->x;
    b->p->in_pixels = (size_t)height * (size_t)width;
    b->p->in_channels = channels;
    need(b, b->x, b->p->in_pixels, channels, true);
}

static void end(struct build *b) {
    b->p->out = b->x;
    b->p->out_pixels = (size_t)b->height * (size_t)b->width;
    b->p->out_channels = b->channels;
}

static void decoder(struct build *b, const struct vae_size *size) {
    const struct vae_arch *a = &b->v->a;
    char name[96];
    begin(b, size->height, size->width, a->latent_channels);
    if (a->post_quant) through(b, KERN_CONV, "post_quant_conv", a->latent_channels, 1, false, X_F32 | Y_F32);
    through(b, KERN_CONV, "decoder.conv_in", a->width[a->levels - 1], 3, false, X_F32);
    middle(b, "decoder", a->attention[1]);
    for (int u = 0; u < a->levels; u++) {
        for (int i = 0; i <= a->layers; i++) {
            snprintf(name, sizeof name, "decoder.up_blocks.%d.resnets.%d.", u, i);
            resnet(b, name, a->width[a->levels - 1 - u]);
        }
        snprintf(name, sizeof name, "decoder.up_blocks.%d.upsamplers.0.conv", u);
        if (u < a->levels - 1) through(b, KERN_CONV_UP, name, b->channels, 3, false, INSIDE);
    }
    norm(b, b->x, "decoder.conv_norm_out", b->channels);
    through(b, KERN_CONV, "decoder.conv_out", a->image_channels, 3, true, Y_F32);
    end(b);
}

static void encoder(struct build *b, const struct vae_size *size) {
    const struct vae_arch *a = &b->v->a;
    char name[96];
    begin(b, size->height * vae_factor(a), size->width * vae_factor(a), a->image_channels);
    through(b, KERN_CONV, "encoder.conv_in", a->width[0], 3, false, X_F32);
    for (int l = 0; l < a->levels; l++) {
        for (int i = 0; i < a->layers; i++) {
            snprintf(name, sizeof name, "encoder.down_blocks.%d.resnets.%d.", l, i);
            resnet(b, name, a->width[l]);
        }
        snprintf(name, sizeof name, "encoder.down_blocks.%d.downsamplers.0.conv", l);
        if (l < a->levels - 1) through(b, KERN_CONV_DOWN, name, b->channels, 3, false, INSIDE);
    }
    middle(b, "encoder", a->attention[0]);
    norm(b, b->x, "encoder.conv_norm_out", b->channels);
    through(b, KERN_CONV, "encoder.conv_out", 2 * a->latent_channels, 3, true, Y_F32);
    if (a->quant) through(b, KERN_CONV, "quant_conv", 2 * a->latent_channels, 1, false, X_F32 | Y_F32);
    end(b);
}

static int check(const struct vae_arch *a, const struct vae_size *s, struct err *e) {
    int most = 16384 / vae_factor(a);
    if (s->decode && !a->decoder) return err_param(e, E_CONFLICT, "decoder", "the VAE's file holds no decoder");
    if (s->encode && !a->encoder) return err_param(e, E_CONFLICT, "encoder", "the VAE's file holds no encoder");
    if (s->height < 1 || s->width < 1 || s->height > most || s->width > most || (int64_t)s->height * s->width > 1 << 20)
        return err_param(e, E_RANGE, "size", "latents of %d x %d; each side may be 1 to %d, and 2^20 together", s->height,
                         s->width, most);
    for (int l = 0; l < a->levels; l++)
        if (a->groups < 1 || a->width[l] % a->groups)
            return err_param(e, E_CONFLICT, "norm_num_groups", "%d channels do not fall into %d groups", a->width[l], a->groups);
    return OK;
}

static int build(struct vae *v, const struct tensor_table *table, const struct vae_size *size, struct err *e) {
    struct build b = {.v = v, .table = table, .e = e, .x = 0, .h = 1, .s = 2};
    size_t largest = 0, most = (size_t)v->pictures;
    b.p = &v->way[VAE_DECODE];
    if (size->decode) decoder(&b, size);
    b.p = &v->way[VAE_ENCODE];
    if (size->encode) encoder(&b, size);
    for (int i = 0; i < BUFFERS; i++) v->buffer[i] = reserve(&b, v->need[i] * most);
    v->coef = reserve(&b, most * 2 * (size_t)v->widest * sizeof *v->coef);
    v->sums = reserve(&b, most * KERN_NORM_PARTS * (size_t)v->widest * 2 * sizeof *v->sums);
    for (int i = 0; i < 2; i++) {
        size_t in = v->way[i].in_pixels * (size_t)v->way[i].in_channels,
               out = v->way[i].out_pixels * (size_t)v->way[i].out_channels;
        if (in > largest) largest = in;
        if (out > largest) largest = out;
    }
    v->host = mem_array(largest * most, sizeof *v->host);
    return b.rc != OK ? b.rc : v->host ? OK : err_set(e, E_NOMEM, "no memory for a picture");
}

static int pictures_wanted(const struct kern *k, const struct vae_arch *a, const struct vae_size *size) {
    size_t side = (size_t)vae_factor(a), pixels = (size_t)size->height * (size_t)size->width * side * side,
           n = k->pixels / pixels;
    return n < 1 ? 1 : n > MOST_PICTURES ? MOST_PICTURES : (int)n;
}

int vae_new(struct vae **out, struct kern *k, const struct vae_arch *a, const struct tensor_table *table,
            const struct vae_size *size, struct err *e) {
    *out = NULL;
    int rc = check(a, size, e);
    if (rc != OK) return rc;
    struct vae *v = mem_alloc(sizeof *v);
    if (!v) return err_set(e, E_NOMEM, "no memory for a VAE");
    v->k = k;
    v->a = *a;
    v->pictures = pictures_wanted(k, a, size);
    rc = build(v, table, size, e);
    if (rc != OK) return vae_free(v), rc;
    *out = v;
    return OK;
}

void vae_free(struct vae *v) {
    if (!v) return;
    struct kern *k = v->k;
    for (int way = 0; way < 2; way++) {
        for (int i = 0; i < v->way[way].n; i++) {
            struct step *s = &v->way[way].steps[i];
            if (s->conv) k->conv_free(k, s->conv);
            if (s->wide) k->wide_free(k, s->wide);
            if (s->gamma) k->free(k, s->gamma);
        }
        mem_free(v->way[way].steps);
    }
    for (int i = 0; i < BUFFERS; i++)
        if (v->buffer[i]) k->free(k, v->buffer[i]);
    if (v->coef) k->free(k, v->coef);
    if (v->sums) k->free(k, v->sums);
    mem_free(v->host);
    mem_free(v);
}

/* ---- running ---- */

int vae_pictures(const struct vae *v) { return v->pictures; }

int vae_start(struct vae *v, enum vae_way way, const float *in, int n, struct err *e) {
    struct program *p = &v->way[way];
    size_t C = (size_t)p->in_channels, one = p->in_pixels * C, all = (size_t)n * one;
    if (!p->n) return err_set(e, E_INTERNAL, "this VAE was not made to %s", way == VAE_DECODE ? "decode" : "encode");
    if (n < 1 || n > v->pictures) return err_set(e, E_INTERNAL, "%d pictures at once, not 1 to %d", n, v->pictures);
    for (size_t at = 0; at < all; at += one)
        for (size_t c = 0; c < C; c++)
            for (size_t i = 0; i < p->in_pixels; i++) v->host[at + i * C + c] = in[at + c * p->in_pixels + i];
    int rc = v->k->upload(v->k, v->buffer[p->in], v->host, all * sizeof *v->host);
    v->run = rc ? NULL : p;
    v->count = n;
    v->step = v->strip = 0;
    return rc ? kern_failed(v->k, rc, e) : OK;
}

// Strips of the step in hand, at most `flops` of work but enough for every thread to have one
static int take(const struct vae *v, const struct step *s, double flops) {
    int left = s->strips - v->strip;
    double n = s->flops > 0 ? flops / (s->flops * v->count / s->strips) : left;
    if (n < v->k->threads) n = v->k->threads;
    return n < left ? (int)n : left;
}

static int run_strips(struct vae *v, const struct step *s, int n) {
    struct kern *k = v->k;
    const void *from = v->buffer[s->from];
    void *to = v->buffer[s->to];
    if (s->kind == STEP_NORM)
        return k->group_norm(k, v->coef, v->sums, from, s->gamma, s->beta, v->count, s->pixels, s->channels, v->a.groups,
                             EPS);
    if (s->kind == STEP_WIDE) return k->wide(k, s->wide, to, from, v->count, v->strip, n);
    return k->conv(k, s->conv, to, from, s->normed ? v->coef : NULL, v->count, v->strip, n);
}

int vae_step(struct vae *v, double flops, struct err *e) {
    if (!v->run) return err_set(e, E_INTERNAL, "no picture is in hand");
    while (v->step < v->run->n && flops >= 0) {
        const struct step *s = &v->run->steps[v->step];
        int n = take(v, s, flops), rc = run_strips(v, s, n);
        if (rc) {
            v->run = NULL;
            return kern_failed(v->k, rc, e);
        }
        flops -= s->flops * v->count * n / s->strips;
        v->strip += n;
        if (v->strip == s->strips) v->step++, v->strip = 0;
        if (flops == 0) break;
    }
    return v->step < v->run->n;
}

int vae_read(struct vae *v, float *out, struct err *e) {
    const struct program *p = v->run;
    if (!p || v->step < p->n) return err_set(e, E_INTERNAL, "no picture is ready");
    size_t C = (size_t)p->out_channels, one = p->out_pixels * C, all = (size_t)v->count * one,
           log_variance = p == &v->way[VAE_ENCODE] ? C / 2 : C;
    int rc = v->k->download(v->k, v->host, v->buffer[p->out], all * sizeof *out);
    if (rc) return kern_failed(v->k, rc, e);
    for (size_t at = 0; at < all; at += one)
        for (size_t c = 0; c < C; c++)
            for (size_t i = 0; i < p->out_pixels; i++) {
                float x = v->host[at + i * C + c];
                if (c >= log_variance) x = x < -30 ? -30 : x > 20 ? 20 : x;
                out[at + c * p->out_pixels + i] = x;
            }
    v->run = NULL;
    return OK;
}

int vae_run(struct vae *v, enum vae_way way, const float *in, float *out, struct err *e) {
    int rc = vae_start(v, way, in, 1, e);
    if (rc == OK) rc = vae_step(v, INFINITY, e);
    return rc < 0 ? rc : vae_read(v, out, e);
}

size_t vae_numel(const struct vae *v, enum vae_way way) { return v->way[way].out_pixels * (size_t)v->way[way].out_channels; }
double vae_flops(const struct vae *v, enum vae_way way) { return v->way[way].flops; }
size_t vae_bytes(const struct vae *v) { return v->bytes; }
