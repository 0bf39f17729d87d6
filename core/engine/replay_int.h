// SPDX-License-Identifier: MIT
// What the replay files share and nobody else includes.
#ifndef SITD_REPLAY_INT_H
#define SITD_REPLAY_INT_H
#include "core/engine/replay.h"
#include "core/engine/runner.h"
#include "core/io/checkpoint.h"
#include "core/io/vae_file.h"
#include "core/model/dit.h"

struct replay {
    struct kern *k;
    int heads; // override, or 0
    bool is_dir;
    struct model_dir dir;   // is_dir
    struct checkpoint file; // else
    const struct tensor_table *weights;
    struct arch proven; // what the tensors tell
    bool is_vae;        // vae is open: the model is an autoencoder, or a model directory that names one
    struct vae_file vae;
    /* the network of the last case, kept while its shape and size serve */
    struct runner *runner;
    struct arch arch;
    int slots, rows;
};

// A case opened: its tensors as float32 where they are numbers.
struct recorded {
    struct checkpoint file;
    struct arch arch;
    int n;                   // images
    size_t numel, out_numel; // floats an image, an output
    float *x, *out, *ours;
    int32_t *y;
};
struct difference {
    double diff2, ref2, max;
    bool finite;
};

const char *replay_meta(const struct recorded *, const char *key); // "" if absent
int replay_number(double *out, const struct recorded *, const char *key, struct err *);
// A tensor as float32 in a new array (the old *out is freed). count 0: any number of elements.
int replay_tensor(float **out, struct recorded *, const char *name, size_t count, struct err *);
// Opens a case whose input images are in tensor `input`.
int recorded_open(struct recorded *, const struct replay *, const char *input, struct err *);
void recorded_close(struct recorded *);
void replay_compare(struct difference *, const float *ours, const float *recorded, size_t n);
void replay_conclude(struct replay_result *, const struct difference *, double tolerance);

// The case's metadata as a sampler's spec. The model directory, if there is one (else NULL), tells which channels are guided (else the
// authors' code does), and path and prediction where the case does not. E_UNSUPPORTED names a family or setting that is not known
// here. replay_spec.c
int replay_spec(struct sampler_spec *, struct sampler_model *, const struct recorded *, const struct model_desc *, struct err *);
int replay_forward(struct replay *, struct recorded *, struct replay_result *, struct err *); // replay_forward.c
int replay_train(struct replay *, struct recorded *, struct replay_result *, struct err *);   // replay_train.c
int replay_vae(struct replay *, struct recorded *, struct replay_result *, struct err *);     // replay_vae.c

#endif
