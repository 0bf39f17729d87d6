// SPDX-License-Identifier: MIT
/*
 * safetensors: reader and writer of the safetensors format, from and to memory; of a large file also the header alone.
 *
 * The rules are on top of safetensors.c. Tables point into the bytes given: those stay the caller's and must outlive the table.
 * Thread: any.
 */
#ifndef SITD_SAFETENSORS_H
#define SITD_SAFETENSORS_H
#include "core/io/file.h"
#include "core/tensor/tensor.h"

struct meta_pair {
    char *key, *value;
}; // a line of a file's own description; UTF-8 without control characters in the key

struct safetensors {
    struct tensor_table table; // in the order of the file's bytes
    struct meta_pair *meta;    // __metadata__
    int n_meta;
    char *text;   // PRIVATE: names, keys and values
    size_t begin; // PRIVATE: of the tensors' bytes in the file; read_header only
};
// E_FORMAT with the tensor's name in err.param, E_NOMEM. On failure nothing is left to close.
int safetensors_parse(struct safetensors *, const void *bytes, size_t n, struct err *);
// The same of an open file of which only the header is read: every tensor's data is NULL, its bytes are in the file at
// safetensors_place. E_IO too.
int safetensors_read_header(struct safetensors *, const struct file_in *, struct err *);
size_t safetensors_place(const struct safetensors *, const struct tensor *); // a tensor of its table
void safetensors_close(struct safetensors *);

// Writes a table by the same rules through `sink` (called several times, in order; non-zero stops and is returned). Tensors go
// by falling element size, then by name, so that every tensor is aligned. E_UNSUPPORTED for DT_OTHER, E_FORMAT for a duplicate
// name.
int safetensors_write(const struct tensor_table *, const struct meta_pair *meta, int n_meta,
                      int (*sink)(void *ctx, const void *bytes, size_t n, struct err *), void *ctx, struct err *);

#endif
