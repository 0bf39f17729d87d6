// SPDX-License-Identifier: MIT
#include "core/io/import.h"

#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/mem.h"

static const char from_tensors[] = "the tensors", from_args[] = "the file's args", from_config[] = "config.json",
                  from_layout[] = "diffusers' layout", from_projectors[] = "REPA's projectors",
                  from_teacher[] = "a teacher's tensors", from_table[] = "the published width",
                  from_official[] = "the official code", from_rule[] = "the official sampling rule",
                  from_code[] = "the official code (one more row for the null class)";

struct account { // the facts being gathered
    struct import_fact *facts;
    int *n;
    const struct checkpoint *ck;
    bool diffusers, projectors, teacher; // what the tensors' names give away
};

static struct account begin(struct import_fact *facts, int *n, const struct checkpoint *ck) {
    struct account a = {.facts = facts, .n = n, .ck = ck, .diffusers = strcmp(ck->layout, "diffusers") == 0};
    for (int i = 0; i < ck->table.n; i++) {
        const char *name = ck->table.tensors[i].name;
        bool projector = strncmp(name, "projectors.", 11) == 0;
        a.projectors |= projector;
        a.teacher |= !projector && arch_unused(name);
    }
    *n = 0;
    return a;
}

static const char *args_of(const struct account *a) { return a->diffusers ? from_config : from_args; }

static void note(struct account *a, const char *field, const char *source, const char *value) {
    struct import_fact *f = &a->facts[(*a->n)++];
    *f = (struct import_fact){.field = field, .source = source};
    snprintf(f->value, sizeof f->value, "%s", value);
}

static void note_int(struct account *a, const char *field, const char *source, long long value) {
    char text[32];
    snprintf(text, sizeof text, "%lld", value);
    note(a, field, source, text);
}

// key: the authors' scripts' name; ours: that of sitd train's checkpoints, or NULL
static bool meta_int(const struct checkpoint *c, const char *key, const char *ours, int64_t min, int64_t max, int64_t *v) {
    const char *s = checkpoint_meta(c, key);
    char *end;
    if (!s && ours) s = checkpoint_meta(c, ours);
    if (!s || !*s) return false;
    errno = 0;
    *v = strtoll(s, &end, 10);
    return !errno && !*end && *v >= min && *v <= max;
}

// --- single facts

// A word from a flag or an arg, in lower case, if it is one of the choices.
static bool choose(char *dst, size_t size, const char *word, const char *const *choices) {
    for (int i = 0; word && choices[i]; i++)
        if (strcasecmp(word, choices[i]) == 0) return snprintf(dst, size, "%s", choices[i]) > 0;
    return false;
}

static int resolve_word(struct account *a, const char *field, const char *flag, char *dst, size_t size, const char *said,
                        const char *arg, const char *const *choices, struct err *e) {
    if (said && !choose(dst, size, said, choices)) return err_param(e, E_RANGE, flag, "%s '%.40s' is not known", flag, said);
    if (said) note(a, field, flag, dst);
    else if (choose(dst, size, arg, choices)) note(a, field, from_args, dst);
    else note(a, field, flag, "");
    return OK;
}

static bool is_masked(const struct model_desc *d) {
    return strcmp(d->family, "maskdit") == 0 || strcmp(d->family, "sd-dit") == 0;
}

// What the tensors prove of the family, or NULL.
static const char *proven_family(const struct account *a, const struct arch *arch, const char **source) {
    *source = arch->one_hot && !a->teacher ? from_tensors
              : a->teacher                 ? from_teacher
              : a->diffusers               ? from_layout
                                           : from_projectors;
    if (arch->one_hot) return a->teacher ? "sd-dit" : "maskdit";
    return a->diffusers ? "dit" : a->projectors ? "sit" : NULL;
}

static int resolve_family(struct account *a, struct model_desc *d, const struct import_flags *f, struct err *e) {
    static const char *const families[] = {"sit", "dit", "maskdit", "sd-dit", NULL};
    char prefix[4] = "";
    const char *arg = checkpoint_meta(a->ck, "family"), *model = checkpoint_meta(a->ck, "model"), *source;
    const char *proven = proven_family(a, &d->arch, &source);
    if (proven && !f->family) {
        snprintf(d->family, sizeof d->family, "%s", proven);
        note(a, "family", source, proven);
        return OK;
    }
    if (!arg && model && model[0] && model[1] && model[2] && model[3] == '-') { // "SiT-XL/2", as the official scripts name it
        memcpy(prefix, model, 3);
        arg = prefix;
    }
    if (resolve_word(a, "family", "--family", d->family, sizeof d->family, f->family, arg, families, e))
        return e ? e->status : E_RANGE;
    if (d->family[0] && is_masked(d) != d->arch.one_hot)
        return err_param(e, E_CONFLICT, "--family",
                         "family %s has %s label table; this file has the other kind (y_embedder.embedding_table.weight)",
                         d->family, is_masked(d) ? "a one-hot [width, classes]" : "a [classes, width]");
    return OK;
}

// Which end of the network's time is noise. The SiT code has it at 0, REPA and the SiT paper at 1.
static int resolve_time(struct account *a, struct model_desc *d, const struct import_flags *f, struct err *e) {
    static const char *const times[] = {"forward", "reversed", NULL};
    char word[16] = "forward";
    if (f->time && !choose(word, sizeof word, f->time, times))
        return err_param(e, E_RANGE, "--time", "--time is forward or reversed");
    d->arch.reversed = f->time ? strcmp(word, "reversed") == 0 : a->projectors;
    d->arch.negated = d->arch.reversed && strcmp(d->prediction, "velocity") == 0;
    note(a, "time", f->time ? "--time" : a->projectors ? from_projectors : from_official, times[d->arch.reversed]);
    return OK;
}

static int resolve_process(struct account *a, struct model_desc *d, const struct import_flags *f, struct err *e) {
    static const char *const paths[] = {"linear", "gvp", "vp", NULL}, *const predictions[] = {"velocity", "noise", "score", NULL};
    if (d->family[0] && strcmp(d->family, "sit") != 0) { // discrete time or EDM; such args are left over from other scripts
        const char *flag = f->path ? "--path" : f->prediction ? "--prediction" : f->time ? "--time" : NULL;
        return flag ? err_param(e, E_CONFLICT, flag, "%s does not apply to family %s", flag, d->family) : OK;
    }
    const char *arg = checkpoint_meta(a->ck, "path_type"), *prediction = checkpoint_meta(a->ck, "prediction");
    if (prediction && strcmp(prediction, "v") == 0) prediction = "velocity"; // as REPA says it
    int rc =
        resolve_word(a, "path", "--path", d->path, sizeof d->path, f->path, arg ? arg : checkpoint_meta(a->ck, "path"), paths, e);
    if (rc != OK) return rc;
    rc = resolve_word(a, "prediction", "--prediction", d->prediction, sizeof d->prediction, f->prediction, prediction,
                      predictions, e);
    return rc == OK ? resolve_time(a, d, f, e) : rc;
}

static int resolve_compat(struct account *a, struct model_desc *d, const struct import_flags *f, struct err *e) {
    static const char *const known[] = {"none", "diffusers", NULL};
    const char *source = "the official formulas (--compat diffusers: theirs)";
    char word[16] = "none";
    if (!a->diffusers && !f->compat) return OK;
    if (d->arch.block_embedders) { // nothing converted from the authors' files has these: it was trained by diffusers
        snprintf(word, sizeof word, "diffusers");
        source = "its blocks' own embedders (trained by diffusers)";
    }
    if (f->compat && !choose(word, sizeof word, f->compat, known))
        return err_param(e, E_RANGE, "--compat", "--compat is none or diffusers");
    d->arch.diffusers = strcmp(word, "diffusers") == 0;
    if (d->arch.diffusers && strcmp(d->family, "dit") != 0)
        return err_param(e, E_CONFLICT, "--compat", "--compat diffusers applies to family dit");
    note(a, "compat", f->compat ? "--compat" : source, word);
    return OK;
}

static void resolve_heads(struct account *a, struct arch *arch, const struct import_flags *f) {
    int64_t v;
    const char *source = from_table;
    if (f->heads) arch->num_heads = f->heads, source = "--heads";
    else if (meta_int(a->ck, "num_heads", "heads", 1, 1024, &v)) arch->num_heads = (int)v, source = args_of(a);
    if (arch->num_heads) note_int(a, "num_heads", source, arch->num_heads);
    else note(a, "num_heads", "--heads", "");
    if (!arch->decoder.depth) return;
    source = f->decoder_heads ? "--decoder-heads" : from_table;
    if (f->decoder_heads) arch->decoder.num_heads = f->decoder_heads;
    if (arch->decoder.num_heads) note_int(a, "decoder heads", source, arch->decoder.num_heads);
    else note(a, "decoder heads", "--decoder-heads", "");
}

static int resolve_input(struct account *a, struct arch *arch, const struct import_flags *f, struct err *e) {
    int64_t v;
    const char *source = from_tensors;
    if (arch->input_size && f->input_size && f->input_size != arch->input_size)
        return err_param(e, E_CONFLICT, "--input-size", "--input-size %d, but pos_embed is for %d", f->input_size,
                         arch->input_size);
    if (!arch->input_size && f->input_size) arch->input_size = f->input_size, source = "--input-size";
    else if (!arch->input_size && meta_int(a->ck, "input_size", "size", 1, 8192, &v)) arch->input_size = (int)v, source = args_of(a);
    if (arch->input_size) note_int(a, "input_size", source, arch->input_size);
    else note(a, "input_size", "--input-size", "");
    return OK;
}

// The label table has a row for each class and, if labels were dropped in training, one for the null class.
static int resolve_classes(struct account *a, struct arch *arch, const struct import_flags *f, struct err *e) {
    int64_t v = 0, rows = arch->num_classes + arch->class_dropout;
    const char *source = from_code;
    if (arch->one_hot) { // the table has a column a class, and the null class is no class at all
        if (f->classes && f->classes != arch->num_classes)
            return err_param(e, E_CONFLICT, "--classes", "--classes %d, but the label table has %d columns", f->classes,
                             arch->num_classes);
        note_int(a, "num_classes", from_tensors, arch->num_classes);
        return OK;
    }
    if (f->classes) v = f->classes, source = "--classes";
    else if (meta_int(a->ck, "num_classes", "classes", 1, 1 << 24, &v)) source = args_of(a);
    else v = 0;
    if (v && v != rows && v != rows - 1)
        return err_param(e, E_CONFLICT, "--classes", "%s say %lld classes, but the label table has %lld rows", source,
                         (long long)v, (long long)rows);
    if (v) {
        arch->num_classes = (int)v;
        arch->class_dropout = v == rows - 1;
    }
    note_int(a, "num_classes", source, arch->num_classes);
    note(a, "class_dropout", source, arch->class_dropout ? "true" : "false");
    return OK;
}

static void resolve_step(struct account *a, struct model_desc *d, const struct import_flags *f) {
    static const char *const keys[] = {"step", "steps", "global_step", "train_steps"};
    if (f->step >= 0) {
        d->step = f->step;
        note_int(a, "step", "--step", d->step);
        return;
    }
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
        if (!meta_int(a->ck, keys[i], NULL, 0, INT64_MAX, &d->step)) continue;
        note_int(a, "step", from_args, d->step);
        return;
    }
    d->step = 0;
    note_int(a, "step", "nothing (--step would tell)", 0);
}

static void resolve_guidance(struct account *a, struct model_desc *d, const struct import_flags *f) {
    bool all =
        is_masked(d) || a->projectors || d->arch.diffusers; // MaskDiT, REPA and diffusers guide every channel, DiT and SiT three
    d->guide_channels = f->guide_channels ? f->guide_channels : all ? -1 : 3;
    const char *source = f->guide_channels ? "--guidance-channels" : from_rule;
    if (d->guide_channels < 0) note(a, "guidance channels", source, "all");
    else note_int(a, "guidance channels", source, d->guide_channels);
}

// step 0: the same for every channel
static int set_statistics(struct model_desc *d, const double *mean, const double *std, int step, struct err *e) {
    struct latent *l = &d->latent;
    int n = d->arch.in_channels;
    l->mean = mem_array((size_t)n, sizeof *l->mean);
    l->std = mem_array((size_t)n, sizeof *l->std);
    if (!l->mean || !l->std) return err_set(e, E_NOMEM, "no memory for latent statistics");
    for (int i = 0; i < n; i++) l->mean[i] = mean[i * step], l->std[i] = std[i * step];
    return OK;
}

int import_latent(struct model_desc *d, double scale, double shift, struct err *e) {
    if (shift != 0) return set_statistics(d, &shift, &(double){1 / scale}, 0, e);
    d->latent.scale = scale;
    return OK;
}

static int resolve_statistics(struct account *a, struct model_desc *d, const struct import_flags *f, struct err *e) {
    int n = d->arch.in_channels;
    if (f->latent_scale > 0) return err_param(e, E_CONFLICT, "--latent-scale", "--latent-scale and --latent-mean, --latent-std exclude each other");
    if (f->n_mean != n) return err_param(e, E_CONFLICT, "--latent-mean", "--latent-mean has %d numbers, the network %d channels", f->n_mean, n);
    if (f->n_std != n) return err_param(e, E_CONFLICT, "--latent-std", "--latent-std has %d numbers, the network %d channels", f->n_std, n);
    note(a, "latent mean, std", "--latent-mean", "a channel");
    return set_statistics(d, f->latent_mean, f->latent_std, 1, e);
}

// What the input means: flags, then the VAE's own scale, then: networks of four channels were trained on latents of Stable Diffusion's VAE times
// 0.18215, by all four authors' code.
static int resolve_latent(struct account *a, struct model_desc *d, const struct import_flags *f, struct err *e) {
    const char *source = f->latent_scale > 0 ? "--latent-scale" : f->vae ? "the VAE's config" : from_official;
    char text[32];
    if (f->n_mean || f->n_std) return resolve_statistics(a, d, f, e);
    if (f->vae && f->latent_scale <= 0 && f->vae->shift != 0) { // (z - shift) scale
        note(a, "latent mean, std", source, "a channel");
        return import_latent(d, f->vae->scale, f->vae->shift, e);
    }
    if (source == from_official && d->arch.in_channels != 4) return OK;
    d->latent.scale = f->latent_scale > 0 ? f->latent_scale : f->vae ? f->vae->scale : 0.18215;
    snprintf(text, sizeof text, "%.9g", d->latent.scale);
    note(a, "latent scale", source, text);
    return OK;
}

static void note_shapes(struct account *a, const struct arch *arch) {
    char ratio[32];
    snprintf(ratio, sizeof ratio, "%g", arch->mlp_ratio);
    note_int(a, "hidden_size", from_tensors, arch->hidden_size);
    note_int(a, "depth", from_tensors, arch->depth);
    note_int(a, "patch_size", from_tensors, arch->patch_size);
    note_int(a, "in_channels", from_tensors, arch->in_channels);
    note(a, "mlp_ratio", from_tensors, ratio);
    note(a, "block", from_tensors, arch_block_name(arch->block));
    if (arch->decoder.depth) {
        note_int(a, "decoder width", from_tensors, arch->decoder.hidden_size);
        note_int(a, "decoder depth", from_tensors, arch->decoder.depth);
    }
    if (arch->block_embedders) note(a, "block_embedders", from_tensors, "true");
    note(a, "learn_sigma", from_tensors, arch->learn_sigma ? "true" : "false");
}

int import_describe(struct model_desc *d, struct import_fact facts[IMPORT_FACTS], int *n_facts, const struct checkpoint *c,
                    const struct import_flags *f, struct err *e) {
    struct account a = begin(facts, n_facts, c);
    *d = (struct model_desc){0};
    int rc = arch_infer(&d->arch, &c->table, e);
    if (rc != OK) return rc;
    note_shapes(&a, &d->arch);
    rc = resolve_input(&a, &d->arch, f, e);
    if (rc == OK) rc = resolve_classes(&a, &d->arch, f, e);
    if (rc != OK) return rc;
    resolve_heads(&a, &d->arch, f);
    rc = resolve_family(&a, d, f, e);
    if (rc == OK) rc = resolve_process(&a, d, f, e);
    if (rc == OK) rc = resolve_compat(&a, d, f, e);
    if (rc != OK) return rc;
    resolve_guidance(&a, d, f);
    resolve_step(&a, d, f);
    return resolve_latent(&a, d, f, e);
}

int import_require(const struct import_fact *facts, int n, struct err *e) {
    for (int i = 0; i < n; i++)
        if (!facts[i].value[0])
            return err_param(e, E_CONFLICT, facts[i].source, "the file does not tell its %s: give %s", facts[i].field,
                             facts[i].source);
    return OK;
}

// --- dtypes

static int convert_value(void *dst, size_t i, float v, enum dtype to) {
    if (to == DT_F32) ((float *)dst)[i] = v;
    else if (to == DT_BF16) ((uint16_t *)dst)[i] = f32_to_bf16(v);
    else {
        uint16_t h = f32_to_f16(v);
        if ((h & 0x7fff) == 0x7c00 && isfinite(v)) return E_RANGE;
        ((uint16_t *)dst)[i] = h;
    }
    return OK;
}

static int convert(struct import_table *it, struct tensor *t, enum dtype to, struct err *e) {
    float *wide = mem_array(t->count, sizeof *wide);
    void *narrow = mem_array(t->count, dtype_size(to));
    int rc = wide && narrow ? tensor_to_f32(wide, t, e) : err_set(e, E_NOMEM, "no memory to convert tensor '%s'", t->name);
    for (size_t i = 0; i < t->count && rc == OK; i++)
        if (convert_value(narrow, i, wide[i], to) != OK)
            rc = err_param(e, E_RANGE, t->name, "tensor '%s' holds %g, too large for f16: bf16 and f32 can store it", t->name,
                           (double)wide[i]);
    mem_free(wide);
    if (rc != OK) {
        mem_free(narrow);
        return rc;
    }
    it->owned[it->n_owned++] = narrow;
    t->data = narrow;
    t->dtype = to;
    t->bytes = t->count * dtype_size(to);
    return OK;
}

int import_convert(struct import_table *it, const struct tensor_table *src, enum dtype storage, struct err *e) {
    *it = (struct import_table){.owned = mem_array((size_t)src->n, sizeof *it->owned)};
    it->table.tensors = mem_array((size_t)src->n, sizeof *it->table.tensors);
    int rc = it->owned && it->table.tensors ? OK : err_set(e, E_NOMEM, "no memory for %d tensors", src->n);
    for (int i = 0; i < src->n && rc == OK; i++) {
        if (arch_unused(src->tensors[i].name)) continue;
        struct tensor *t = &it->table.tensors[it->table.n++];
        *t = src->tensors[i];
        enum dtype to = storage == DT_OTHER                           ? (t->dtype == DT_F64 ? DT_F32 : t->dtype)
                        : t->ndim < 2 || strstr(t->name, "pos_embed") ? DT_F32
                                                                      : storage;
        if (to != t->dtype) rc = convert(it, t, to, e);
    }
    if (rc != OK) import_free(it);
    return rc;
}

void import_free(struct import_table *it) {
    for (int i = 0; i < it->n_owned; i++) mem_free(it->owned[i]);
    mem_free(it->owned);
    mem_free(it->table.tensors);
    *it = (struct import_table){0};
}
