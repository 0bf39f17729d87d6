// SPDX-License-Identifier: MIT
/*
 * cases: the one list of op cases. It drives the comparison with the reference, the bitwise tests and the timing, on every back
 * end.
 *
 * A case is an op with shapes. Opened on a back end with R rows it makes buffers and layers and fills the inputs from a generator
 * that depends on (case, buffer, id of the row): `id[place]` says which row's data stands at which place, so that the same row
 * can be computed in other company and its outputs compared byte by byte.
 */
#ifndef TESTS_OPS_CASES_H
#define TESTS_OPS_CASES_H
#include "kernels/kern.h"

enum op {
    OP_LINEAR,
    OP_VECTORS,
    OP_PATCHIFY,
    OP_UNPATCHIFY,
    OP_ADD_TABLE,
    OP_TIMESTEP,
    OP_CONDITION,
    OP_NORM,
    OP_GATE_NORM,
    OP_ATTENTION,
    OP_SET_TOKEN,
    OP_CROSS,
    OP_GATHER,
    OP_ROW_UPDATE,
    OP_ROW_NORM,
    OP_NET,
    OP_LINEAR_BACKWARD, // training from here on
    OP_VECTORS_BACKWARD,
    OP_NORM_BACKWARD,
    OP_GATE_NORM_BACKWARD,
    OP_ATTENTION_BACKWARD,
    OP_CROSS_BACKWARD,
    OP_TAKE_TOKEN,
    OP_CONDITION_BACKWARD,
    OP_UNPATCHIFY_BACKWARD,
    OP_MIX,
    OP_LOSS,
    OP_ADAMW
};

struct op_case {
    const char *name;
    enum op op;
    enum kern_dtype dtype;
    int T, C, N; // tokens, width in, width out (attention: H*D; images: T = side, C = channels in, N = channels kept or patch)
    int H;       // heads; OP_NET: and depth blocks of MLP width N; norms backward: 1 if all rows share their vectors
    int depth;
    enum kern_act act;
    enum kern_dtype w_store;
    bool x_f32, y_f32, save; // backward: act is of x, save: with db and dx, dgate
    double tol; // relative L2 error against the reference; 0: equal bytes
    bool bench;
};
extern const struct op_case op_cases[];
extern const int op_cases_n;

#define OP_BUFFERS 12
struct op_buffer {
    void *p;
    size_t row;  // elements a row
    size_t size; // bytes an element
    bool shared; // one for all rows
    bool out;    // compared
    bool act;    // of the back end's act type, else float32 (or int32)
    void *host;  // initial contents
    size_t bytes;
};
struct op_run {
    struct kern *k;
    const struct op_case *c;
    int R, lines; // lines: rows that the buffers hold (OP_VECTORS: a multiple of KERN_VEC)
    struct op_buffer b[OP_BUFFERS];
    int n;
    struct kern_linear *layers[4 * 64];
    int layers_n;
    void *desc; // row descriptors of the sampler ops
    double *norms;
};

int op_open(struct op_run *, struct kern *, const struct op_case *, int R, const int *id); // id NULL: 0, 1, 2 ..
int op_reset(struct op_run *);                                                             // uploads the initial contents again
int op_run(struct op_run *);
int op_read(struct op_run *, int buffer, void *host); // a whole buffer (op_bytes)
void op_close(struct op_run *);
double op_flops(const struct op_case *, int R);
double op_bytes_moved(const struct op_case *, int R);

/* between cases.c and cases_train.c, which has the training ops */
enum { ONCE = 1, OUT = 2, ACT = 4, INT = 8, ROUGH = 16, POSITIVE = 32, FAR = 64 }; // ROUGH: 30 times larger than the rest; POSITIVE: absolute values; FAR: 8 more
void *op_add(struct op_run *, size_t row, int flags, const int *id);     // a buffer; NULL without memory
int train_make(struct op_run *, const int *id);
int train_run(struct op_run *);
double train_flops(const struct op_case *, int R);
double train_bytes_moved(const struct op_case *, int R);
#endif
