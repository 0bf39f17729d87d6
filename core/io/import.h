// SPDX-License-Identifier: MIT
/*
 * import: from a checkpoint, which tells half, to a model description, which tells all.
 *
 * Tensors prove shapes and, by their names, little else: a decoder means MaskDiT, projectors mean REPA's SiT (reversed time),
 * diffusers' layout means DiT. Otherwise DiT and SiT have the same keys, and neither path, prediction nor heads leave a trace.
 * What they do not prove is taken from, in this order, a flag, the checkpoint's own args, the published table of widths; then it
 * is missing, and the error names the flag that would tell. Thread: any (no globals).
 */
#ifndef SITD_IMPORT_H
#define SITD_IMPORT_H
#include "core/io/vae_file.h"

struct import_flags { // what the person said; zero or NULL: nothing
    const char *family, *path, *prediction, *time, *compat;
    int heads, decoder_heads, classes, input_size;
    int guide_channels; // -1 all
    int64_t step;       // -1: not said
    double latent_scale;                     // 0: not said
    const double *latent_mean, *latent_std;  // [n_mean], [n_std]
    int n_mean, n_std;
    const struct vae_file *vae;              // that will be imported too: its scale counts where no flag says one
};

struct import_fact {    // one line of the account that inspect prints
    const char *field;  // "num_heads"
    char value[64];     // "" when it could not be found out
    const char *source; // "the tensors", "--heads", "the file's args", ...; for a missing one the flag that would tell
};
enum { IMPORT_FACTS = 24 };

// Fills family, arch, path, prediction, guidance, latent scale and step of *d, and the account (always, as far as it came). A
// fact that is missing is left zero in *d: import_require refuses it. E_CONFLICT when the tensors are no DiT or SiT, or args or
// flags contradict them.
int import_describe(struct model_desc *d, struct import_fact facts[IMPORT_FACTS], int *n_facts, const struct checkpoint *,
                    const struct import_flags *, struct err *);
// Puts a VAE into the model's directory (made if absent), under diffusers' names whatever the source was, and names it in d->latent. To be called
// before model_publish. E_CONFLICT (param "--vae"): it does not fit the network; E_NONFINITE, E_IO, E_NOMEM.
int import_vae(struct model_desc *d, const char *dir, const struct vae_file *, struct err *);
// What the network's input means: latent = (z - shift)*scale. E_NOMEM.
int import_latent(struct model_desc *d, double scale, double shift, struct err *);
// E_CONFLICT with the flag in err.param if a fact is missing.
int import_require(const struct import_fact *facts, int n_facts, struct err *);

/*
 * The tensors of src that a network uses, with another dtype: DT_F32, DT_F16, DT_BF16, or DT_OTHER for each as it is (float64
 * becomes float32, no network needs more). Vectors and pos_embed stay float32: they are small, and they are added at full
 * precision. E_RANGE where a value is too large for float16. Free with import_free; tensors that need no change borrow src's
 * names and data.
 */
struct import_table {
    struct tensor_table table;
    void **owned; // PRIVATE
    int n_owned;
};
int import_convert(struct import_table *, const struct tensor_table *src, enum dtype, struct err *);
void import_free(struct import_table *);

#endif
