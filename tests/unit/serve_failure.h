// SPDX-License-Identifier: MIT
/*
 * serve_failure: the daemon, with the one device it has failing under it, as its clients see it. The whole server runs in the test's process,
 * on a loopback port, so that the test can break what it computes with.
 */
#ifndef SERVE_FAILURE_H
#define SERVE_FAILURE_H

// break_device is called when one sampling request runs and another waits; it returns when whatever the device is asked to do next fails.
void serve_failure(const char *backend, const char *precision, void (*break_device)(void));

#endif
