// SPDX-License-Identifier: MIT
#include "server/cmd_train.h"

#include <ctype.h>
#include <jansson.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "core/base/mem.h"
#include "core/io/checkpoint.h"
#include "core/io/file.h"
#include "core/io/import.h"

#define AT(field) offsetof(struct train_flags, field)
#define TEXT(name, field, value, help)                                                                                           \
    { name, OPTION_TEXT, AT(field), value, 0, 0, NULL, help }
#define CHOICE(name, field, value, choices, help)                                                                                \
    { name, OPTION_CHOICE, AT(field), value, 0, 0, choices, help }
#define WHOLE(name, field, value, least, most, help)                                                                             \
    { name, OPTION_NUMBER, AT(field), value, least, most, NULL, help }
#define REAL(name, field, value, least, most, help)                                                                              \
    { name, OPTION_REAL, AT(field), value, least, most, NULL, help }
#define ONOFF(name, field, value, help)                                                                                          \
    { name, OPTION_SWITCH, AT(field), value, 0, 0, NULL, help }
#define HEADING(text)                                                                                                            \
    { NULL, OPTION_HEADING, 0, NULL, 0, 0, NULL, text }
#define MANY 1e12
static const struct option_desc options[] = {
    TEXT("config", config, "", "file of `key = value` lines, # comments; keys are these names"),
    HEADING("Data"),
    TEXT("data", data, "",
         "IDX folder (MNIST, Fashion-MNIST), folder of one folder of PNG/JPEG a class, or latents of sitd encode"),
    WHOLE("size", size, "0", 0, 1024,
          "side of the network's input; 0: the data's own. IDX pictures are padded to it, others cropped as ADM does"),
    WHOLE("channels", channels, "0", 0, 1024, "of the input; 0: the data's own (pictures: 3)"),
    ONOFF("flip", flip, "false", "mirror pictures left and right, half of the time"),
    TEXT("vae", vae, "", "AutoencoderKL of the latents, for samples and publication; empty: the one that the data names"),
    TEXT("labels", labels, "", "class names for publication: a JSON array, or a line a class; empty: the data's folders"),
    HEADING("Network"),
    TEXT("model", model, "SiT-S/2",
         "DiT-S/2 ... DiT-XL/8, SiT-S/2 ... SiT-XL/8 (S, B, L, XL; patch 2, 4, 8): the papers' sizes, or `custom`"),
    CHOICE("family", family, "auto", "auto|sit|dit", "continuous or discrete time; auto: as the model is called"),
    WHOLE("width", width, "0", 0, 16384, "hidden size; 0: the model's, as the next three"),
    WHOLE("depth", depth, "0", 0, 1024, "blocks"),
    WHOLE("heads", heads, "0", 0, 1024, "attention heads"),
    WHOLE("patch", patch, "0", 0, 64, "side of a patch"),
    REAL("mlp-ratio", mlp_ratio, "4", 0.01, 64, "width of the MLPs over hidden size"),
    CHOICE("block", block, "adaln-zero", "adaln-zero|adaln|cross-attention|in-context", "how time and class reach the blocks"),
    ONOFF("learn-sigma", learn_sigma, "true",
          "twice the output channels: DiT's learned variance (hybrid loss); of SiT idle, as in the authors' files"),
    WHOLE("classes", classes, "0", 0, 1000000, "0: as many as the data has"),
    HEADING("Objective"),
    CHOICE("path", path, "linear", "linear|gvp|vp", "interpolant (SiT)"),
    CHOICE("prediction", prediction, "velocity", "velocity|noise|score", "what the network says (SiT)"),
    CHOICE("weighting", weighting, "none", "none|velocity|likelihood", "of the noise and score losses (SiT)"),
    CHOICE("t-density", density, "uniform", "uniform|logit-normal", "how t is drawn"),
    REAL("t-mean", t_mean, "0", -10, 10, "of the logit-normal"),
    REAL("t-std", t_std, "1", 0.001, 10, "of the logit-normal"),
    REAL("dropout", dropout, "0.1", 0, 1, "labels replaced by the null class, for guidance; 0: there is no null class"),
    HEADING("Optimiser (AdamW)"),
    WHOLE("steps", steps, "400000", 1, 99999999, "steps of the whole run, those of what --resume continues included"),
    WHOLE("batch", batch, "256", 1, 1048576, "images a step, over all devices"),
    WHOLE("microbatch", microbatch, "0", 0, 1048576, "images at a time: the step is their accumulation; 0: all"),
    REAL("lr", lr, "1e-4", 0, 10, "learning rate"),
    WHOLE("warmup", warmup, "0", 0, MANY, "steps over which it rises from 0"),
    CHOICE("schedule", schedule, "constant", "constant|cosine|linear", "after the warm-up, to lr-end times lr at the last step"),
    REAL("lr-end", lr_end, "0", 0, 1, "part of lr at the last step"),
    REAL("beta1", beta1, "0.9", 0, 0.999999, "decay of the first moment"),
    REAL("beta2", beta2, "0.999", 0, 0.999999, "decay of the second moment"),
    REAL("eps", eps, "1e-8", 1e-20, 1, "added to its root"),
    REAL("weight-decay", decay, "0", 0, 10, "decoupled, of every parameter"),
    REAL("clip", clip, "0", 0, 1e6, "largest norm of the gradient; 0: as it is"),
    TEXT("ema", ema, "0.9999", "decays of the averaged weights, up to four, by commas; the first is sampled and published"),
    WHOLE("seed", seed, "0", 0, 9007199254740991, "of weights, noise, times, dropped labels and the data's order"),
    HEADING("Files"),
    TEXT("out", out, "", "folder of the run: checkpoints/, samples/, log.jsonl, report.html; of several hosts, where all of them see it"),
    WHOLE("save-every", save_every, "5000", 0, MANY,
          "steps between checkpoints; one is written at the end and on SIGTERM anyway"),
    WHOLE("keep", keep, "3", 1, 1000000, "newest checkpoints that stay"),
    WHOLE("keep-every", keep_every, "0", 0, MANY, "checkpoints of every so many steps stay for ever"),
    TEXT("resume", resume, "",
         "continue a checkpoint (ours, or the authors' .pt with model, ema and opt); `auto`: the newest in out, if there is one"),
    TEXT("init", init, "",
         "begin from a checkpoint's weights (.pt, safetensors, diffusers); another number of classes gets a new label table. With "
         "--resume auto: where out has no checkpoint yet"),
    TEXT("publish", publish, "", "model directory that a daemon serves: MODELS/NAME; NAME is the model's, up to 63 bytes of printable ASCII without '@'"),
    WHOLE("publish-every", publish_every, "5000", 1, MANY, "steps between publications"),
    CHOICE("publish-when", publish_when, "always", "always|improved",
           "improved: only when the mean loss since the last one is the lowest"),
    CHOICE("publish-storage", publish_storage, "f32", "f32|f16|bf16", "how published matrices are stored; vectors stay f32"),
    ONOFF("publish-default", publish_default, "false", "the model is served when a request names none"),
    TEXT("guidance-channels", guide_channels, "3", "leading channels that guidance acts on: a number (the authors: 3) or `all`"),
    HEADING("What is seen"),
    WHOLE("log-every", log_every, "100", 1, MANY, "steps a line of log.jsonl"),
    WHOLE("sample-every", sample_every, "5000", 0, MANY,
          "steps between grids of samples (fixed noise, averaged weights); 0: none"),
    WHOLE("sample-steps", sample_steps, "50", 1, 1000, "of their solver (SiT: Heun ODE, DiT: DDIM)"),
    WHOLE("sample-each", sample_each, "4", 1, 64, "of each of the first ten classes"),
    REAL("guidance", guidance, "4", 0, 100, "their guidance scale"),
    HEADING("Machine"),
    CHOICE("backend", backend, "auto", "auto|cpu|cuda|ref", "what computes; auto: cuda where there is a card"),
    TEXT("devices", devices, "",
         "cards of this host, by commas: 0,1; a process each, with NCCL between them. Empty: the first; under torchrun, mpirun "
         "and Slurm each process its own"),
    CHOICE("precision", precision, "f32", "f32|bf16",
           "of products and activations; weights, moments, averages and sums stay f32"),
    CHOICE("recompute", recompute, "none", "none|block",
           "block: keep each block's input only, run it again in backward: less memory, a third more work"),
    WHOLE("threads", threads, "0", 0, 1024, "compute threads; 0: what affinity and cgroup allow"),
    WHOLE("data-threads", data_threads, "2", 1, 256, "threads that read and decode ahead"),
};
#define N_OPTIONS ((int)(sizeof options / sizeof *options))
_Static_assert(N_OPTIONS <= TRAIN_OPTIONS, "struct train_flags has room for every option's source");
static const struct option_set set = {options, N_OPTIONS, "SITD_TRAIN_"};

int train_flags_load(struct train_flags *f, int argc, char **argv, bool *usage, struct err *e) {
    *f = (struct train_flags){0};
    int rc = options_load(&set, f, f->source, argc, argv, &f->words, usage, e);
    if (rc != OK || f->words.help || f->words.version || f->words.print_config) return rc;
    *usage = !f->data[0] || !f->out[0];
    if (*usage)
        return err_param(e, E_RANGE, f->data[0] ? "out" : "data", "%s is missing",
                         f->data[0] ? "--out, the folder of the run," : "--data, what to learn from,");
    return OK;
}

void train_flags_print(const struct train_flags *f, FILE *to) { options_print(&set, f, f->source, to); }

void train_help(FILE *to) {
    fprintf(to, "usage: sitd train --data PATH --out DIR [options]\n\nTrains a DiT or SiT. Defaults are the papers' recipe. Each "
                "option is also a variable (--lr-end: SITD_TRAIN_LR_END) and\n"
                "a line of the config file; deploy/recipes has some. SIGTERM and SIGINT save a checkpoint and leave; --resume "
                "auto continues there.\n\n");
    options_help(&set, to);
    fprintf(to, "\n  --check-config     check the options and the data and leave\n  --print-config     print the options in "
                "force as a config file and leave\n  --version, --help\n");
}

/* ---- flags to a configuration ---- */

static int named_size(struct arch *a, const char *model, bool *dit, struct err *e) {
    char size[3] = "";
    int patch = 0, end = 0;
    *dit = strncasecmp(model, "DiT-", 4) == 0;
    if ((*dit || strncasecmp(model, "SiT-", 4) == 0) && sscanf(model + 4, "%2[SBLXsblx]/%d%n", size, &patch, &end) == 2) {
        for (char *c = size; *c; c++) *c = (char)toupper((unsigned char)*c);
        if (!model[4 + end] && patch > 0 && arch_size(a, size, strlen(size))) return a->patch_size = patch, OK;
    }
    return err_param(e, E_RANGE, "model",
                     "model is '%s', not custom, nor DiT- or SiT- and S, B, L or XL and a patch, as in SiT-XL/2", model);
}

static int set_arch(struct model_desc *d, const struct train_flags *f, const struct data_info *info, struct err *e) {
    struct arch *a = &d->arch;
    bool dit = false, custom = strcasecmp(f->model, "custom") == 0;
    if (!custom && named_size(a, f->model, &dit, e)) return e->status;
    if (custom && strcmp(f->family, "auto") == 0)
        return err_param(e, E_RANGE, "family", "a custom model's family must be given: sit or dit");
    if (strcmp(f->family, "auto")) dit = strcmp(f->family, "dit") == 0;
    snprintf(d->family, sizeof d->family, "%s", dit ? "dit" : "sit");
    const struct {
        int64_t given;
        int *at;
        const char *name;
    } own[] = {{f->width, &a->hidden_size, "width"},
               {f->depth, &a->depth, "depth"},
               {f->heads, &a->num_heads, "heads"},
               {f->patch, &a->patch_size, "patch"}};
    for (size_t i = 0; i < sizeof own / sizeof *own; i++) {
        if (own[i].given) *own[i].at = (int)own[i].given;
        if (!*own[i].at) return err_param(e, E_RANGE, own[i].name, "a custom model's %s must be given", own[i].name);
    }
    a->input_size = info->size, a->in_channels = info->channels;
    a->num_classes = f->classes ? (int)f->classes : info->classes;
    a->mlp_ratio = f->mlp_ratio;
    a->class_dropout = f->dropout > 0;
    a->learn_sigma = f->learn_sigma;
    a->block = (enum arch_block)arch_block_parse(f->block);
    if (!dit)
        snprintf(d->path, sizeof d->path, "%s", path_name((enum path_kind)path_parse(f->path))),
            snprintf(d->prediction, sizeof d->prediction, "%s",
                     prediction_name((enum prediction)prediction_parse(f->prediction)));
    char *end;
    long guide = strtol(f->guide_channels, &end, 10);
    d->guide_channels = strcmp(f->guide_channels, "all") == 0 ? -1 : (int)guide;
    if (d->guide_channels != -1 && (*end || end == f->guide_channels || guide < 1 || guide > 1024))
        return err_param(e, E_RANGE, "guidance-channels", "guidance-channels is '%s', not a number from 1 to 1024 or all",
                         f->guide_channels);
    return OK;
}

static int set_objective(struct train_config *c, const struct train_flags *f, struct err *e) {
    struct objective *o = &c->objective;
    o->discrete = strcmp(c->desc.family, "dit") == 0;
    const char *other = !o->discrete                       ? NULL // what a DiT has no choice of
                        : strcmp(f->path, "linear")         ? "path"
                        : strcmp(f->prediction, "velocity") ? "prediction"
                        : strcmp(f->weighting, "none")      ? "weighting"
                                                            : NULL;
    if (other) return err_param(e, E_CONFLICT, other, "%s is a choice of SiT only: a DiT learns DiT's noise in discrete time", other);
    if (!o->discrete) {
        o->path = (enum path_kind)path_parse(f->path);
        o->prediction = (enum prediction)prediction_parse(f->prediction);
        o->weighting = (enum weighting)weighting_parse(f->weighting);
    }
    o->learned_range = o->discrete && f->learn_sigma;
    o->density = (enum density)density_parse(f->density);
    o->mean = f->t_mean, o->std = f->t_std;
    o->drop = f->dropout;
    o->null_label = f->dropout > 0 ? c->desc.arch.num_classes : -1;
    o->seed = (uint64_t)f->seed;
    return OK;
}

static int set_emas(struct train_config *c, const struct train_flags *f, struct err *e) {
    const char *at = f->ema;
    for (char *end; *at; at = *end == ',' ? end + 1 : end) {
        if (c->n_ema == KERN_MAX_EMA) return err_param(e, E_RANGE, "ema", "ema is '%s': at most %d decays", f->ema, KERN_MAX_EMA);
        c->ema[c->n_ema++] = strtod(at, &end);
        if (end == at || (*end && *end != ','))
            return err_param(e, E_RANGE, "ema", "ema is '%s', not numbers with commas between", f->ema);
    }
    return OK;
}

static const char *or_null(const char *text) { return text[0] ? text : NULL; }

static int set_labels(struct model_desc *d, const struct train_flags *f, const struct data_info *info, struct err *e) {
    void *text = NULL;
    size_t n = 0;
    int rc = OK;
    if (f->labels[0]) rc = file_read(&text, &n, f->labels, 1 << 24, e);
    else if (info->names && info->classes == d->arch.num_classes) {
        json_t *names = json_array();
        for (int i = 0; i < info->classes; i++) json_array_append_new(names, json_string(info->names[i]));
        text = json_array_size(names) == (size_t)info->classes ? json_dumps(names, JSON_COMPACT) : NULL;
        json_decref(names);
        if (!text) return err_param(e, E_FORMAT, "data", "a folder's name is not UTF-8, so it cannot be a class's");
        n = strlen(text);
    }
    if (rc == OK && !text && info->listing && info->classes == d->arch.num_classes)
        return model_desc_labels(d, info->listing, strlen(info->listing), e);
    if (rc == OK && text) rc = model_desc_labels(d, text, n, e);
    mem_free(text);
    return rc;
}

int train_flags_devices(int *list, int most, const struct train_flags *f, struct err *e) {
    int n = 0;
    for (const char *at = f->devices; n == 0 || *at; n++) {
        char *end;
        long v = strtol(at, &end, 10);
        if (end == at || v < 0 || v > 1023 || (*end && *end != ',') || n == most)
            return err_param(e, E_RANGE, "devices", "'%s' is not a list of up to %d cards, such as 0,1", f->devices, most);
        for (int i = 0; i < n; i++)
            if (list[i] == v) return err_param(e, E_CONFLICT, "devices", "devices '%s' name card %ld twice", f->devices, v);
        list[n] = (int)v;
        at = *end ? end + 1 : end;
    }
    return n;
}

static int set_machine(struct train_config *c, const struct train_flags *f) {
    char why[256];
    struct kern *k;
    c->kern = (struct kern_config){.backend = f->backend,
                                   .exact_stream = true,
                                   .act = strcmp(f->precision, "bf16") == 0 ? KERN_BF16 : KERN_F32,
                                   .threads = (int)f->threads};
    if (strcmp(f->backend, "auto") == 0) {
        c->kern.backend = "cuda";
        if (kern_open(&k, &c->kern, why, sizeof why)) c->kern.backend = "cpu";
        else kern_close(k);
    }
    c->data_threads = (int)f->data_threads;
    c->recompute = strcmp(f->recompute, "block") == 0 ? RECOMPUTE_BLOCK : RECOMPUTE_NONE;
    return OK;
}

static void set_numbers(struct train_config *c, const struct train_flags *f) {
    c->flip = f->flip;
    c->steps = f->steps, c->batch = (int)f->batch, c->microbatch = (int)f->microbatch;
    c->lr = f->lr, c->lr_end = f->lr_end, c->beta1 = f->beta1, c->beta2 = f->beta2, c->eps = f->eps, c->decay = f->decay,
    c->clip = f->clip;
    c->schedule = strcmp(f->schedule, "cosine") == 0 ? LR_COSINE : strcmp(f->schedule, "linear") == 0 ? LR_LINEAR : LR_CONSTANT;
    c->warmup = f->warmup;
    c->out = f->out, c->save_every = f->save_every, c->keep = (int)f->keep, c->keep_every = f->keep_every;
    c->publish = or_null(f->publish), c->publish_every = f->publish_every,
    c->publish_improved = strcmp(f->publish_when, "improved") == 0;
    c->publish_storage = f->publish_storage[0] == 'b' ? DT_BF16 : strcmp(f->publish_storage, "f16") == 0 ? DT_F16 : DT_F32;
    c->desc.is_default = f->publish_default;
    c->resume = or_null(f->resume), c->init = or_null(f->init);
    c->log_every = f->log_every, c->sample_every = f->sample_every, c->sample_steps = (int)f->sample_steps,
    c->sample_each = (int)f->sample_each;
    c->sample_guidance = f->guidance;
}

static int fill(struct train_config *c, const struct train_flags *f, const struct data_info *info, struct err *e) {
    set_numbers(c, f);
    c->examples = info->n;
    int rc = set_arch(&c->desc, f, info, e);
    if (rc == OK) rc = set_emas(c, f, e);
    if (rc == OK) rc = set_objective(c, f, e);
    if (rc == OK) rc = set_labels(&c->desc, f, info, e);
    if (rc == OK) rc = train_config_check(c, e);
    if (rc == OK) rc = set_machine(c, f);
    c->vae = or_null(f->vae);
    if (info->latents && !c->vae) c->vae = info->vae;
    if (!info->latents) c->vae = NULL;
    if (rc == OK && info->latents) rc = import_latent(&c->desc, info->scale, info->shift, e);
    if (rc == OK && info->latents && c->publish && !c->vae)
        rc = err_param(e, E_CONFLICT, "vae", "a model of latents is published with its VAE: name it");
    return rc;
}

int train_flags_config(struct train_config *c, struct data **data, const struct train_flags *f, struct err *e) {
    struct data_spec spec = {
        .path = f->data, .size = (int)f->size, .channels = (int)f->channels, .flip = f->flip, .seed = (uint64_t)f->seed};
    *c = (struct train_config){0};
    int rc = data_open(data, &spec, e);
    if (rc != OK) return rc;
    rc = fill(c, f, data_info(*data), e);
    if (rc == OK) return OK;
    model_desc_deinit(&c->desc);
    data_close(*data);
    return rc;
}
