// SPDX-License-Identifier: MIT
/*
 * model_dir: a model directory, and the model.json in it; model_publish.h writes one.
 *
 * model.json is the one file whose change means "there is a new version"; its SHA-256 is the version's digest and it holds the SHA-256
 * of the weights. Files are read, not mapped, and the bytes that were hashed are the bytes used. Format:
 *
 * { "format": 1, "family": "sit",                         // or "dit", "maskdit", "sd-dit"
 *   "architecture": {"input_size": 32, "patch_size": 4, "in_channels": 1, "hidden_size": 192, "depth": 8, "num_heads": 3,
 *                    "mlp_ratio": 4, "num_classes": 10, "class_dropout": true, "learn_sigma": true, // num_classes: required
 *                    "block": "adaln-zero",                 // optional; or "adaln", "cross-attention", "in-context"
 *                    "decoder": {"hidden_size": 512, "depth": 8, "num_heads": 16}, // maskdit, sd-dit; optional
 *                    "block_embedders": false},             // dit, optional
 *   "path": "linear", "prediction": "velocity",             // family "sit" only: linear|gvp|vp, velocity|noise|score
 *   "time": "forward",                                      // sit, optional; or "reversed": noise is at 1 inside the network
 *   "compat": "diffusers",                                  // dit, optional: diffusers' numbers instead of the authors'
 *   "guidance": {"channels": 3},                            // "all" or a count of leading channels
 *   "latent": {"vae": {"file": "vae.safetensors", "sha256": "..."}, // optional, and so is its vae
 *              "scale": 0.18215},                           // or "mean": [...], "std": [...], a number a channel
 *   "loss_curve": [[0, 1.9], [0.5, 0.7], [1, 1.1]],         // sit, optional: [t, velocity loss at t], t rising
 *   "labels": ["t-shirt", ["ankle boot", "boot"], ...],     // a name, or a name and its synonyms; or absent
 *   "default": true,                                        // optional: served when a request names no model
 *   "weights": {"file": "weights-00009034.safetensors", "sha256": "..."}, "step": 9034 }
 *
 * Unknown fields, duplicate keys, absurd sizes and a file name that leaves the directory are refused by name. Thread: any (no globals).
 */
#ifndef SITD_MODEL_DIR_H
#define SITD_MODEL_DIR_H
#include <stdbool.h>
#include <stdint.h>

#include "core/base/err.h"
#include "core/tensor/tensor.h"

// How timestep and label reach the blocks: the four designs of the DiT paper, sec. 3.2.
enum arch_block { BLOCK_ADALN_ZERO, BLOCK_ADALN, BLOCK_CROSS_ATTENTION, BLOCK_IN_CONTEXT, BLOCK_COUNT };

struct arch { // shape of a network of the DiT kind, and what its tensors mean
    int input_size, patch_size, in_channels, hidden_size, depth, num_heads, num_classes;
    double mlp_ratio;   // 4
    bool class_dropout; // there is a null class (index num_classes)
    bool learn_sigma;   // twice as many output channels
    enum arch_block block;
    struct { int hidden_size, depth, num_heads; } decoder; // MaskDiT's; depth 0: none. Same mlp_ratio; conditioned by vectors of the outer width
    bool one_hot;         // MaskDiT: the label table is Linear(num_classes -> hidden_size) without bias; the null class is the zero vector, no row
    bool block_embedders; // diffusers: every block embeds timestep and label by tensors of its own (their copies differ)
    bool diffusers;       // "compat": timestep frequencies 10000^(-i/127) and eps 1e-5 before the MLP
    bool reversed;        // the network's time is 1 - t: it was trained with noise at 1 (REPA, the SiT paper's direction)
    bool negated;         // and it predicts a velocity, whose sign turns with time
};

// What the network's input means when it is not pixels: the VAE's latent times scale, or (latent - mean)/std per channel.
struct latent {
    char vae_file[256], vae_sha256[65]; // "" when model.json names no VAE
    double scale;       // 0: not latents, or mean and std are given
    double *mean, *std; // [in_channels] or NULL, both or neither
};

struct loss_knot { double t, loss; }; // the measured velocity loss at t (SiT paper, w_t "kl-eta")

struct model_desc {
    char family[16]; // "sit", "dit", "maskdit", "sd-dit"
    struct arch arch;
    char path[16], prediction[16]; // "linear", "velocity": parsed by core/diffusion
    int guide_channels;            // leading channels; -1 all
    struct latent latent;
    struct loss_knot *loss_curve;  // [n_loss_curve] or NULL
    int n_loss_curve;
    struct { char **names; int n; } *labels; // [num_classes] or NULL: names[0] is the label, the rest synonyms
    bool is_default;
    char weights_file[256], weights_sha256[65];
    int64_t step;
};

#define DIGEST_HEX 65
int digest_hex(char hex[DIGEST_HEX], const void *bytes, size_t n); // SHA-256, lower-case hex
void digest_print(char hex[DIGEST_HEX], const unsigned char sha[32]);

// Parses and checks model.json's text. On failure nothing is left to free. err.param is the JSON field ("architecture.depth").
int model_desc_parse(struct model_desc *, const char *json, size_t len, struct err *);
void model_desc_deinit(struct model_desc *);
// Sets labels from a text: a JSON array as in model.json, or a line a class, its synonyms behind commas. arch.num_classes must be set. On failure
// model_desc_deinit still frees all.
int model_desc_labels(struct model_desc *, const char *text, size_t len, struct err *);
char *model_desc_dump(const struct model_desc *, struct err *); // JSON text; caller mem_free's
// Sizes that no network of ours has (zero, negative, products that overflow, more than 2^31 activations) are refused: err.param names the field.
int arch_check(const struct arch *, struct err *);
const char *arch_block_name(enum arch_block); // "adaln-zero"; borrowed
int arch_block_parse(const char *);           // enum arch_block, or -1
// Overwrites the fields that a recorded case's "config" (the authors' constructor arguments, JSON) names; other keys are not looked at.
int arch_parse_config(struct arch *, const char *json, struct err *);

// A model is called as its directory is. E_RANGE: a name that a request cannot ask for, a log cannot show or `name@version` cannot be taken
// apart from; the text says the rule.
#define MODEL_NAME_SIZE 64
int model_name_check(const char *name, struct err *);

struct model_dir {
    struct model_desc desc;
    char digest[DIGEST_HEX];         // of model.json
    struct tensor_table *weights;    // owned
    void *weights_owner;             // private
};
// Reads model.json alone; caller model_desc_deinit's. digest is set also when its text is refused, and "" when it cannot be read.
int model_dir_desc(struct model_desc *, char digest[DIGEST_HEX], const char *dir, struct err *);
// Reads model.json and its weights from the directory, checks the weights' digest. E_NOTFOUND, E_FORMAT, E_CONFLICT (digest). On failure nothing
// is left but the digest of the model.json that failed ("": it could not be read).
int model_dir_open(struct model_dir *, const char *dir, struct err *);
// The same in two: begin returns when the weights are read and parsed, while they are still being hashed; what is made of them may be used only
// after verify has said OK. Where something else is wrong with weights whose digest is wrong too, the digest is what both complain of.
int model_dir_begin(struct model_dir *, const char *dir, struct err *);
int model_dir_verify(const struct model_dir *, struct err *); // E_CONFLICT, E_NOMEM; may be asked again
void model_dir_close(struct model_dir *);
// One sample [in_channels, input_size, input_size] of the network to what its VAE decodes. z may be the sample itself.
void model_desc_to_vae(const struct model_desc *, float *z, const float *sample);

#endif
