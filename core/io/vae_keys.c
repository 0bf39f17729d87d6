// SPDX-License-Identifier: MIT
/*
 * vae_keys: what the tensors of an AutoencoderKL are called and how large they are.
 *
 * One walk over the network gives every layer with its three spellings; matching, counting and making random weights all read it.
 * The spellings differ in more than names: CompVis counts the decoder's levels from full resolution (diffusers' up_blocks.i is
 * its up.(levels-1-i)), keeps its attention weights as 1x1 convolutions, and calls a residual block's shortcut nin_shortcut. Only
 * blocks that change their width have a shortcut; only the middle has attention (checkpoints with attention elsewhere are refused
 * by the tensor that has no place).
 */
#include <stdio.h>
#include <string.h>

#include "core/base/mem.h"
#include "core/io/vae_file.h"

struct walk {
    const struct vae_arch *a;
    vae_unit_fn *fn;
    void *ctx;
    int rc; // the first result that was not 0
};

static void unit(struct walk *w, const char *name, const char *old, const char *compvis, int out, int in, int side) {
    struct vae_unit u = {.out = out, .in = in, .side = side};
    if (w->rc) return;
    snprintf(u.name, sizeof u.name, "%s", name);
    snprintf(u.old, sizeof u.old, "%s", old);
    snprintf(u.compvis, sizeof u.compvis, "%s", compvis);
    w->rc = w->fn(w->ctx, &u);
}

// A layer below two prefixes, the one of diffusers and the one of CompVis
static void below(struct walk *w, const char *d, const char *c, const char *name, const char *old, const char *compvis, int out,
                  int in, int side) {
    char a[96], b[96] = "", e[96];
    snprintf(a, sizeof a, "%s.%s", d, name);
    if (*old) snprintf(b, sizeof b, "%s.%s", d, old);
    snprintf(e, sizeof e, "%s.%s", c, compvis);
    unit(w, a, b, e, out, in, side);
}

static void resnet(struct walk *w, const char *d, const char *c, int in, int out) {
    below(w, d, c, "norm1", "", "norm1", in, 0, 0);
    below(w, d, c, "conv1", "", "conv1", out, in, 3);
    below(w, d, c, "norm2", "", "norm2", out, 0, 0);
    below(w, d, c, "conv2", "", "conv2", out, out, 3);
    if (in != out) below(w, d, c, "conv_shortcut", "", "nin_shortcut", out, in, 1);
}

static void middle(struct walk *w, const char *half, int width, bool attention) {
    char d[96], c[96];
    for (int i = 0; i < 2; i++) {
        snprintf(d, sizeof d, "%s.mid_block.resnets.%d", half, i);
        snprintf(c, sizeof c, "%s.mid.block_%d", half, i + 1);
        resnet(w, d, c, width, width);
    }
    if (!attention) return;
    snprintf(d, sizeof d, "%s.mid_block.attentions.0", half);
    snprintf(c, sizeof c, "%s.mid.attn_1", half);
    below(w, d, c, "group_norm", "", "norm", width, 0, 0);
    below(w, d, c, "to_q", "query", "q", width, width, -1);
    below(w, d, c, "to_k", "key", "k", width, width, -1);
    below(w, d, c, "to_v", "value", "v", width, width, -1);
    below(w, d, c, "to_out.0", "proj_attn", "proj_out", width, width, -1);
}

static void encoder(struct walk *w) {
    const struct vae_arch *a = w->a;
    char d[96], c[96];
    int in = a->width[0], top = a->width[a->levels - 1];
    unit(w, "encoder.conv_in", "", "encoder.conv_in", in, a->image_channels, 3);
    for (int l = 0; l < a->levels; l++) {
        for (int i = 0; i < a->layers; i++, in = a->width[l]) {
            snprintf(d, sizeof d, "encoder.down_blocks.%d.resnets.%d", l, i);
            snprintf(c, sizeof c, "encoder.down.%d.block.%d", l, i);
            resnet(w, d, c, in, a->width[l]);
        }
        if (l == a->levels - 1) break;
        snprintf(d, sizeof d, "encoder.down_blocks.%d.downsamplers.0.conv", l);
        snprintf(c, sizeof c, "encoder.down.%d.downsample.conv", l);
        unit(w, d, "", c, in, in, 3);
    }
    middle(w, "encoder", top, a->attention[0]);
    unit(w, "encoder.conv_norm_out", "", "encoder.norm_out", top, 0, 0);
    unit(w, "encoder.conv_out", "", "encoder.conv_out", 2 * a->latent_channels, top, 3);
    if (a->quant) unit(w, "quant_conv", "", "quant_conv", 2 * a->latent_channels, 2 * a->latent_channels, 1);
}

static void decoder(struct walk *w) {
    const struct vae_arch *a = w->a;
    char d[96], c[96];
    int in = a->width[a->levels - 1];
    if (a->post_quant) unit(w, "post_quant_conv", "", "post_quant_conv", a->latent_channels, a->latent_channels, 1);
    unit(w, "decoder.conv_in", "", "decoder.conv_in", in, a->latent_channels, 3);
    middle(w, "decoder", in, a->attention[1]);
    for (int l = a->levels - 1; l >= 0; l--) {
        int up = a->levels - 1 - l;
        for (int i = 0; i <= a->layers; i++, in = a->width[l]) {
            snprintf(d, sizeof d, "decoder.up_blocks.%d.resnets.%d", up, i);
            snprintf(c, sizeof c, "decoder.up.%d.block.%d", l, i);
            resnet(w, d, c, in, a->width[l]);
        }
        if (l == 0) break;
        snprintf(d, sizeof d, "decoder.up_blocks.%d.upsamplers.0.conv", up);
        snprintf(c, sizeof c, "decoder.up.%d.upsample.conv", l);
        unit(w, d, "", c, in, in, 3);
    }
    unit(w, "decoder.conv_norm_out", "", "decoder.norm_out", in, 0, 0);
    unit(w, "decoder.conv_out", "", "decoder.conv_out", a->image_channels, in, 3);
}

int vae_walk(const struct vae_arch *a, vae_unit_fn *fn, void *ctx) {
    struct walk w = {.a = a, .fn = fn, .ctx = ctx};
    if (a->encoder) encoder(&w);
    if (a->decoder) decoder(&w);
    return w.rc;
}

/* ---- inference ---- */

struct look {
    const struct tensor_table *table;
    const char *prefix;
    struct err *e;
};

static const struct tensor *find(const struct look *k, const char *name) {
    char full[128];
    snprintf(full, sizeof full, "%s%s", k->prefix, name);
    return tensor_find(k->table, full);
}

// The first weight of block `i` of level `l` (from full resolution) in either spelling; NULL when there is none
static const struct tensor *block(const struct look *k, const char *half, int levels, int l, int i) {
    bool down = half[0] == 'e';
    char name[96];
    snprintf(name, sizeof name, "%s.%s_blocks.%d.resnets.%d.conv1.weight", half, down ? "down" : "up", down ? l : levels - 1 - l,
             i);
    const struct tensor *t = find(k, name);
    if (t) return t;
    snprintf(name, sizeof name, "%s.%s.%d.block.%d.conv1.weight", half, down ? "down" : "up", l, i);
    return find(k, name);
}

static int convolution(const struct look *k, const char *name, const struct tensor **out) {
    *out = find(k, name);
    if (!*out) return err_param(k->e, E_CONFLICT, name, "tensor '%s%s' is missing", k->prefix, name);
    const int64_t *s = (*out)->shape;
    if ((*out)->ndim == 4 && s[0] >= 1 && s[0] <= 65536 && s[1] >= 1 && s[1] <= 65536) return OK;
    return err_param(k->e, E_CONFLICT, (*out)->name, "tensor '%s' is not a convolution's", (*out)->name);
}

// Is there an n-th level, whichever end it is counted from?
static bool has_level(const struct look *k, const char *half, int n) {
    char diffusers[96], compvis[96];
    const char *way = half[0] == 'e' ? "down" : "up";
    snprintf(diffusers, sizeof diffusers, "%s.%s_blocks.%d.resnets.0.conv1.weight", half, way, n);
    snprintf(compvis, sizeof compvis, "%s.%s.%d.block.0.conv1.weight", half, way, n);
    return find(k, diffusers) || find(k, compvis);
}

static int infer_levels(struct vae_arch *a, const struct look *k, const char *half) {
    while (a->levels <= VAE_MAX_LEVELS && has_level(k, half, a->levels)) a->levels++;
    if (a->levels < 1 || a->levels > VAE_MAX_LEVELS)
        return err_param(k->e, E_CONFLICT, half, "the %s has no first block, or more than %d levels", half, VAE_MAX_LEVELS);
    for (int l = 0; l < a->levels; l++) {
        const struct tensor *t = block(k, half, a->levels, l, 0);
        if (!t) return err_param(k->e, E_CONFLICT, half, "level %d of the %s has no first block", l, half);
        if (t->ndim != 4 || t->shape[0] < 1 || t->shape[0] > 65536)
            return err_param(k->e, E_CONFLICT, t->name, "tensor '%s' is not a convolution's", t->name);
        a->width[l] = (int)t->shape[0];
    }
    int blocks = 0;
    while (blocks <= 64 && block(k, half, a->levels, a->levels - 1, blocks)) blocks++;
    a->layers = half[0] == 'd' ? blocks - 1 : blocks;
    if (a->layers >= 1 && a->layers <= 64) return OK;
    return err_param(k->e, E_CONFLICT, half, "the %s has %d blocks a level", half, blocks);
}

static int infer_half(struct vae_arch *a, const struct look *k, const char *half) {
    const struct tensor *in, *out;
    char name[96];
    snprintf(name, sizeof name, "%s.conv_in.weight", half);
    int rc = convolution(k, name, &in);
    snprintf(name, sizeof name, "%s.conv_out.weight", half);
    if (rc == OK) rc = convolution(k, name, &out);
    if (rc == OK) rc = infer_levels(a, k, half);
    if (rc != OK) return rc;
    bool decodes = half[0] == 'd';
    a->latent_channels = (int)(decodes ? in->shape[1] : out->shape[0] / 2);
    a->image_channels = (int)(decodes ? out->shape[0] : in->shape[1]);
    if (a->latent_channels < 1 || a->latent_channels > 1024 || a->image_channels > 64)
        return err_param(k->e, E_CONFLICT, in->name, "the %s is between %d image and %d latent channels", half, a->image_channels,
                         a->latent_channels);
    return OK;
}

int vae_infer(struct vae_arch *a, const char **prefix, const struct tensor_table *table, struct err *e) {
    static const char *const prefixes[] = {"", "first_stage_model.", "vae."};
    struct look k = {.table = table, .e = e};
    int groups = a->groups;
    *a = (struct vae_arch){.groups = groups};
    for (size_t i = 0; i < sizeof prefixes / sizeof *prefixes && !a->encoder && !a->decoder; i++) {
        *prefix = k.prefix = prefixes[i];
        a->encoder = find(&k, "encoder.conv_in.weight");
        a->decoder = find(&k, "decoder.conv_in.weight");
    }
    if (!a->encoder && !a->decoder)
        return err_param(e, E_CONFLICT, "decoder.conv_in.weight",
                         "there is no AutoencoderKL in it: no tensor 'decoder.conv_in.weight', nor under "
                         "'first_stage_model.' or 'vae.'");
    a->quant = a->encoder && find(&k, "quant_conv.weight");
    a->post_quant = a->decoder && find(&k, "post_quant_conv.weight");
    a->attention[0] = find(&k, "encoder.mid_block.attentions.0.group_norm.weight") || find(&k, "encoder.mid.attn_1.norm.weight");
    a->attention[1] = find(&k, "decoder.mid_block.attentions.0.group_norm.weight") || find(&k, "decoder.mid.attn_1.norm.weight");
    return infer_half(a, &k, a->decoder ? "decoder" : "encoder");
}

/* ---- matching ---- */

struct match {
    struct vae_file *f; // NULL: counting
    const struct tensor_table *from;
    const char *prefix;
    bool *used;
    size_t at; // in names
    struct err *e;
};

static int check_shape(struct match *m, const struct tensor *t, const struct vae_unit *u, bool weight) {
    int64_t want[4] = {u->out, u->in, u->side < 0 ? 1 : u->side, u->side < 0 ? 1 : u->side};
    int n = !weight || u->side == 0 ? 1 : 4;
    bool fits = tensor_shape_is(t, n, want) || (weight && u->side < 0 && tensor_shape_is(t, 2, want));
    if (!fits) {
        struct tensor expected = {.ndim = weight && u->side < 0 ? 2 : n};
        char has[96], wants[96];
        memcpy(expected.shape, want, sizeof want);
        tensor_shape_text(t, has, sizeof has);
        tensor_shape_text(&expected, wants, sizeof wants);
        return err_param(m->e, E_CONFLICT, t->name, "tensor '%s' has shape %s; this VAE needs %s", t->name, has, wants);
    }
    if (t->dtype == DT_F32 || t->dtype == DT_F16 || t->dtype == DT_BF16 || t->dtype == DT_F64) return OK;
    return err_param(m->e, E_UNSUPPORTED, t->name, "tensor '%s' has dtype %s; weights must be F32, F16, BF16 or F64", t->name,
                     dtype_name(t->dtype));
}

static int place(struct match *m, const struct vae_unit *u, const char *part) {
    const char *spelled[] = {u->name, u->old, u->compvis};
    const struct tensor *t = NULL;
    char name[128];
    for (int i = 0; i < 3 && !t; i++) {
        if (!*spelled[i]) continue;
        snprintf(name, sizeof name, "%s%s.%s", m->prefix, spelled[i], part);
        t = tensor_find(m->from, name);
    }
    if (!t) {
        bool compvis = strcmp(u->name, u->compvis) != 0;
        return err_param(m->e, E_CONFLICT, u->name, "tensor '%s%s.%s'%s%s is missing", m->prefix, u->name, part,
                         compvis ? ", in CompVis' files " : "", compvis ? u->compvis : "");
    }
    m->used[t - m->from->tensors] = true;
    struct tensor *to = &m->f->table.tensors[m->f->table.n++];
    *to = *t;
    to->name = m->f->names + m->at;
    m->at += (size_t)sprintf(m->f->names + m->at, "%s.%s", u->name, part) + 1;
    return check_shape(m, t, u, strcmp(part, "weight") == 0);
}

static int match_unit(void *ctx, const struct vae_unit *u) {
    int rc = place(ctx, u, "weight");
    return rc == OK ? place(ctx, u, "bias") : rc;
}

static int count_unit(void *ctx, const struct vae_unit *u) {
    struct match *m = ctx;
    m->at += 2 * (strlen(u->name) + sizeof "weight" + 1);
    m->f->table.n += 2;
    return OK;
}

// Tensors that nobody asked for. Of a whole checkpoint, the other networks; of a training checkpoint, the discriminator and its
// copies.
static int check_extra(const struct match *m) {
    static const char *const training[] = {"loss.", "model_ema."};
    for (int i = 0; i < m->from->n; i++) {
        const char *name = m->from->tensors[i].name;
        bool other = strncmp(name, m->prefix, strlen(m->prefix)) != 0;
        for (int k = 0; k < 2; k++) other = other || strncmp(name + strlen(m->prefix), training[k], strlen(training[k])) == 0;
        if (!m->used[i] && !other) return err_param(m->e, E_CONFLICT, name, "tensor '%s' has no place in this VAE", name);
    }
    return OK;
}

int vae_match(struct vae_file *f, const struct tensor_table *from, const char *prefix, struct err *e) {
    struct match m = {.f = f, .from = from, .prefix = prefix, .e = e};
    vae_walk(&f->arch, count_unit, &m);
    f->names = mem_alloc(m.at);
    f->table.tensors = mem_array((size_t)f->table.n, sizeof *f->table.tensors);
    m.used = mem_array((size_t)from->n + 1, sizeof *m.used);
    f->table.n = 0, m.at = 0;
    int rc = f->names && f->table.tensors && m.used ? OK : err_set(e, E_NOMEM, "no memory for the names of a VAE");
    if (rc == OK) rc = vae_walk(&f->arch, match_unit, &m);
    if (rc == OK) rc = check_extra(&m);
    mem_free(m.used);
    return rc;
}
