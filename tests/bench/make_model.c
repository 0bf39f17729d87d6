// SPDX-License-Identifier: MIT
/*
 * make_model: a model directory of a published SiT's shape with random weights, and behind it, if asked for, a random VAE of the published shape:
 * something to load and to serve where no checkpoint can be had.
 * make-model DIR [S/2|B/2|L/2|XL/2] [vae]
 */
#include <stdio.h>
#include <string.h>

#include "core/io/checkpoint.h"
#include "core/io/import.h"
#include "core/io/model_publish.h"
#include "tests/published_vae.h"

static int add_vae(struct model_desc *d, const char *dir, struct err *e) {
    struct vae_file f = {.arch = published_vae, .scale = 0.18215};
    struct vae_weights w;
    if (vae_random(&w, &published_vae, 2, e)) return e->status;
    f.table = w.table;
    int rc = import_vae(d, dir, &f, e);
    vae_weights_free(&w);
    return rc;
}

static bool shape_arch(struct arch *a, const char *name) {
    size_t n = strlen(name);
    *a = (struct arch){.input_size = 32, .patch_size = 2, .in_channels = 4, .num_classes = 1000, .mlp_ratio = 4, .class_dropout = true,
                       .learn_sigma = true};
    return n > 2 && strcmp(name + n - 2, "/2") == 0 && arch_size(a, name, n - 2);
}

int main(int argc, char **argv) {
    struct model_desc d = {.family = "sit", .path = "linear", .prediction = "velocity", .guide_channels = 3, .step = 1};
    struct arch_weights w;
    struct err e = {0};
    if (argc < 2 || !shape_arch(&d.arch, argc > 2 ? argv[2] : "XL/2")) return fprintf(stderr, "make-model DIR [S/2|B/2|L/2|XL/2] [vae]\n"), 2;
    int rc = arch_random(&w, &d.arch, 1, &e);
    if (rc == OK && argc > 3) rc = add_vae(&d, argv[1], &e);
    if (rc == OK && argc > 3) d.latent.scale = 0.18215;
    if (rc == OK) rc = model_publish(argv[1], &d, &w.table, &e);
    if (rc != OK) fprintf(stderr, "make-model: %s\n", e.text);
    arch_weights_free(&w);
    return rc != OK;
}
