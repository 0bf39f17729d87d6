// SPDX-License-Identifier: MIT
/*
 * config: everything that decides a training run, as plain values, and what of it a checkpoint must agree with. Thread: read-only
 * once filled.
 */
#ifndef SITD_TRAIN_CONFIG_H
#define SITD_TRAIN_CONFIG_H
#include "core/io/model_dir.h"
#include "core/model/dit_train.h"
#include "core/train/objective.h"

enum schedule_kind { LR_CONSTANT, LR_COSINE, LR_LINEAR }; // after the warm-up, to lr*lr_end at the last step

struct train_config {
    /* network and objective. desc: what is published; its arch, family, path and prediction are those trained */
    struct model_desc desc;
    struct objective objective;
    bool flip; // of the data's pictures
    /* step */
    int64_t steps;
    int64_t examples; // of the data: their order depends on it
    int batch, microbatch; // microbatch 0: the whole batch
    enum dit_recompute recompute;
    double lr, lr_end, beta1, beta2, eps, decay, clip; // lr_end: part of lr. clip 0: none
    enum schedule_kind schedule;
    int64_t warmup;
    int n_ema;
    double ema[KERN_MAX_EMA]; // the first is the one that is sampled and published
    /* files */
    const char *out;                // folder of the run
    int64_t save_every, keep_every; // steps; 0: only at the end, keep none for ever
    int keep;                       // newest checkpoints
    const char *publish;            // model directory, or NULL
    int64_t publish_every;          // steps
    bool publish_improved;          // only when the mean loss since the last publication is the lowest
    enum dtype publish_storage;     // of published matrices: DT_F32, DT_F16, DT_BF16 (import_convert)
    const char *vae;                // for the pictures of latents, or NULL
    const char *resume, *init;      // a checkpoint, "auto", or NULL; a checkpoint for fine-tuning, or NULL
    /* what people see */
    int64_t log_every, sample_every; // steps; 0: no pictures
    int sample_steps, sample_each;   // of the sampler; pictures a class
    double sample_guidance;
    /* machine */
    struct kern_config kern;
    int data_threads;
};

// Ranges and combinations; err.param is the option's name ("batch").
int train_config_check(const struct train_config *, struct err *);
double train_config_lr(const struct train_config *, int64_t step); // of the step, counted from 0

// What a run that continues another must have in common with it, by the options' names; checkpoints record it.
struct train_fact {
    const char *name;
    char value[96];
};
#define TRAIN_FACTS 26 // the last is missing in older files
void train_config_facts(const struct train_config *, struct train_fact facts[TRAIN_FACTS]);

#endif
