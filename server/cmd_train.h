// SPDX-License-Identifier: MIT
/*
 * sitd train in four files: what it was told (cmd_train_flags.c), which of several processes it is (cmd_train_ranks.c), the run
 * with its log (cmd_train.c), the page about it (cmd_train_report.c). Thread: main.
 */
#ifndef SITD_CMD_TRAIN_H
#define SITD_CMD_TRAIN_H
#include "core/train/config.h"
#include "core/train/data.h"
#include "core/train/parallel.h"
#include "core/train/trainer.h"
#include "server/options.h"

#define TRAIN_OPTIONS 80
#define TRAIN_TEXT OPTION_TEXT_SIZE

struct train_flags {
    char config[TRAIN_TEXT], model[TRAIN_TEXT], family[TRAIN_TEXT], block[TRAIN_TEXT], data[TRAIN_TEXT], vae[TRAIN_TEXT],
        labels[TRAIN_TEXT];
    char path[TRAIN_TEXT], prediction[TRAIN_TEXT], weighting[TRAIN_TEXT], density[TRAIN_TEXT], schedule[TRAIN_TEXT],
        ema[TRAIN_TEXT], out[TRAIN_TEXT];
    char resume[TRAIN_TEXT], init[TRAIN_TEXT], publish[TRAIN_TEXT], publish_when[TRAIN_TEXT], guide_channels[TRAIN_TEXT],
        backend[TRAIN_TEXT], precision[TRAIN_TEXT];
    char publish_storage[TRAIN_TEXT], recompute[TRAIN_TEXT], devices[TRAIN_TEXT];
    int64_t width, depth, heads, patch, classes, size, channels, steps, batch, microbatch, warmup, seed, save_every, keep,
        keep_every, publish_every;
    int64_t log_every, sample_every, sample_steps, sample_each, threads, data_threads;
    double mlp_ratio, t_mean, t_std, dropout, lr, lr_end, beta1, beta2, eps, decay, clip, guidance;
    bool learn_sigma, flip, publish_default;
    struct option_words words;
    unsigned char source[TRAIN_OPTIONS]; // PRIVATE
};

int train_flags_load(struct train_flags *, int argc, char **argv, bool *usage, struct err *);
int train_flags_devices(int *list, int most, const struct train_flags *, struct err *); // how many cards; E_RANGE, E_CONFLICT
void train_flags_print(const struct train_flags *, FILE *);
void train_help(FILE *);
// Opens the data, since sizes and classes may be its own, and fills the configuration, whose texts stay the flags' and the
// data's. On failure nothing is left to close; else data_close and model_desc_deinit(&config->desc). err.param is the option's
// name.
int train_flags_config(struct train_config *, struct data **, const struct train_flags *, struct err *);

struct train_ranks {
    struct parallel_spec spec;
    int start; // processes that are to be started here; this one then only watches over them
};
// device: this process's card
int train_ranks_find(struct train_ranks *, int *device, const struct train_flags *, struct err *);

// Writes OUT/report.html from OUT/log.jsonl and OUT/samples: self-contained, with curves and pictures. recipe: the options in
// force, as text.
int train_report(const char *out, const char *recipe, struct err *);

#endif
