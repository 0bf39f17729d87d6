// SPDX-License-Identifier: MIT
/*
 * pickle: a restricted unpickler. It turns the data.pkl of a torch.save archive into plain values and never runs anything.
 *
 * What a pickle calls (os.system, a class of the training code) is only a name here. The names that make tensors and containers
 * are known and built by pickle.c itself; names of modules that no checkpoint needs and attacks do (os, subprocess, builtins.eval
 * ...) are refused with the name in the error; all others become P_OPAQUE, a value that remembers its name and does nothing.
 * Whoever reads the values decides where an opaque one may stand. Thread: any (no globals).
 */
#ifndef SITD_PICKLE_H
#define SITD_PICKLE_H
#include <stddef.h>
#include <stdint.h>

#include "core/base/err.h"
#include "core/tensor/tensor.h"

enum pkind {
    P_NONE,
    P_BOOL,
    P_INT,
    P_REAL,
    P_STR,
    P_BYTES, // plain
    P_TUPLE,
    P_LIST,
    P_DICT,      // obj: items; a dict's are key, value, key, value (an OrderedDict is a P_DICT)
    P_NAMESPACE, // obj: argparse.Namespace, attributes as a dict's items
    P_GLOBAL,    // obj: a name used as a value; items are two P_STR, module and name
    P_OPAQUE,    // obj: what calling an unknown name would have given; the same two items
    P_STORAGE,   // obj: storage
    P_TENSOR,    // obj: tensor
    P_MARK,      // PRIVATE
};

struct pvalue {
    enum pkind kind;
    int known; // PRIVATE: P_GLOBAL: place in the list of known names, or 0
    union {
        int64_t i; // P_INT, P_BOOL
        double d;
        struct {
            const char *at;
            size_t n;
        } str; // borrowed from the pickle's bytes; not terminated, not
               // checked to be UTF-8
        struct pobj *obj;
    } u;
};

struct pstorage {
    const char *key; // the archive member data/KEY
    size_t key_len;
    enum dtype dtype;
    bool untyped;   // numel counts bytes
    uint64_t numel; // elements
};

struct ptensor { // a view of a storage, as the pickle says: nothing is checked against the storage yet
    struct pstorage storage;
    enum dtype dtype;
    int ndim;
    uint64_t offset;                                         // elements
    int64_t shape[TENSOR_MAX_DIMS], stride[TENSOR_MAX_DIMS]; // >= 0
};

struct pobj {
    struct pobj *next; // PRIVATE: all objects of a pickle
    struct pvalue *items;
    size_t n, cap;
    struct ptensor *tensor;   // P_TENSOR
    struct pstorage *storage; // P_STORAGE
};

struct pickle {
    struct pvalue root;
    struct pobj *all; // PRIVATE
};

// Bytes must outlive the pickle. On failure nothing is left to close. E_FORMAT, E_UNSUPPORTED, E_NOMEM.
int pickle_parse(struct pickle *, const void *bytes, size_t n, struct err *);
void pickle_close(struct pickle *);

// The value under a string key of a P_DICT or P_NAMESPACE (the last one, as Python would have it), or NULL.
const struct pvalue *pickle_get(const struct pvalue *dict, const char *key);
// For messages: "a list", "an object of 'numpy.core.multiarray scalar'".
void pickle_describe(const struct pvalue *, char *dst, size_t size);

#endif
