// SPDX-License-Identifier: MIT
#include <getopt.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "core/base/mem.h"
#include "core/io/import.h"
#include "server/cmd.h"

static const char help[] =
    "usage: sitd inspect FILE|DIR\n\n"
    "Prints what a checkpoint (.pt, safetensors, a diffusers folder) or a model directory holds: its tensors, what it says of itself, and which\n"
    "network that is. What the file cannot prove is listed with the flag of `sitd import` that would tell.\n";

static int fail(const struct err *e) {
    fprintf(stderr, "sitd inspect: %s\n", e->text);
    return status_exit_code(e->status);
}

static void print_tensors(const struct tensor_table *table) {
    size_t bytes = 0, values = 0;
    int widest = 4;
    for (int i = 0; i < table->n; i++) {
        int n = (int)strlen(table->tensors[i].name);
        if (n > widest) widest = n < 60 ? n : 60;
        bytes += table->tensors[i].bytes;
        values += table->tensors[i].count;
    }
    printf("%d tensors, %zu values, %.1f MB\n", table->n, values, (double)bytes / 1e6);
    for (int i = 0; i < table->n; i++) {
        const struct tensor *t = &table->tensors[i];
        char shape[160];
        tensor_shape_text(t, shape, sizeof shape);
        printf("  %-*s  %-5s %s\n", widest, t->name, dtype_name(t->dtype), shape);
    }
}

static void print_facts(const struct import_fact *facts, int n) {
    for (int i = 0; i < n; i++) {
        if (facts[i].value[0]) printf("  %-18s %-10s from %s\n", facts[i].field, facts[i].value, facts[i].source);
        else printf("  %-18s %-10s not proven: %s would tell\n", facts[i].field, "?", facts[i].source);
    }
}

static int inspect_file(const char *path) {
    struct checkpoint c;
    struct model_desc d;
    struct import_fact facts[IMPORT_FACTS];
    struct import_flags none = {.step = -1};
    struct err e = {0};
    int n;
    if (checkpoint_open(&c, path, &e) != OK) return fail(&e);
    printf("%s: %s", path, c.format);
    if (c.chosen[0]) printf(", dictionary '%s'", c.chosen);
    printf("\n");
    print_tensors(&c.table);
    if (c.n_meta) printf("what the file says of itself\n");
    for (int i = 0; i < c.n_meta; i++) printf("  %-18s %s\n", c.meta[i].key, c.meta[i].value);
    if (import_describe(&d, facts, &n, &c, &none, &e) == OK) {
        printf("network\n");
        print_facts(facts, n);
    } else printf("network: not a DiT or SiT that sitd knows: %s\n", e.text);
    checkpoint_close(&c);
    return 0;
}

static void print_labels(const struct model_desc *d) {
    for (int i = 0; d->labels && i < d->arch.num_classes; i++) {
        printf("  label %-5d ", i);
        for (int k = 0; k < d->labels[i].n; k++) printf("%s%s", k ? ", " : "", d->labels[i].names[k]);
        printf("\n");
    }
}

// What not every model has.
static void print_variant(const struct model_desc *d) {
    const struct arch *a = &d->arch;
    if (a->block != BLOCK_ADALN_ZERO) printf("  block      %s\n", arch_block_name(a->block));
    if (a->decoder.depth)
        printf("  decoder    width %d, depth %d, heads %d\n", a->decoder.hidden_size, a->decoder.depth, a->decoder.num_heads);
    if (a->block_embedders) printf("  embedders  one a block\n");
    if (a->diffusers) printf("  compat     diffusers\n");
    if (a->reversed) printf("  time       reversed\n");
    if (d->latent.vae_file[0]) printf("  vae        %s\n", d->latent.vae_file);
    if (d->latent.scale > 0) printf("  latent     scale %g\n", d->latent.scale);
    if (d->latent.mean) printf("  latent     mean and std a channel\n");
    if (d->loss_curve) printf("  loss curve %d knots\n", d->n_loss_curve);
}

static int inspect_dir(const char *path) {
    struct model_dir m;
    struct err e = {0};
    if (model_dir_open(&m, path, &e) != OK) return fail(&e);
    const struct arch *a = &m.desc.arch;
    printf("%s: model directory, step %lld%s\n", path, (long long)m.desc.step, m.desc.is_default ? ", the default" : "");
    printf("  digest     %s\n  weights    %s\n", m.digest, m.desc.weights_file);
    printf("  family     %s\n", m.desc.family);
    if (m.desc.path[0]) printf("  path       %s\n  prediction %s\n", m.desc.path, m.desc.prediction);
    printf("  input      %d channels of %dx%d in patches of %dx%d\n", a->in_channels, a->input_size, a->input_size, a->patch_size,
           a->patch_size);
    printf("  network    width %d, depth %d, heads %d, MLP %g, learn_sigma %s\n", a->hidden_size, a->depth, a->num_heads,
           a->mlp_ratio, a->learn_sigma ? "true" : "false");
    print_variant(&m.desc);
    printf("  classes    %d%s\n", a->num_classes, a->class_dropout ? " and the null class" : "");
    if (m.desc.guide_channels < 0) printf("  guidance   all channels\n");
    else printf("  guidance   the first %d channels\n", m.desc.guide_channels);
    print_labels(&m.desc);
    print_tensors(m.weights);
    model_dir_close(&m);
    return 0;
}

int cmd_inspect(int argc, char **argv) {
    static const struct option options[] = {{"help", no_argument, NULL, 'h'}, {0}};
    for (int c; (c = getopt_long(argc, argv, "h", options, NULL)) != -1;) {
        if (c != 'h') return fputs(help, stderr), 2;
        return fputs(help, stdout) < 0;
    }
    if (optind + 1 != argc) return fputs(help, stderr), 2;
    char *described = mem_printf("%s/model.json", argv[optind]);
    bool is_dir = described && access(described, F_OK) == 0;
    mem_free(described);
    return is_dir ? inspect_dir(argv[optind]) : inspect_file(argv[optind]);
}
