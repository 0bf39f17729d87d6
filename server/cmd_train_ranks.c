// SPDX-License-Identifier: MIT
// Which of a run's processes this is, and its place among them.
#include <string.h>

#include "core/train/parallel.h"
#include "server/cmd_train.h"

// --devices names GPUs: they must be there
static int check_cards(const int *card, int n, const struct train_flags *f, struct err *e) {
    char why[256] = "";
    int there = kern_devices("cuda", why, sizeof why);
    if (strcmp(f->backend, "auto") != 0 && strcmp(f->backend, "cuda") != 0)
        return err_param(e, E_CONFLICT, "devices", "--devices %s names GPUs, the %s back end trains without", f->devices, f->backend);
    for (int i = 0; i < n; i++)
        if (card[i] >= there)
            return err_param(e, E_DEVICE, "devices", "--devices %s asks for GPU %d, there %s %d%s%s", f->devices, card[i], there == 1 ? "is" : "are",
                             there, there ? "" : ": ", there ? "" : why);
    return OK;
}

int train_ranks_find(struct train_ranks *r, int *device, const struct train_flags *f, struct err *e) {
    int cards[64] = {0}, n = 0;
    *r = (struct train_ranks){0};
    if (f->devices[0] && ((n = train_flags_devices(cards, 64, f, e)) < 0 || check_cards(cards, n, f, e))) return e->status;
    if (parallel_from_environment(&r->spec, e)) return e->status;
    *device = n ? cards[r->spec.local % n] : r->spec.local;
    r->start = r->spec.size == 1 ? n : 0;
    return OK;
}
