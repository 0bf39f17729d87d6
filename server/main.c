// SPDX-License-Identifier: MIT
#include <signal.h>
#include <stdio.h>
#include <string.h>

#include "server/cmd.h"

static const struct {
    const char *name, *what;
    int (*run)(int argc, char **argv);
} commands[] = {
    {"serve", "the daemon: sample over HTTP", cmd_serve},
    {"train", "train a DiT or SiT on a CPU or GPU", cmd_train},
    {"import", "make a model directory from a checkpoint", cmd_import},
    {"inspect", "what a checkpoint or model directory holds", cmd_inspect},
    {"sample", "sample images without a server", cmd_sample},
    {"replay", "re-run recorded cases and print the error", cmd_replay},
    {"encode", "pictures to latents by a VAE", cmd_encode},
    {"bench", "speed of this machine", cmd_bench},
};

static int usage(FILE *to) {
    fprintf(to, "sitd %s: samples diffusion transformers over HTTP, and trains them\n\nusage: sitd COMMAND [options]\n\n", sitd_version);
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++) fprintf(to, "  %-8s  %s\n", commands[i].name, commands[i].what);
    fprintf(to, "\n`sitd COMMAND --help` tells a command's options.\n");
    return to == stdout ? 0 : 2;
}

int main(int argc, char **argv) {
    if (argc < 2) return usage(stderr);
    if (!strcmp(argv[1], "--help") || !strcmp(argv[1], "help")) return usage(stdout);
    if (!strcmp(argv[1], "--version")) return printf("sitd %s (%s)\n", sitd_version, sitd_commit) < 0;
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++) {
        if (strcmp(argv[1], commands[i].name) != 0) continue;
        char name[32]; // as getopt's messages begin
        snprintf(name, sizeof name, "sitd %s", commands[i].name);
        argv[1] = name;
        signal(SIGXFSZ, SIG_IGN); // a limit on files is told as a full disk is
        return commands[i].run(argc - 1, argv + 1);
    }
    fprintf(stderr, "sitd: no command '%s'\n", argv[1]);
    return usage(stderr);
}
