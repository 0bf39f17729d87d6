// SPDX-License-Identifier: MIT
/*
 * pickle
 *
 * A pickle is a program for a stack machine: opcodes push values, gather what lies above the last mark into a container, remember
 * values in a "memo", name a global (module and name), call it (REDUCE, NEWOBJ), and fill or build the result. CPython's
 * unpickler imports and calls whatever is named, so loading a pickle is running it. Here a global stays a name, and the only
 * "calls" are the few below that make tensors and containers. Protocols 2 to 5 are read (torch.save writes 2), without the text
 * opcodes of protocols 0 and 1.
 *
 * Why it ends and fits: each opcode takes at least one byte, pushes at most one value and makes at most one object, values are
 * shared by pointer (so the classic "billion laughs" of nested duplicates costs one reference each), a memo index may not be
 * larger than the number of opcodes so far, and all memory is counted against MAX_MEMORY. Nothing here recurses; deep or cyclic
 * values are as harmless as flat ones, since objects are freed from a list and readers look one level down at a time.
 */
#include "core/io/pickle.h"

#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include "core/base/mem.h"
#include "core/io/jsonio.h"

#define MAX_BYTES ((size_t)64 << 20)   // of the pickle; an XL model with its optimiser has about 300 KiB
#define MAX_MEMORY ((size_t)256 << 20) // of values
#define MAX_STACK ((size_t)1 << 20)
#define MAX_MARKS 1000 // nesting of containers being built
#define MAX_STRING ((size_t)1 << 24)
#define MAX_NAME 200 // bytes of a module's or a global's name

// --- the names that are known

enum role { UNKNOWN, ORDERED_DICT, NAMESPACE, TENSOR_V1, TENSOR_V2, TENSOR_V3, PARAMETER, SIZE, STORAGE, UNTYPED, DTYPE };

static const struct known {
    const char *module, *name;
    enum role role;
    enum dtype dtype;
} known[] = {
    {"", "", UNKNOWN, DT_OTHER},
    {"collections", "OrderedDict", ORDERED_DICT, DT_OTHER},
    {"collections", "defaultdict", ORDERED_DICT, DT_OTHER},
    {"argparse", "Namespace", NAMESPACE, DT_OTHER},
    {"torch._utils", "_rebuild_tensor", TENSOR_V1, DT_OTHER},
    {"torch._utils", "_rebuild_tensor_v2", TENSOR_V2, DT_OTHER},
    {"torch._utils", "_rebuild_tensor_v3", TENSOR_V3, DT_OTHER},
    {"torch._utils", "_rebuild_parameter", PARAMETER, DT_OTHER},
    {"torch._utils", "_rebuild_parameter_with_state", PARAMETER, DT_OTHER},
    {"torch", "Size", SIZE, DT_OTHER},
    {"torch", "FloatStorage", STORAGE, DT_F32},
    {"torch", "HalfStorage", STORAGE, DT_F16},
    {"torch", "BFloat16Storage", STORAGE, DT_BF16},
    {"torch", "DoubleStorage", STORAGE, DT_F64},
    {"torch", "LongStorage", STORAGE, DT_I64},
    {"torch", "IntStorage", STORAGE, DT_I32},
    {"torch", "ShortStorage", STORAGE, DT_I16},
    {"torch", "CharStorage", STORAGE, DT_I8},
    {"torch", "ByteStorage", STORAGE, DT_U8},
    {"torch", "BoolStorage", STORAGE, DT_BOOL},
    {"torch", "UntypedStorage", UNTYPED, DT_U8},
    {"torch.storage", "UntypedStorage", UNTYPED, DT_U8},
    {"torch", "float32", DTYPE, DT_F32},
    {"torch", "float16", DTYPE, DT_F16},
    {"torch", "bfloat16", DTYPE, DT_BF16},
    {"torch", "float64", DTYPE, DT_F64},
    {"torch", "int64", DTYPE, DT_I64},
    {"torch", "int32", DTYPE, DT_I32},
    {"torch", "int16", DTYPE, DT_I16},
    {"torch", "int8", DTYPE, DT_I8},
    {"torch", "uint8", DTYPE, DT_U8},
    {"torch", "bool", DTYPE, DT_BOOL},
};

// Modules that no checkpoint needs and that exploits of pickle name. Being named would be harmless here; it is refused so that
// the file's owner learns what it is. A name stands for its submodules too.
// clang-format off
static const char *const evil_modules[] = {
    "os", "posix", "nt", "subprocess", "commands", "sys", "shutil", "socket", "importlib", "imp", "runpy", "pty", "ctypes", "code",
    "codeop", "pickle", "_pickle", "cPickle", "dill", "cloudpickle", "marshal", "types", "operator", "_operator", "asyncio", "signal",
    "multiprocessing", "threading", "_thread", "tempfile", "webbrowser", "requests", "urllib", "urllib2", "http", "httplib", "ftplib",
    "smtplib", "pip", "bdb", "pdb", "timeit", "trace", "profile", "cProfile", "platform", "pydoc", "doctest", "linecache", "torch.hub",
    "torch.serialization", "numpy.testing",
};
// clang-format on
static const char *const tame_builtins[] = {"set",   "frozenset", "bytearray", "bytes", "complex", "slice",
                                            "range", "xrange",    "object",    "int",   "long",    "float",
                                            "str",   "unicode",   "bool",      "list",  "dict",    "tuple"};

static bool same(const struct pvalue *s, const char *text) {
    return s->u.str.n == strlen(text) && memcmp(s->u.str.at, text, s->u.str.n) == 0;
}

static bool is_evil(const struct pvalue *module, const struct pvalue *name) {
    if (same(module, "builtins") || same(module, "__builtin__")) {
        for (size_t i = 0; i < sizeof tame_builtins / sizeof *tame_builtins; i++)
            if (same(name, tame_builtins[i])) return false;
        return true;
    }
    for (size_t i = 0; i < sizeof evil_modules / sizeof *evil_modules; i++) {
        size_t n = strlen(evil_modules[i]);
        if (module->u.str.n >= n && memcmp(module->u.str.at, evil_modules[i], n) == 0 &&
            (module->u.str.n == n || module->u.str.at[n] == '.'))
            return true;
    }
    return false;
}

// --- the machine

struct vm {
    const unsigned char *start, *at, *end;
    struct pvalue *stack, *memo;
    size_t n, cap, memo_n, memo_cap;
    size_t memory, ops;
    int marks;
    bool stopped;
    struct pickle *out;
    struct err *e;
};

static int broken(struct vm *vm, const char *why) {
    return err_set(vm->e, E_FORMAT, "data.pkl: %s (at byte %zu)", why, (size_t)(vm->at - vm->start));
}

static int no_memory(struct vm *vm) { return err_set(vm->e, E_NOMEM, "no memory to read data.pkl"); }

static int charge(struct vm *vm, size_t bytes) {
    if (bytes > MAX_MEMORY - vm->memory) return broken(vm, "its values would need more than 256 MiB");
    vm->memory += bytes;
    return OK;
}

// Makes room for `more` values behind the n that are there.
static int reserve(struct vm *vm, struct pvalue **items, size_t *cap, size_t n, size_t more) {
    if (more <= *cap - n) return OK;
    size_t want = *cap * 2 > n + more ? *cap * 2 : n + more;
    int rc = charge(vm, (want - *cap) * sizeof **items);
    if (rc != OK) return rc;
    struct pvalue *grown = mem_resize(*items, want, sizeof **items);
    if (!grown) return no_memory(vm);
    *items = grown;
    *cap = want;
    return OK;
}

static int push(struct vm *vm, struct pvalue v) {
    if (vm->n >= MAX_STACK) return broken(vm, "its stack is deeper than 1048576 values");
    int rc = reserve(vm, &vm->stack, &vm->cap, vm->n, 1);
    if (rc == OK) vm->stack[vm->n++] = v;
    return rc;
}

static int pop(struct vm *vm, struct pvalue *v) {
    *v = (struct pvalue){.kind = P_NONE};
    if (vm->n == 0 || vm->stack[vm->n - 1].kind == P_MARK) return broken(vm, "an opcode finds no value on the stack");
    *v = vm->stack[--vm->n];
    return OK;
}

static int pop_mark(struct vm *vm, size_t *first) { // *first: the lowest value above the last mark, which is taken away
    size_t i = *first = vm->n;
    while (i > 0 && vm->stack[i - 1].kind != P_MARK) i--;
    if (i == 0) return broken(vm, "an opcode finds no mark on the stack");
    *first = i;
    vm->marks--;
    return OK;
}

static int new_obj(struct vm *vm, struct pvalue *v, enum pkind kind) {
    *v = (struct pvalue){.kind = P_NONE};
    int rc = charge(vm, sizeof(struct pobj));
    if (rc != OK) return rc;
    struct pobj *o = mem_alloc(sizeof *o);
    if (!o) return no_memory(vm);
    o->next = vm->out->all;
    vm->out->all = o;
    *v = (struct pvalue){.kind = kind, .u.obj = o};
    return OK;
}

static int extend(struct vm *vm, struct pobj *o, const struct pvalue *from, size_t n) {
    int rc = reserve(vm, &o->items, &o->cap, o->n, n);
    if (rc != OK) return rc;
    if (n) memcpy(o->items + o->n, from, n * sizeof *from);
    o->n += n;
    return OK;
}

static int push_obj(struct vm *vm, enum pkind kind, const struct pvalue *items, size_t n) {
    struct pvalue v;
    int rc = new_obj(vm, &v, kind);
    if (rc == OK) rc = extend(vm, v.u.obj, items, n);
    return rc == OK ? push(vm, v) : rc;
}

static int take(struct vm *vm, uint64_t n, const unsigned char **p) {
    *p = vm->at;
    if (n > (uint64_t)(vm->end - vm->at)) return broken(vm, "it ends inside an opcode");
    vm->at += n;
    return OK;
}

static int take_number(struct vm *vm, int bytes, uint64_t *v) { // little-endian, unsigned
    const unsigned char *p;
    int rc = take(vm, (uint64_t)bytes, &p);
    *v = 0;
    for (int i = bytes - 1; rc == OK && i >= 0; i--) *v = *v << 8 | p[i];
    return rc;
}

// --- opcodes that push something plain

static int push_int(struct vm *vm, int bytes, bool is_signed) {
    uint64_t v = 0;
    int rc = take_number(vm, bytes, &v);
    return rc == OK ? push(vm, (struct pvalue){.kind = P_INT, .u.i = is_signed ? (int32_t)(uint32_t)v : (int64_t)v}) : rc;
}

static int push_text(struct vm *vm, int len_bytes, enum pkind kind) {
    uint64_t n = 0;
    const unsigned char *p;
    int rc = take_number(vm, len_bytes, &n);
    if (rc == OK && n > MAX_STRING) rc = broken(vm, "a string has more than 16 MiB");
    if (rc == OK) rc = take(vm, n, &p);
    if (rc != OK) return rc;
    return push(vm, (struct pvalue){.kind = kind, .u.str = {(const char *)p, (size_t)n}});
}

static int push_long(struct vm *vm, int len_bytes) { // two's complement, any length
    uint64_t n = 0, v = 0;
    const unsigned char *p;
    int rc = take_number(vm, len_bytes, &n);
    if (rc == OK) rc = take(vm, n, &p);
    if (rc != OK) return rc;
    // No size or count is longer than 8 bytes: a longer number is kept as the bytes that it is.
    if (n > 8) return push(vm, (struct pvalue){.kind = P_BYTES, .u.str = {(const char *)p, (size_t)n}});
    if (n > 0 && p[n - 1] & 0x80) v = UINT64_MAX;
    for (uint64_t i = n; i > 0; i--) v = v << 8 | p[i - 1];
    return push(vm, (struct pvalue){.kind = P_INT, .u.i = (int64_t)v});
}

static int push_real(struct vm *vm) { // big-endian, unlike everything else
    const unsigned char *p;
    int rc = take(vm, 8, &p);
    if (rc != OK) return rc;
    uint64_t bits = 0;
    struct pvalue v = {.kind = P_REAL};
    for (int i = 0; i < 8; i++) bits = bits << 8 | p[i];
    memcpy(&v.u.d, &bits, 8);
    return push(vm, v);
}

// --- globals, calls

static int push_global(struct vm *vm, const struct pvalue *module, const struct pvalue *name) {
    const struct pvalue *parts[] = {module, name};
    struct pvalue both[2] = {*module, *name};
    for (int i = 0; i < 2; i++)
        if (parts[i]->kind != P_STR || parts[i]->u.str.n > MAX_NAME || !jsonio_plain(parts[i]->u.str.at, parts[i]->u.str.n))
            return broken(vm, "a global has no proper name");
    if (is_evil(module, name))
        return err_set(vm->e, E_UNSUPPORTED, "data.pkl names '%.*s.%.*s': this file wants to run code and is refused",
                       (int)module->u.str.n, module->u.str.at, (int)name->u.str.n, name->u.str.at);
    int rc = push_obj(vm, P_GLOBAL, both, 2);
    for (size_t i = 1; rc == OK && i < sizeof known / sizeof *known; i++)
        if (same(module, known[i].module) && same(name, known[i].name)) vm->stack[vm->n - 1].known = (int)i;
    return rc;
}

static int take_line(struct vm *vm, struct pvalue *s) {
    *s = (struct pvalue){.kind = P_NONE};
    const unsigned char *newline = memchr(vm->at, '\n', (size_t)(vm->end - vm->at));
    if (!newline) return broken(vm, "it ends inside a global's name");
    *s = (struct pvalue){.kind = P_STR, .u.str = {(const char *)vm->at, (size_t)(newline - vm->at)}};
    vm->at = newline + 1;
    return OK;
}

static int op_global(struct vm *vm) {
    struct pvalue module, name;
    int rc = take_line(vm, &module);
    if (rc == OK) rc = take_line(vm, &name);
    return rc == OK ? push_global(vm, &module, &name) : rc;
}

static int op_stack_global(struct vm *vm) {
    struct pvalue module, name;
    int rc = pop(vm, &name);
    if (rc == OK) rc = pop(vm, &module);
    return rc == OK ? push_global(vm, &module, &name) : rc;
}

static int op_persid(struct vm *vm) { // ("storage", torch.XStorage, key, location, numel)
    struct pvalue id, v = {.kind = P_NONE};
    int rc = pop(vm, &id);
    if (rc != OK) return rc;
    const struct pvalue *t = id.kind == P_TUPLE ? id.u.obj->items : NULL;
    if (!t || id.u.obj->n < 5 || t[0].kind != P_STR || !same(&t[0], "storage") || t[1].kind != P_GLOBAL || t[2].kind != P_STR ||
        t[4].kind != P_INT || t[4].u.i < 0)
        return broken(vm, "a persistent id is not (\"storage\", type, key, location, size)");
    const struct known *k = &known[t[1].known];
    if (k->role != STORAGE && k->role != UNTYPED) {
        char what[160];
        pickle_describe(&t[1], what, sizeof what);
        return err_set(vm->e, E_UNSUPPORTED, "data.pkl: a tensor's storage is %s, a type that sitd does not know", what);
    }
    if ((rc = charge(vm, sizeof(struct pstorage))) == OK) rc = new_obj(vm, &v, P_STORAGE);
    if (rc != OK) return rc;
    struct pstorage *s = v.u.obj->storage = mem_alloc(sizeof *s);
    if (!s) return no_memory(vm);
    *s = (struct pstorage){t[2].u.str.at, t[2].u.str.n, k->dtype, k->role == UNTYPED, (uint64_t)t[4].u.i};
    return push(vm, v);
}

static int read_dims(struct vm *vm, const struct pvalue *v, int64_t *dst, int *n) {
    if (v->kind != P_TUPLE && v->kind != P_LIST) return broken(vm, "a tensor's shape or stride is not a tuple");
    if (v->u.obj->n > TENSOR_MAX_DIMS) return broken(vm, "a tensor has more than 8 dimensions");
    *n = (int)v->u.obj->n;
    for (int i = 0; i < *n; i++) {
        const struct pvalue *d = &v->u.obj->items[i];
        if (d->kind != P_INT || d->u.i < 0) return broken(vm, "a tensor's shape or stride holds something else than sizes");
        dst[i] = d->u.i;
    }
    return OK;
}

static int build_tensor(struct vm *vm, const struct pvalue *args, enum role role) {
    size_t n = args->u.obj->n, least = role == TENSOR_V1 ? 4 : role == TENSOR_V2 ? 5 : 7;
    const struct pvalue *a = args->u.obj->items;
    struct ptensor t = {.ndim = 0};
    struct pvalue v = {.kind = P_NONE};
    int strides = 0;
    if (n < least || a[0].kind != P_STORAGE || a[1].kind != P_INT || a[1].u.i < 0)
        return broken(vm, "a tensor is not made of (storage, offset, shape, stride, ...)");
    t.storage = *a[0].u.obj->storage;
    t.offset = (uint64_t)a[1].u.i;
    t.dtype = t.storage.dtype;
    if (role == TENSOR_V3) {
        if (a[6].kind != P_GLOBAL) return broken(vm, "a tensor's dtype is not a name");
        t.dtype = known[a[6].known].role == DTYPE ? known[a[6].known].dtype : DT_OTHER;
    }
    int rc = read_dims(vm, &a[2], t.shape, &t.ndim);
    if (rc == OK) rc = read_dims(vm, &a[3], t.stride, &strides);
    if (rc == OK && strides != t.ndim) rc = broken(vm, "a tensor has not as many strides as dimensions");
    if (rc == OK && (rc = charge(vm, sizeof t)) == OK) rc = new_obj(vm, &v, P_TENSOR);
    if (rc != OK) return rc;
    if (!(v.u.obj->tensor = mem_dup(&t, sizeof t))) return no_memory(vm);
    return push(vm, v);
}

static int push_opaque(struct vm *vm, const struct pvalue *callee) {
    if (callee->kind != P_GLOBAL && callee->kind != P_OPAQUE) return broken(vm, "it calls something that is not a name");
    return push_obj(vm, P_OPAQUE, callee->u.obj->items, 2);
}

static int call(struct vm *vm, const struct pvalue *f, const struct pvalue *args) {
    enum role role = f->kind == P_GLOBAL ? known[f->known].role : UNKNOWN;
    if (args->kind != P_TUPLE) return broken(vm, "it calls a name with something else than a tuple");
    const struct pobj *a = args->u.obj;
    switch (role) {
    case ORDERED_DICT:
        return push_obj(vm, P_DICT, NULL, 0);
    case NAMESPACE:
        return push_obj(vm, P_NAMESPACE, NULL, 0);
    case TENSOR_V1:
    case TENSOR_V2:
    case TENSOR_V3:
        return build_tensor(vm, args, role);
    case PARAMETER:
        return a->n > 0 && a->items[0].kind == P_TENSOR ? push(vm, a->items[0])
                                                        : broken(vm, "a parameter is made of something else than a tensor");
    case SIZE:
        return a->n == 1 && (a->items[0].kind == P_TUPLE || a->items[0].kind == P_LIST) ? push(vm, a->items[0])
                                                                                        : push_opaque(vm, f);
    default:
        return push_opaque(vm, f);
    }
}

static int op_call(struct vm *vm,
                   int extra) { // extra: operands above the arguments that do not matter here (NEWOBJ_EX's keywords)
    struct pvalue f, args, ignored;
    int rc = OK;
    while (extra-- > 0 && rc == OK) rc = pop(vm, &ignored);
    if (rc == OK) rc = pop(vm, &args);
    if (rc == OK) rc = pop(vm, &f);
    return rc == OK ? call(vm, &f, &args) : rc;
}

// A Namespace takes its attributes; what a dict (OrderedDict's _metadata) or an opaque thing is told is dropped.
static int op_build(struct vm *vm) {
    struct pvalue state, target;
    int rc = pop(vm, &state);
    if (rc == OK) rc = pop(vm, &target);
    if (rc == OK && target.kind == P_NAMESPACE && state.kind == P_DICT)
        rc = extend(vm, target.u.obj, state.u.obj->items, state.u.obj->n);
    return rc == OK ? push(vm, target) : rc;
}

// --- containers

static int op_gather(struct vm *vm, enum pkind kind) { // everything above the mark becomes one container
    size_t first;
    struct pvalue v = {.kind = P_NONE};
    int rc = pop_mark(vm, &first);
    if (rc == OK && kind == P_DICT && (vm->n - first) % 2) rc = broken(vm, "a dictionary has a key without a value");
    if (rc == OK) rc = new_obj(vm, &v, kind);
    if (rc == OK) rc = extend(vm, v.u.obj, vm->stack + first, vm->n - first);
    if (rc != OK) return rc;
    vm->n = first - 1;
    return push(vm, v);
}

static int op_tuple(struct vm *vm, size_t n) {
    struct pvalue items[3];
    int rc = OK;
    for (size_t i = n; i > 0 && rc == OK; i--) rc = pop(vm, &items[i - 1]);
    return rc == OK ? push_obj(vm, P_TUPLE, items, n) : rc;
}

// Adds the values from `first` on to the container below them (and below the mark, if there is one).
static int add_to(struct vm *vm, size_t first, size_t below, enum pkind kind) {
    if (below == 0 || vm->stack[below - 1].kind == P_MARK) return broken(vm, "an opcode finds no container on the stack");
    struct pvalue target = vm->stack[below - 1];
    int rc = OK;
    if (kind == P_DICT && (vm->n - first) % 2) return broken(vm, "a dictionary has a key without a value");
    if (target.kind == kind) rc = extend(vm, target.u.obj, vm->stack + first, vm->n - first);
    else if (target.kind != P_OPAQUE) rc = broken(vm, "it adds items to something that is no container");
    vm->n = below;
    return rc;
}

static int op_add_few(struct vm *vm, size_t n, enum pkind kind) {
    for (size_t i = 1; i <= n; i++)
        if (vm->n < i || vm->stack[vm->n - i].kind == P_MARK) return broken(vm, "an opcode finds no value on the stack");
    return add_to(vm, vm->n - n, vm->n - n, kind);
}

static int op_add_many(struct vm *vm, enum pkind kind) {
    size_t first;
    int rc = pop_mark(vm, &first);
    return rc == OK ? add_to(vm, first, first - 1, kind) : rc;
}

// --- memo, stack

static int memo_put(struct vm *vm, uint64_t i) {
    if (vm->n == 0 || vm->stack[vm->n - 1].kind == P_MARK) return broken(vm, "an opcode finds no value on the stack");
    if (i > vm->ops) return broken(vm, "a memo index is larger than any that could have been given so far");
    if (i >= vm->memo_n) {
        int rc = reserve(vm, &vm->memo, &vm->memo_cap, vm->memo_n, (size_t)i + 1 - vm->memo_n);
        if (rc != OK) return rc;
        while (vm->memo_n <= i) vm->memo[vm->memo_n++] = (struct pvalue){.kind = P_MARK}; // not set
    }
    vm->memo[i] = vm->stack[vm->n - 1];
    return OK;
}

static int op_put(struct vm *vm, int bytes) {
    uint64_t i;
    int rc = take_number(vm, bytes, &i);
    return rc == OK ? memo_put(vm, i) : rc;
}

static int op_get(struct vm *vm, int bytes) {
    uint64_t i;
    int rc = take_number(vm, bytes, &i);
    if (rc != OK) return rc;
    if (i >= vm->memo_n || vm->memo[i].kind == P_MARK) return broken(vm, "it asks the memo for something that is not there");
    return push(vm, vm->memo[i]);
}

static int op_mark(struct vm *vm) {
    if (++vm->marks > MAX_MARKS) return broken(vm, "it is nested deeper than 1000 levels");
    return push(vm, (struct pvalue){.kind = P_MARK});
}

static int op_pop(struct vm *vm) {
    if (vm->n == 0) return broken(vm, "an opcode finds no value on the stack");
    if (vm->stack[--vm->n].kind == P_MARK) vm->marks--;
    return OK;
}

static int op_pop_mark(struct vm *vm) {
    size_t first;
    int rc = pop_mark(vm, &first);
    if (rc == OK) vm->n = first - 1;
    return rc;
}

static int op_dup(struct vm *vm) {
    struct pvalue v;
    int rc = pop(vm, &v);
    if (rc == OK) rc = push(vm, v);
    return rc == OK ? push(vm, v) : rc;
}

static int op_stop(struct vm *vm) {
    int rc = pop(vm, &vm->out->root);
    if (rc == OK && vm->n != 0) rc = broken(vm, "values are left on the stack at the end");
    vm->stopped = rc == OK;
    return rc;
}

static int op_frame(struct vm *vm) { // only a hint for readers of streams
    uint64_t n;
    int rc = take_number(vm, 8, &n);
    return rc == OK && n > (uint64_t)(vm->end - vm->at) ? broken(vm, "a frame reaches beyond the end") : rc;
}

// clang-format off
static int step(struct vm *vm) {
    char why[64];
    uint64_t ignored;
    unsigned char op = *vm->at++;
    switch (op) {
    case 0x80: return take_number(vm, 1, &ignored); // PROTO again
    case 0x95: return op_frame(vm);
    case '.': return op_stop(vm);
    case '(': return op_mark(vm);
    case '0': return op_pop(vm);
    case '1': return op_pop_mark(vm);
    case '2': return op_dup(vm);
    case 'N': return push(vm, (struct pvalue){.kind = P_NONE});
    case 0x88: return push(vm, (struct pvalue){.kind = P_BOOL, .u.i = 1});
    case 0x89: return push(vm, (struct pvalue){.kind = P_BOOL, .u.i = 0});
    case 'J': return push_int(vm, 4, true);
    case 'K': return push_int(vm, 1, false);
    case 'M': return push_int(vm, 2, false);
    case 0x8a: return push_long(vm, 1);
    case 0x8b: return push_long(vm, 4);
    case 'G': return push_real(vm);
    case 'X': return push_text(vm, 4, P_STR);
    case 0x8c: return push_text(vm, 1, P_STR);
    case 0x8d: return push_text(vm, 8, P_STR);
    case 'U': return push_text(vm, 1, P_STR); // Python 2's str
    case 'T': return push_text(vm, 4, P_STR);
    case 'C': return push_text(vm, 1, P_BYTES);
    case 'B': return push_text(vm, 4, P_BYTES);
    case 0x8e:
    case 0x96: return push_text(vm, 8, P_BYTES);
    case ']': return push_obj(vm, P_LIST, NULL, 0);
    case ')': return push_obj(vm, P_TUPLE, NULL, 0);
    case '}': return push_obj(vm, P_DICT, NULL, 0);
    case 0x8f: return push_obj(vm, P_LIST, NULL, 0); // a set: order and duplicates do not matter here
    case 'l': return op_gather(vm, P_LIST);
    case 't': return op_gather(vm, P_TUPLE);
    case 'd': return op_gather(vm, P_DICT);
    case 0x91: return op_gather(vm, P_LIST); // frozenset
    case 0x85: return op_tuple(vm, 1);
    case 0x86: return op_tuple(vm, 2);
    case 0x87: return op_tuple(vm, 3);
    case 'a': return op_add_few(vm, 1, P_LIST);
    case 's': return op_add_few(vm, 2, P_DICT);
    case 'e':
    case 0x90: return op_add_many(vm, P_LIST);
    case 'u': return op_add_many(vm, P_DICT);
    case 'c': return op_global(vm);
    case 0x93: return op_stack_global(vm);
    case 'R':
    case 0x81: return op_call(vm, 0); // NEWOBJ is, for the classes that are known here, the same as calling them
    case 0x92: return op_call(vm, 1);
    case 'b': return op_build(vm);
    case 'Q': return op_persid(vm);
    case 'q': return op_put(vm, 1);
    case 'r': return op_put(vm, 4);
    case 0x94: return memo_put(vm, vm->memo_n);
    case 'h': return op_get(vm, 1);
    case 'j': return op_get(vm, 4);
    default: snprintf(why, sizeof why, "opcode 0x%02x is not one that torch.save writes", op);
        return broken(vm, why);
    }
}
// clang-format on

int pickle_parse(struct pickle *p, const void *bytes, size_t n, struct err *e) {
    *p = (struct pickle){0};
    struct vm vm = {.start = bytes, .at = bytes, .out = p, .e = e};
    vm.end = vm.start + n;
    if (n > MAX_BYTES) return err_set(e, E_FORMAT, "data.pkl has more than 64 MiB");
    if (n < 2 || vm.at[0] != 0x80) return broken(&vm, "it does not begin with a protocol number of 2 or more");
    if (vm.at[1] < 2 || vm.at[1] > 5) return broken(&vm, "its protocol is not one of 2 to 5");
    int rc = OK;
    for (vm.at += 2; rc == OK && !vm.stopped; vm.ops++) rc = vm.at < vm.end ? step(&vm) : broken(&vm, "it ends without STOP");
    if (rc == OK && vm.at != vm.end) rc = broken(&vm, "bytes are left behind STOP");
    mem_free(vm.stack);
    mem_free(vm.memo);
    if (rc != OK) pickle_close(p);
    return rc;
}

void pickle_close(struct pickle *p) {
    for (struct pobj *o = p->all, *next; o; o = next) {
        next = o->next;
        mem_free(o->items);
        mem_free(o->tensor);
        mem_free(o->storage);
        mem_free(o);
    }
    *p = (struct pickle){0};
}

const struct pvalue *pickle_get(const struct pvalue *dict, const char *key) {
    if (dict->kind != P_DICT && dict->kind != P_NAMESPACE) return NULL;
    for (size_t i = dict->u.obj->n; i >= 2; i -= 2) {
        const struct pvalue *pair = dict->u.obj->items + i - 2;
        if (pair->kind == P_STR && same(pair, key)) return pair + 1;
    }
    return NULL;
}

void pickle_describe(const struct pvalue *v, char *dst, size_t size) {
    static const char *const kinds[] = {"None",     "a bool",       "an integer", "a float",      "a string",
                                        "bytes",    "a tuple",      "a list",     "a dictionary", "an argparse.Namespace",
                                        "the name", "an object of", "a storage",  "a tensor",     "a mark"};
    if (v->kind != P_GLOBAL && v->kind != P_OPAQUE) {
        snprintf(dst, size, "%s", kinds[v->kind]);
        return;
    }
    const struct pvalue *m = v->u.obj->items;
    snprintf(dst, size, "%s '%.*s.%.*s'", kinds[v->kind], (int)m[0].u.str.n, m[0].u.str.at, (int)m[1].u.str.n, m[1].u.str.at);
}
