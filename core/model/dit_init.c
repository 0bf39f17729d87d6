// SPDX-License-Identifier: MIT
/*
 * dit_init: what a network begins with (DiT models.py, initialize_weights; models-and-math 1.9): Xavier's uniform numbers in all
 * linear layers and the patch embedding, N(0, 0.02^2) in the label table and the timestep's layers, zeros in biases, the last
 * layer and its modulation, and in adaLN-Zero's modulation, so that each of its blocks is the identity. The other designs have no
 * public code: adaLN's modulation is a linear layer like others, affine norms are the identity.
 *
 * Numbers are Philox's, keyed by the seed and the tensor's number in its network's list, so that they depend neither on the order
 * in the flat array nor on threads. The draw is one that no training step has (core/train/objective.h).
 */
#include <math.h>
#include <string.h>

#include "core/io/checkpoint.h"
#include "core/model/dit_train_int.h"
#include "kernels/philox.h"

#define DRAW UINT32_MAX
#define SPREAD 0.02f

static void uniform(float *w, size_t n, float bound, uint64_t seed, uint32_t tensor) {
    for (size_t i = 0; i < n; i += 4) {
        uint32_t x[4] = {(uint32_t)(i / 4), DRAW, tensor, 1};
        philox_rounds(x, (uint32_t)seed, (uint32_t)(seed >> 32));
        for (size_t j = 0; j < 4 && i + j < n; j++) w[i + j] = bound * ((float)(x[j] >> 8) * 0x1p-23f - 1);
    }
}

static void normal(float *w, size_t n, uint64_t seed, uint32_t tensor) {
    for (size_t i = 0; i < n; i += 4) {
        float z[4];
        philox_normal4(seed, tensor, DRAW, (uint32_t)(i / 4), z);
        for (size_t j = 0; j < 4 && i + j < n; j++) w[i + j] = SPREAD * z[j];
    }
}

static void ones(float *w, size_t n) {
    for (size_t i = 0; i < n; i++) w[i] = 1;
}

static bool ends_in(const char *name, const char *end) { return strcmp(name + strlen(name) - strlen(end), end) == 0; }

static void begin(const struct arch *a, const struct dit_param *p, float *w, uint64_t seed, uint32_t tensor) {
    bool final = strncmp(p->name, "final_layer.", 12) == 0, modulation = strstr(p->name, "adaLN_modulation") != NULL;
    if (ends_in(p->name, ".bias")) return;
    if (strstr(p->name, "norm")) return ones(w, p->count);
    if (final || (modulation && a->block == BLOCK_ADALN_ZERO)) return;
    if (strstr(p->name, "t_embedder.") || strstr(p->name, "y_embedder.")) return normal(w, p->count, seed, tensor);
    double out = (double)p->shape[0], in = (double)p->count / out;
    uniform(w, p->count, (float)sqrt(6 / (in + out)), seed, tensor);
}

void dit_train_init(const struct dit_train *t, float *flat, uint64_t seed) {
    char name[64];
    int64_t shape[TENSOR_MAX_DIMS];
    bool fixed;
    memset(flat, 0, t->flat.floats * sizeof *flat);
    for (uint32_t i = 0; arch_tensor(&t->net->a, i, name, shape, &fixed); i++) {
        const struct dit_param *p = fixed ? NULL : dit_flat_find(&t->flat, name);
        if (p) begin(&t->net->a, p, flat + p->offset, seed, i);
    }
}
