// SPDX-License-Identifier: MIT
/*
 * model_publish: writes a version of a model into its directory, so that a daemon that serves it, or starts at any moment, finds
 * either the old version or the new one, whole. What the trainer and `sitd import` write goes through here. Thread: any, one
 * writer a directory.
 */
#ifndef SITD_MODEL_PUBLISH_H
#define SITD_MODEL_PUBLISH_H
#include "core/io/model_dir.h"

/*
 * Writes the weights under a name that no model.json has (weights-<step>.safetensors, if need be with part of their digest), then
 * model.json; each under a temporary name, synced, renamed, the directory synced. dir is made if absent. desc's weights_file and
 * weights_sha256 are filled in, desc.step is the version. The VAE that desc.latent names must be there. Then removes weights
 * files of its own naming that no model.json has named for ten minutes, and temporary files of writers that were killed. On
 * failure (E_IO: the disk is full, ...; E_NONFINITE and E_CONFLICT: weights that no daemon would load; what model_desc_parse
 * refuses) the old version is what a reader finds; weights that were written already are removed, at the latest by a later publication.
 */
int model_publish(const char *dir, struct model_desc *, const struct tensor_table *, struct err *);

#endif
