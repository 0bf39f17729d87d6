// SPDX-License-Identifier: MIT
/*
 * cmd: the subcommands of the one binary. Each is a main of its own: prints its messages, returns the process exit code (0, 1 run-time failure,
 * 2 usage, else status_exit_code). argv[0] is "sitd NAME", as getopt's messages begin. `--help` on each.
 */
#ifndef SITD_CMD_H
#define SITD_CMD_H

int cmd_serve(int argc, char **argv);
int cmd_train(int argc, char **argv);
int cmd_sample(int argc, char **argv);
int cmd_replay(int argc, char **argv);
int cmd_import(int argc, char **argv);
int cmd_inspect(int argc, char **argv);
int cmd_encode(int argc, char **argv);
int cmd_bench(int argc, char **argv);

extern const char sitd_version[], sitd_commit[]; // version.c

#endif
