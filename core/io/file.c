// SPDX-License-Identifier: MIT
#include "core/io/file.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "core/base/fault.h"
#include "core/base/mem.h"
#include "kernels/kern.h"

#define CHUNK ((size_t)1 << 30) // read(2) and write(2) move at most 2 GiB - 4 KiB at once

static int fail(struct err *e, int code, const char *verb, const char *path) {
    int status = code == ENOENT || code == ENOTDIR ? E_NOTFOUND : code == EACCES || code == EPERM ? E_PERM : E_IO;
    char why[128];
    return err_set(e, status, "cannot %s %s: %s", verb, path, strerror_r(code, why, sizeof why));
}

static ssize_t read_some(int fd, void *dst, size_t n, size_t at) {
    if (fault_hit(FAULT_READ)) {
        errno = EIO;
        return -1;
    }
    return pread(fd, dst, n < CHUNK ? n : CHUNK, (off_t)at);
}

// Bytes [at, end) of the file, fewer where it ends before: then *at stops there. 0 or errno
static int read_span(int fd, char *dst, size_t *at, size_t end) {
    while (*at < end) {
        ssize_t got = read_some(fd, dst + *at, end - *at, *at);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return errno;
        if (got == 0) break;
        *at += (size_t)got;
    }
    return 0;
}

/*
 * Several threads read a large file: one alone copies it out of the system's cache at 2 to 5 GB/s, most of it spent on pages that nobody
 * has touched yet.
 */
#define LARGE ((size_t)64 << 20)
#define PIECE ((size_t)8 << 20)
#define READERS 4

struct reading {
    int fd;
    char *dst;
    size_t n;
    atomic_size_t next; // piece
    atomic_int code;    // of the first failure; -1: the file is shorter than it was
};

static void *read_pieces(void *arg) {
    struct reading *r = arg;
    for (size_t at; !atomic_load(&r->code) && (at = atomic_fetch_add(&r->next, 1) * PIECE) < r->n;) {
        size_t end = r->n - at < PIECE ? r->n : at + PIECE;
        int none = 0, code = read_span(r->fd, r->dst, &at, end);
        if (!code && at < end) code = -1;
        if (code) atomic_compare_exchange_strong(&r->code, &none, code);
    }
    return NULL;
}

static int read_large(int fd, char *dst, size_t n) {
    struct reading r = {.fd = fd, .dst = dst, .n = n};
    pthread_t threads[READERS];
    int helpers = 0, want = kern_threads_allowed() - 1;
    size_t page = (size_t)dst % 4096; // huge pages where the system has them to give: fewer first touches
    (void)madvise(dst + (page ? 4096 - page : 0), n - 4096, MADV_HUGEPAGE);
    while (helpers < want && helpers < READERS - 1 && !fault_hit(FAULT_THREAD) && pthread_create(&threads[helpers], NULL, read_pieces, &r) == 0)
        helpers++;
    read_pieces(&r);
    while (helpers) pthread_join(threads[--helpers], NULL);
    return atomic_load(&r.code);
}

static int read_all(int fd, char *dst, size_t n, const char *path, struct err *e) {
    size_t done = 0;
    int code = n >= LARGE ? read_large(fd, dst, n) : read_span(fd, dst, &done, n);
    if (code == 0 && n >= LARGE) done = n;
    if (code == 0 && done == n) code = read_span(fd, dst, &done, n + 1); // one byte more, to see the end
    if (code > 0) return fail(e, code, "read", path);
    return code == 0 && done == n ? OK : err_set(e, E_IO, "%s changed its length while it was read", path);
}

static int check_stat(int fd, size_t *n, const char *path, size_t limit, struct err *e) {
    struct stat st;
    if (fstat(fd, &st) != 0) return fail(e, errno, "stat", path);
    if (!S_ISREG(st.st_mode)) return err_set(e, E_UNSUPPORTED, "%s is not a regular file", path);
    if ((uint64_t)st.st_size > limit)
        return err_set(e, E_RANGE, "%s has %lld bytes; the limit here is %zu", path, (long long)st.st_size, limit);
    *n = (size_t)st.st_size;
    return OK;
}

static int open_regular(size_t *n, const char *path, size_t limit, struct err *e) { // the descriptor, or a status
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); // O_NONBLOCK: opening a named pipe must not wait for a writer
    if (fd < 0) return fail(e, errno, "open", path);
    int rc = check_stat(fd, n, path, limit, e);
    return rc == OK ? fd : (close(fd), rc);
}

int file_read(void **bytes, size_t *n, const char *path, size_t limit, struct err *e) {
    *bytes = NULL;
    int fd = open_regular(n, path, limit, e), rc = OK;
    if (fd < 0) return fd;
    if (!(*bytes = mem_alloc(*n + 1))) rc = err_set(e, E_NOMEM, "no memory for the %zu bytes of %s", *n, path);
    if (rc == OK) rc = read_all(fd, *bytes, *n, path, e);
    close(fd);
    if (rc == OK) ((char *)*bytes)[*n] = 0; // a file that grew could have left its byte here
    else {
        mem_free(*bytes);
        *bytes = NULL;
    }
    return rc;
}

int file_in_open(struct file_in *f, const char *path, struct err *e) {
    *f = (struct file_in){.fd = -1, .path = mem_strdup(path)};
    if (!f->path) return err_set(e, E_NOMEM, "no memory to read %s", path);
    f->fd = open_regular(&f->n, path, SIZE_MAX, e);
    if (f->fd >= 0) return OK;
    int rc = f->fd;
    file_in_close(f);
    return rc;
}

int file_in_read(const struct file_in *f, void *dst, size_t n, size_t at, struct err *e) {
    for (size_t done = 0; done < n;) {
        ssize_t got = read_some(f->fd, (char *)dst + done, n - done, at + done);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return fail(e, errno, "read", f->path);
        if (got == 0) return err_set(e, E_IO, "%s has become shorter than it was when it was opened", f->path);
        done += (size_t)got;
    }
    return OK;
}

void file_in_close(struct file_in *f) {
    if (f->fd >= 0) close(f->fd);
    mem_free(f->path);
    *f = (struct file_in){.fd = -1};
}

// Not mkstemp: it makes files of mode 0600, and asking for the umask is not thread-safe.
static int create_beside(struct file_out *f, const char *path, struct err *e) {
    for (int attempt = 0; attempt < 100; attempt++) {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        mem_free(f->temp);
        f->temp = mem_printf("%s.tmp-%d-%lx", path, (int)getpid(), (unsigned long)now.tv_nsec + (unsigned long)attempt);
        if (!f->temp) return err_set(e, E_NOMEM, "no memory to write %s", path);
        f->fd = open(f->temp, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
        if (f->fd >= 0) return OK;
        if (errno != EEXIST) break;
    }
    return fail(e, errno, "create a file beside", path);
}

int file_out_open(struct file_out *f, const char *path, struct err *e) {
    struct stat st;
    *f = (struct file_out){.fd = -1};
    if (stat(path, &st) == 0 && !S_ISREG(st.st_mode)) // root would put a file in /dev/null's place
        return err_set(e, E_UNSUPPORTED, "%s is there and not a regular file", path);
    f->path = mem_strdup(path);
    int rc = f->path ? OK : err_set(e, E_NOMEM, "no memory to write %s", path);
    if (rc == OK && fault_hit(FAULT_WRITE)) rc = fail(e, ENOSPC, "create", path);
    if (rc == OK) rc = create_beside(f, path, e);
    if (rc == OK) return OK;
    mem_free(f->path);
    mem_free(f->temp);
    *f = (struct file_out){.fd = -1};
    return rc;
}

int file_out_write(struct file_out *f, const void *bytes, size_t n, struct err *e) {
    for (const char *p = bytes; n > 0;) {
        if (fault_hit(FAULT_WRITE)) return fail(e, ENOSPC, "write", f->path);
        ssize_t put = write(f->fd, p, n < CHUNK ? n : CHUNK);
        if (put < 0 && errno == EINTR) continue;
        if (put <= 0) return fail(e, put ? errno : EIO, "write", f->path);
        p += put;
        n -= (size_t)put;
    }
    return OK;
}

int file_sync_parent(const char *path, struct err *e) {
    const char *slash = strrchr(path, '/');
    char *dir = slash ? mem_strndup(path, slash == path ? 1 : (size_t)(slash - path)) : mem_strdup(".");
    if (!dir) return err_set(e, E_NOMEM, "no memory to sync the directory of %s", path);
    int fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC), rc = OK;
    // Some file systems cannot sync a directory (EINVAL): nothing that we could do better.
    if (fd < 0 || (fsync(fd) != 0 && errno != EINVAL)) rc = fail(e, errno, "sync", dir);
    if (fd >= 0) close(fd);
    mem_free(dir);
    return rc;
}

int file_out_commit(struct file_out *f, const char *path, struct err *e) {
    const char *to = path ? path : f->path;
    int rc = OK, fd = f->fd;
    f->fd = -1;
    bool fault = fault_hit(FAULT_WRITE);
    if (fault || fsync(fd) != 0) rc = fail(e, fault ? ENOSPC : errno, "sync", to);
    if (close(fd) != 0 && rc == OK) rc = fail(e, errno, "close", to);
    if (rc == OK && rename(f->temp, to) != 0) rc = fail(e, errno, "rename a new file to", to);
    if (rc == OK) {
        mem_free(f->temp);
        f->temp = NULL;
        rc = file_sync_parent(to, e);
    }
    file_out_abort(f);
    return rc;
}

void file_out_abort(struct file_out *f) {
    if (f->fd >= 0) close(f->fd);
    if (f->temp) unlink(f->temp);
    mem_free(f->temp);
    mem_free(f->path);
    *f = (struct file_out){.fd = -1};
}

int file_write(const char *path, const void *bytes, size_t n, struct err *e) {
    struct file_out f;
    int rc = file_out_open(&f, path, e);
    if (rc != OK) return rc;
    rc = file_out_write(&f, bytes, n, e);
    if (rc == OK) return file_out_commit(&f, NULL, e);
    file_out_abort(&f);
    return rc;
}

int file_make_dir(const char *path, struct err *e) {
    char *copy = mem_strdup(path);
    if (!copy) return err_set(e, E_NOMEM, "no memory to make %s", path);
    int rc = OK;
    for (char *p = copy + 1; rc == OK && *copy; p++) {
        char c = *p;
        if (c != '/' && c != 0) continue;
        *p = 0;
        if (mkdir(copy, 0777) != 0 && errno != EEXIST) rc = fail(e, errno, "make directory", path);
        *p = c;
        if (c == 0) break;
    }
    struct stat st;
    if (rc == OK && (stat(path, &st) != 0 || !S_ISDIR(st.st_mode))) rc = err_set(e, E_IO, "%s is not a directory", path);
    mem_free(copy);
    return rc;
}
