// SPDX-License-Identifier: MIT
/*
 * dit_calibrate: where a back end multiplies e4m3 numbers with fixed scales, a few forward passes at load show it what sizes occur.
 *
 * The rows are noise, at times over the whole range of both kinds of networks (0 to 1; 0 to 999), with classes spread over the
 * table. Always the same rows, so a model's scales are the same at every start.
 */
#include "core/base/mem.h"
#include "core/model/dit_int.h"
#include "kernels/philox.h"

enum { ROWS = 8, PASSES = 8 }; // a scale grows at most eightfold a pass

// Rows r0 .. r0+n-1 of noise to the network's input.
static int noise(struct dit *m, int r0, int n, struct err *e) {
    size_t numel = (size_t)m->a.in_channels * (size_t)m->a.input_size * (size_t)m->a.input_size, count = numel * (size_t)n;
    float *x = mem_array(count, sizeof *x);
    if (!x) return err_set(e, E_NOMEM, "no memory for rows to calibrate with");
    for (size_t i = 0; i < count; i++) x[i] = philox_normal(1, (uint32_t)r0 + (uint32_t)(i / numel), 0, (uint32_t)(i % numel));
    int rc = m->k->upload(m->k, m->x, x, count * sizeof *x);
    mem_free(x);
    return rc ? dit_failed(m, rc, e) : OK;
}

static int passes(struct dit *m, struct err *e) {
    static const float t[ROWS] = {0, 0.35f, 0.7f, 1, 20, 300, 600, 999};
    int32_t y[ROWS];
    for (int r = 0; r < ROWS; r++) y[r] = r * m->a.num_classes / ROWS;
    for (int i = 0; i < PASSES; i++)
        for (int r = 0, n; r < ROWS; r += n) {
            n = ROWS - r < m->max_rows ? ROWS - r : m->max_rows;
            if (noise(m, r, n, e) || dit_forward(m, n, t + r, y + r, e)) return e->status;
        }
    return OK;
}

int dit_calibrate(struct dit *m, struct err *e) {
    int rc = m->k->calibrate(m->k, true);
    if (rc) return dit_failed(m, rc, e);
    int status = passes(m, e);
    rc = m->k->calibrate(m->k, false);
    return status == OK && rc ? dit_failed(m, rc, e) : status;
}
