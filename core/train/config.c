// SPDX-License-Identifier: MIT
#include "core/train/config.h"

#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int check_step(const struct train_config *c, struct err *e) {
    if (c->microbatch && c->batch % c->microbatch)
        return err_param(e, E_CONFLICT, "microbatch", "a batch of %d is not a multiple of the microbatch, %d", c->batch,
                         c->microbatch);
    if (c->warmup > c->steps)
        return err_param(e, E_CONFLICT, "warmup", "the warm-up of %lld steps is longer than the run, %lld", (long long)c->warmup,
                         (long long)c->steps);
    for (int i = 0; i < c->n_ema; i++)
        if (!(c->ema[i] >= 0 && c->ema[i] < 1))
            return err_param(e, E_RANGE, "ema", "an EMA's decay is %g, not from 0 up to 1", c->ema[i]);
    if (c->n_ema < 1) return err_param(e, E_RANGE, "ema", "at least one EMA is kept: it is what is sampled and published");
    if (c->resume && strcmp(c->resume, "auto") && c->init)
        return err_param(e, E_CONFLICT, "init", "a run either continues one (resume) or begins from weights (init)");
    return OK;
}

// What a daemon would pass over is better told before a run than found out after it.
static int check_publish(const struct train_config *c, struct err *e) {
    char path[PATH_MAX], whole[PATH_MAX];
    struct err here = {0};
    if (!c->publish) return OK;
    size_t n = (size_t)snprintf(path, sizeof path, "%s", c->publish);
    while (n < sizeof path && n > 1 && path[n - 1] == '/') path[--n] = 0;
    const char *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path;
    if ((!strcmp(name, ".") || !strcmp(name, "..")) && realpath(path, whole)) name = strrchr(whole, '/') + 1;
    if (name[0] == '.')
        return err_param(e, E_RANGE, "publish", "%s would not be served: a daemon passes over names that begin with a dot", c->publish);
    if (model_name_check(name, &here)) return err_param(e, here.status, "publish", "%s would not be served: %s", c->publish, here.text);
    return OK;
}

int train_config_check(const struct train_config *c, struct err *e) {
    const struct arch *a = &c->desc.arch;
    struct err here = {0};
    if (arch_check(a, &here)) return err_param(e, here.status, here.param, "the network: %s", here.text);
    int side = a->input_size / a->patch_size;
    if (side > KERN_MAX_TOKENS || side * side > KERN_MAX_TOKENS)
        return err_param(e, E_RANGE, "size", "an input of %d in patches of %d is more than the %d tokens that attention takes", a->input_size, a->patch_size, KERN_MAX_TOKENS);
    if (c->objective.discrete && c->objective.learned_range != a->learn_sigma)
        return err_param(e, E_CONFLICT, "learn-sigma", "DiT's hybrid loss needs a network with a learned variance, and only it");
    if (objective_check(&c->objective, &here)) return err_param(e, here.status, here.param, "the objective: %s", here.text);
    if (check_publish(c, e)) return e->status;
    return check_step(c, e);
}

double train_config_lr(const struct train_config *c, int64_t step) {
    if (step < c->warmup) return c->lr * (double)(step + 1) / (double)c->warmup;
    if (c->schedule == LR_CONSTANT || c->steps <= c->warmup) return c->lr;
    double part = (double)(step - c->warmup) / (double)(c->steps - c->warmup), end = c->lr * c->lr_end;
    if (part > 1) part = 1;
    return end + (c->lr - end) * (c->schedule == LR_LINEAR ? 1 - part : 0.5 * (1 + cos(M_PI * part)));
}

static struct train_fact *add(struct train_fact *f, const char *name, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
static struct train_fact *add(struct train_fact *f, const char *name, const char *fmt, ...) {
    va_list args;
    f->name = name;
    va_start(args, fmt);
    vsnprintf(f->value, sizeof f->value, fmt, args);
    va_end(args);
    return f + 1;
}

void train_config_facts(const struct train_config *c, struct train_fact facts[TRAIN_FACTS]) {
    const struct arch *a = &c->desc.arch;
    const struct objective *o = &c->objective;
    struct train_fact *f = facts;
    char ema[96] = "";
    for (int i = 0, n = 0; i < c->n_ema; i++) n += snprintf(ema + n, sizeof ema - (size_t)n, "%s%.12g", i ? "," : "", c->ema[i]);
    f = add(f, "family", "%s", c->desc.family);
    f = add(f, "size", "%d", a->input_size);
    f = add(f, "patch", "%d", a->patch_size);
    f = add(f, "channels", "%d", a->in_channels);
    f = add(f, "width", "%d", a->hidden_size);
    f = add(f, "depth", "%d", a->depth);
    f = add(f, "heads", "%d", a->num_heads);
    f = add(f, "mlp-ratio", "%.12g", a->mlp_ratio);
    f = add(f, "classes", "%d", a->num_classes);
    f = add(f, "null-class", "%s", a->class_dropout ? "true" : "false");
    f = add(f, "learn-sigma", "%s", a->learn_sigma ? "true" : "false");
    f = add(f, "block", "%s", arch_block_name(a->block));
    f = add(f, "path", "%s", o->discrete ? "discrete" : path_name(o->path));
    f = add(f, "prediction", "%s", o->discrete ? "noise" : prediction_name(o->prediction));
    f = add(f, "weighting", "%s", weighting_name(o->weighting));
    f = add(f, "t-density", "%s", density_name(o->density));
    f = add(f, "t-mean", "%.12g", o->mean);
    f = add(f, "t-std", "%.12g", o->std);
    f = add(f, "dropout", "%.12g", o->drop);
    f = add(f, "flip", "%s", c->flip ? "true" : "false");
    f = add(f, "seed", "%llu", (unsigned long long)o->seed);
    f = add(f, "batch", "%d", c->batch);
    f = add(f, "ema", "%s", ema);
    f = add(f, "beta1", "%.12g", c->beta1);
    f = add(f, "beta2", "%.12g", c->beta2);
    add(f, "examples", "%lld", (long long)c->examples);
}
