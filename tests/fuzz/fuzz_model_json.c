// SPDX-License-Identifier: MIT
// model.json: parse, write, parse and write again; both texts must be equal. An error must have a text.
#include <string.h>

#include "core/base/mem.h"
#include "core/io/model_dir.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define DEMAND(cond)                                                                                                             \
    do {                                                                                                                         \
        if (!(cond)) __builtin_trap();                                                                                           \
    } while (0)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    struct model_desc d, again;
    struct err e = {0};
    if (model_desc_parse(&d, (const char *)data, size, &e) != OK) {
        DEMAND(e.status != OK && e.text[0] && e.status != E_INTERNAL);
        memset(&d, 0, sizeof d);
        d.arch.num_classes = 3; // the same bytes as a file of labels
        err_clear(&e);
        DEMAND(model_desc_labels(&d, (const char *)data, size, &e) == OK || e.text[0]);
        model_desc_deinit(&d);
        return 0;
    }
    DEMAND(arch_check(&d.arch, &e) == OK && !strchr(d.weights_file, '/') && d.weights_file[0] != '.');
    char *text = model_desc_dump(&d, &e);
    DEMAND(text && model_desc_parse(&again, text, strlen(text), &e) == OK);
    char *second = model_desc_dump(&again, &e);
    DEMAND(second && strcmp(text, second) == 0);
    mem_free(text);
    mem_free(second);
    model_desc_deinit(&d);
    model_desc_deinit(&again);
    return 0;
}
