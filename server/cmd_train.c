// SPDX-License-Identifier: MIT
/*
 * sitd train: a training run as people see it.
 *
 * OUT/log.jsonl has a line each --log-every steps; a run that is continued first drops the lines behind the step at which it
 * continues, so that the file tells one history. A terminal shows one updating line, anything else a line of text for each of the
 * log's.
 */
#include "core/train/trainer.h"

#include <ctype.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/base/clock.h"
#include "core/base/mem.h"
#include "core/io/file.h"
#include "server/bar.h"
#include "server/cmd.h"
#include "server/cmd_train.h"

struct shown { // what the run's events go to
    const struct train_config *c;
    FILE *log;
    char *recipe; // the options in force
    bool bar, trouble;
    struct train_ranks *ranks;
};

static volatile sig_atomic_t stop;
static double stopped_at;

// A second signal ends the run at once. Not one that comes with the first: `timeout`, terminals and Slurm signal a process and its
// group, and the process that started the ranks passes on what it got.
static void on_signal(int number) {
    if (!stop) stop = 1, stopped_at = clock_seconds();
    else if (clock_seconds() - stopped_at > PARALLEL_ECHO) signal(number, SIG_DFL), raise(number);
}

static int fail(const struct err *e) {
    fprintf(stderr, "sitd train: %s\n", e->text);
    return status_exit_code(e->status);
}

/* ---- the log ---- */

// The lines up to a step stay.
static int cut_log(const char *path, int64_t step, struct err *e) {
    void *bytes;
    size_t n, kept = 0;
    struct err none = {0};
    int rc = file_read(&bytes, &n, path, (size_t)1 << 32, &none);
    if (rc == E_NOTFOUND) return OK;
    if (rc != OK) return err_set(e, rc, "%s", none.text);
    for (char *line = bytes, *end; (end = memchr(line, '\n', n - (size_t)(line - (char *)bytes))); line = end + 1) {
        static const char begins[] = "{\"step\":"; // not sscanf: it looks for the end of the whole text each time
        if ((size_t)(end - line) < sizeof begins || strncmp(line, begins, sizeof begins - 1) != 0) break;
        if (!isdigit((unsigned char)line[sizeof begins - 1]) || strtoll(line + sizeof begins - 1, NULL, 10) > step) break;
        kept = (size_t)(end + 1 - (char *)bytes);
    }
    if (kept < n) rc = file_write(path, bytes, kept, e);
    mem_free(bytes);
    return rc;
}

static int open_log(struct shown *s, int64_t step, struct err *e) {
    char path[OPTION_TEXT_SIZE + 32];
    snprintf(path, sizeof path, "%s/log.jsonl", s->c->out);
    if (cut_log(path, step, e)) return e->status;
    s->log = fopen(path, "ae");
    return s->log ? OK : err_set(e, E_IO, "%s cannot be written", path);
}

static void on_stats(void *ctx, const struct train_stats *st) {
    struct shown *s = ctx;
    fprintf(s->log,
            "{\"step\":%lld,\"epoch\":%.4f,\"loss\":%.9g,\"mse\":%.9g,\"vb\":%.9g,\"grad_norm\":%.6g,\"update_norm\":%.6g,\"lr\":"
            "%.6g,\"images_per_second\":%.6g",
            (long long)st->step, st->epoch, st->loss, st->mse, st->vb, st->grad_norm, st->update_norm, st->lr,
            st->images_per_second);
    if (st->mfu > 0) fprintf(s->log, ",\"mfu\":%.4f", st->mfu);
    fprintf(s->log, ",\"loss_by_time\":[");
    for (int i = 0; i < OBJECTIVE_BINS; i++) fprintf(s->log, "%s%.5g", i ? "," : "", st->loss_by_time[i]);
    fprintf(s->log, "]}\n");
    if (fflush(s->log) && !s->trouble)
        s->trouble = true, fprintf(stderr, "sitd train: log.jsonl cannot be written; the run goes on\n");
    if (s->bar) return;
    fprintf(stderr, "step %lld/%lld  loss %.5f  gradient %.3g  %.1f images/s", (long long)st->step, (long long)s->c->steps,
            st->loss, st->grad_norm, st->images_per_second);
    if (st->mfu > 0) fprintf(stderr, "  MFU %.0f %%", 100 * st->mfu);
    fprintf(stderr, "  %.0f s left\n", st->seconds_left);
}

static void on_step(void *ctx, int64_t step, double loss, double left) {
    struct shown *s = ctx;
    char text[96];
    if (!s->bar) return;
    snprintf(text, sizeof text, "step %lld/%lld  loss %.4f", (long long)step, (long long)s->c->steps, loss);
    bar_draw((double)step / (double)s->c->steps, text, left);
}

static void write_report(const struct shown *s) {
    struct err e = {0};
    if (train_report(s->c->out, s->recipe, &e)) fprintf(stderr, "%ssitd train: %s\n", s->bar ? "\n" : "", e.text);
}

static void on_note(void *ctx, enum train_note kind, int64_t step, const char *text) {
    struct shown *s = ctx;
    static const char *const what[] = {"checkpoint", "published to", "samples", "trouble:"};
    fprintf(stderr, "%sstep %lld: %s %s\n", s->bar ? "\r\033[K" : "", (long long)step, what[kind], text);
    if (kind == NOTE_PICTURES) write_report(s);
}

/* ---- the run ---- */

static char *recipe_of(const struct train_flags *f) {
    char *text = NULL;
    size_t n;
    FILE *to = open_memstream(&text, &n);
    if (!to) return NULL;
    train_flags_print(f, to);
    fclose(to);
    return text;
}

static int keep_recipe(const struct shown *s, struct err *e) {
    char path[OPTION_TEXT_SIZE + 32];
    snprintf(path, sizeof path, "%s/recipe.conf", s->c->out);
    return file_write(path, s->recipe, strlen(s->recipe), e);
}

static void watch_signals(void) {
    struct sigaction a = {.sa_handler = on_signal};
    sigemptyset(&a.sa_mask);
    sigaddset(&a.sa_mask, SIGTERM), sigaddset(&a.sa_mask, SIGINT);
    sigaction(SIGTERM, &a, NULL);
    sigaction(SIGINT, &a, NULL);
    signal(SIGPIPE, SIG_IGN);
}

static int run(struct shown *s, const struct data *data, struct err *e) {
    struct train_events on = {.ctx = s, .stats = on_stats, .step = on_step, .note = on_note}, none = {0};
    const bool first = s->ranks->spec.rank == 0; // it alone writes and speaks
    struct trainer *t;
    const struct data_info *info = data_info(data);
    watch_signals();
    int rc = file_make_dir(s->c->out, e);
    if (rc == OK) rc = trainer_new(&t, s->c, data, &s->ranks->spec, first ? &on : &none, e);
    if (rc != OK) return rc;
    if (!first) {
        rc = trainer_run(t, &stop, e);
        trainer_free(t);
        return rc;
    }
    fprintf(stderr, "%lld examples (%s), %d classes; %.2f million parameters; %s\n", (long long)info->n, info->kind,
            info->classes, (double)trainer_params(t) / 1e6, trainer_device(t));
    if (trainer_step(t)) fprintf(stderr, "continued at step %lld\n", (long long)trainer_step(t));
    rc = open_log(s, trainer_step(t), e);
    if (rc == OK) rc = keep_recipe(s, e);
    if (rc == OK) rc = trainer_run(t, &stop, e);
    if (s->bar) fprintf(stderr, "\n");
    if (s->log) fclose(s->log), write_report(s);
    if (rc == OK)
        printf("%s: %lld of %lld steps%s\n", s->c->out, (long long)trainer_step(t), (long long)s->c->steps,
               stop ? ", stopped: --resume auto continues" : "");
    trainer_free(t);
    return rc;
}

// Starts the processes of this host with the arguments of this one
static int start_ranks(int n, int argc, char **argv, struct err *e) {
    char **all = mem_array((size_t)argc + 2, sizeof *all);
    if (!all) return err_set(e, E_NOMEM, "no memory");
    all[0] = "sitd", all[1] = "train";
    for (int i = 1; i < argc; i++) all[i + 1] = argv[i];
    int rc = parallel_launch(all, n, e);
    mem_free(all);
    return rc;
}

int cmd_train(int argc, char **argv) {
    struct train_flags *f = mem_alloc(sizeof *f);
    struct train_config c;
    struct data *data;
    struct err e = {0};
    struct train_ranks ranks;
    bool usage = false;
    int device = 0;
    if (!f) return 1;
    int rc = train_flags_load(f, argc, argv, &usage, &e), code = 0;
    if (rc != OK) {
        code = fail(&e);
        if (usage) fprintf(stderr, "`sitd train --help` lists the options\n"), code = 2;
    } else if (f->words.help) train_help(stdout);
    else if (f->words.version) printf("sitd %s (%s)\n", sitd_version, sitd_commit);
    else if (f->words.print_config) train_flags_print(f, stdout);
    else if (train_ranks_find(&ranks, &device, f, &e)) code = fail(&e);
    else if (ranks.start > 1 && !f->words.check_config) code = start_ranks(ranks.start, argc, argv, &e) ? fail(&e) : 0;
    else if (train_flags_config(&c, &data, f, &e)) {
        code = fail(&e);
        if (e.status == E_CONFLICT && strcmp(e.param, "data")) code = 78; // options that contradict each other, not files
    } else {
        c.kern.device = device;
        struct shown s = {.c = &c, .recipe = recipe_of(f), .bar = isatty(STDERR_FILENO), .ranks = &ranks};
        if (!s.recipe) fprintf(stderr, "sitd train: no memory\n"), code = 1;
        else if (f->words.check_config)
            printf("the options and the data are fine: %lld examples\n", (long long)data_info(data)->n);
        else if (run(&s, data, &e)) code = fail(&e);
        free(s.recipe);
        model_desc_deinit(&c.desc);
        data_close(data);
    }
    mem_free(f);
    return code;
}
