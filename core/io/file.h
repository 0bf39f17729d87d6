// SPDX-License-Identifier: MIT
/*
 * file: whole files in, whole files out; parts of large files in.
 *
 * Files are read into memory, never mapped: a mapping of a file that another process cuts short is a SIGBUS, and the bytes that
 * were hashed must be the bytes that are used. Files are written under a temporary name, synced, then renamed, so that a reader
 * sees the old file or the new one and never a part. Both directions pass the fault seams FAULT_READ and FAULT_WRITE. Thread: any
 * (no globals).
 */
#ifndef SITD_IO_FILE_H
#define SITD_IO_FILE_H
#include <stddef.h>

#include "core/base/err.h"

// Reads all of a regular file; *bytes is the caller's (mem_free) and has one zero byte more than *n. E_NOTFOUND, E_PERM, E_IO
// (also: the file changed its length meanwhile), E_UNSUPPORTED (a directory, a pipe), E_RANGE (more than `limit` bytes), E_NOMEM.
// The text names the path.
int file_read(void **bytes, size_t *n, const char *path, size_t limit, struct err *);

struct file_in { // a regular file that is read in parts
    int fd;      // PRIVATE; -1 when closed
    char *path;
    size_t n; // bytes, when it was opened
};
// As file_read, less E_RANGE. On failure nothing is left to close.
int file_in_open(struct file_in *, const char *path, struct err *);
// Bytes [at, at + n), which must lie inside. Several threads may read at once. E_IO (also: the file has become shorter).
int file_in_read(const struct file_in *, void *dst, size_t n, size_t at, struct err *);
void file_in_close(struct file_in *); // harmless on a closed one

struct file_out {      // a file being written
    int fd;            // PRIVATE; -1 when closed
    char *path, *temp; // PRIVATE; where it will be, where it is now
};
// Makes `path`.tmp-PID-N beside the final place. After success exactly one of commit and abort must follow. E_UNSUPPORTED for a
// path that is a directory, a device or a pipe: the rename would replace it.
int file_out_open(struct file_out *, const char *path, struct err *);
int file_out_write(struct file_out *, const void *bytes, size_t n, struct err *);
// Syncs, renames and syncs the directory. `path`, if not NULL, replaces the name given at open (same directory). On failure the
// temporary file is removed and the old file is untouched.
int file_out_commit(struct file_out *, const char *path, struct err *);
void file_out_abort(struct file_out *); // removes the temporary file; harmless after commit

// open + write + commit of one buffer.
int file_write(const char *path, const void *bytes, size_t n, struct err *);
// Syncs the directory that holds `path`: a rename itself must survive a power cut, not only the bytes. E_NOMEM, E_IO.
int file_sync_parent(const char *path, struct err *);
// Makes a directory and its parents (mode 0777 less the umask); one that is there is fine.
int file_make_dir(const char *path, struct err *);

#endif
