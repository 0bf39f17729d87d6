// SPDX-License-Identifier: MIT
/*
 * dit: the networks of DiT, SiT, MaskDiT and SD-DiT, forward.
 *
 * rows in, rows out: x [R, Cin, I, I], t [R] (fed raw to the embedder), y [R] label ids -> out [R, keep, I, I]. The null class is
 * num_classes in every family; a negative y adds no label vector (which for MaskDiT is the same thing, its null being the zero
 * vector). MaskDiT's network here is the raw F, its t is c_noise = ln(sigma)/4: the EDM preconditioning belongs to the sampler. A
 * model sees rows; it knows nothing of samplers. DiT paper sec. 3, code models.py; models-and-math 1 and 5. Thread: a dit belongs
 * to the thread that owns its kern. dit_forward allocates nothing.
 */
#ifndef SITD_DIT_H
#define SITD_DIT_H
#include "core/io/model_dir.h"
#include "kernels/kern.h"

struct dit;

// Loads weights into the back end (reordered) and reserves buffers for max_rows. The table may be freed afterwards. It is held
// against the arch and every weight is checked to be finite. keep: leading output channels to return, 1 to dit_channels(arch)
// (SiT samples with in_channels). err names the tensor.
int dit_new(struct dit **, struct kern *, const struct arch *, const struct tensor_table *, int keep, int max_rows, struct err *);
void dit_free(struct dit *);
int dit_channels(const struct arch *); // that the network puts out: in_channels, or twice that with learn_sigma

// Device buffers, filled by the caller (t and y through kern upload, x by gather). out rows are keep*I*I floats apart.
float *dit_x(struct dit *);   // [max_rows, Cin, I, I]
float *dit_out(struct dit *); // [max_rows, keep, I, I]
// Evaluates the first R rows: uploads t and y (host arrays), runs. 0 or a negative status with err set;
// E_RANGE for a label that the network's table does not hold.
int dit_forward(struct dit *, int R, const float *t, const int32_t *y, struct err *);

size_t dit_bytes(const struct dit *);  // memory held on the back end
double dit_flops(const struct arch *); // of one row's forward (2 x MAC), matrix products and attention

#endif
