// SPDX-License-Identifier: MIT
/*
 * A loaded model's facts without a model, for tests of the request codec: ten clothes with synonyms ("shoe" is one of two
 * classes), two classes of the same name ("crane"), step 9034, a digest that starts with 0a1b2c.
 */
#ifndef TEST_REQUEST_MODEL_H
#define TEST_REQUEST_MODEL_H
#include <string.h>

#include "proto/request.h"

#define FAKE_CLASSES 12
static char *fake_names[FAKE_CLASSES][3] = {
    {"t-shirt", "top"}, {"trouser", "trousers"}, {"pullover"}, {"dress"},
    {"coat"},           {"sandal", "shoe"},      {"shirt"},    {"sneaker", "shoe", "trainer"},
    {"bag", "coat"},    {"ankle boot", "boot"},  {"crane"},    {"crane", "heron"}};

// labels: with the names above; null_class: has the unconditional row. m's labels are static: nothing to free.
static inline void fake_model(struct engine_model *m, bool labels, bool null_class) {
    static __typeof__(*(((struct model_desc *)0)->labels)) table[FAKE_CLASSES];
    for (int i = 0; i < FAKE_CLASSES; i++) {
        table[i].names = fake_names[i];
        table[i].n = fake_names[i][1] ? fake_names[i][2] ? 3 : 2 : 1;
    }
    *m = (struct engine_model){.name = "fashion-sit", .guide_channels = 1, .max_guide_channels = 4, .image_size = 32, .image_channels = 1};
    strcpy(m->digest, "0a1b2c3d4e5f60718293a4b5c6d7e8f90a1b2c3d4e5f60718293a4b5c6d7e8f9");
    strcpy(m->desc.family, "sit");
    strcpy(m->desc.path, "linear");
    strcpy(m->desc.prediction, "velocity");
    m->desc.arch = (struct arch){.input_size = 32,
                                 .patch_size = 4,
                                 .in_channels = 4,
                                 .hidden_size = 192,
                                 .depth = 8,
                                 .num_heads = 3,
                                 .num_classes = FAKE_CLASSES,
                                 .mlp_ratio = 4,
                                 .class_dropout = null_class,
                                 .learn_sigma = true};
    m->desc.step = 9034;
    m->desc.labels = labels ? (void *)table : NULL;
    m->sampler = (struct sampler_model){.path = PATH_LINEAR, .prediction = PRED_VELOCITY};
}

// The same as a model of another family: MODEL_DISCRETE is a DiT, MODEL_EDM a MaskDiT.
static inline void fake_family(struct engine_model *m, enum model_kind kind) {
    fake_model(m, true, true);
    if (kind == MODEL_PATH) return;
    bool dit = kind == MODEL_DISCRETE;
    strcpy(m->desc.family, dit ? "dit" : "maskdit");
    m->desc.path[0] = m->desc.prediction[0] = 0;
    m->desc.arch.learn_sigma = dit;
    m->guide_channels = dit ? 3 : 4;
    m->max_guide_channels = dit ? 8 : 4;
    m->sampler = (struct sampler_model){.kind = kind, .learned_variance = dit, .sigma_data = dit ? 0 : 0.5};
}

#endif
