# sitd. `make help` lists the targets. Objects live in build/<configuration>, so switching never needs a clean.
CUDA ?= auto
SAN ?=
WERROR ?= 0
SECONDS ?= 20
BUILD ?= build
CC ?= gcc
PYTHON ?= /usr/bin/python3

CONFIG := $(if $(SAN),$(SAN),release)
OUT := $(BUILD)/$(CONFIG)
VERSION := $(shell cat VERSION)
COMMIT := $(shell git describe --always --dirty 2>/dev/null || echo unknown)

WARN := -Wall -Wextra -Wshadow -Wstrict-prototypes -Wmissing-prototypes $(if $(filter 1,$(WERROR)),-Werror)
CFLAGS ?= -O3 -g
ALL_CFLAGS = -std=c17 -D_GNU_SOURCE -I. $(WARN) $(CFLAGS) -ffp-contract=off -fno-omit-frame-pointer -pthread
LDLIBS := -ldnnl -ljansson -lmicrohttpd -luv -lpng -lcrypto -lz -lm -lpthread
ifeq ($(SAN),address)
ALL_CFLAGS += -O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined
LDFLAGS += -fsanitize=address,undefined
else ifeq ($(SAN),undefined)
ALL_CFLAGS += -O1 -fsanitize=undefined -fno-sanitize-recover=undefined
LDFLAGS += -fsanitize=undefined
else ifeq ($(SAN),thread)
ALL_CFLAGS += -O1 -fsanitize=thread
LDFLAGS += -fsanitize=thread
else ifneq ($(SAN),)
$(error SAN is address, undefined or thread)
endif

LIB_SRC := $(wildcard kernels/*.c kernels/ref/*.c kernels/cpu/*.c kernels/cuda/*.c core/*/*.c proto/*.c)
SERVER_SRC := $(filter-out server/main.c,$(wildcard server/*.c))
TEST_SRC := $(wildcard tests/*.c tests/unit/*.c tests/ops/*.c tests/golden/*.c tests/bad/*.c tests/fault/*.c)
FUZZ_SRC := $(wildcard tests/fuzz/fuzz_*.c)
LIB_OBJ := $(LIB_SRC:%.c=$(OUT)/%.o)
SERVER_OBJ := $(SERVER_SRC:%.c=$(OUT)/%.o)
TEST_OBJ := $(TEST_SRC:%.c=$(OUT)/%.o)
WEB := $(wildcard clients/web/*) proto/openapi.json

.PHONY: all run test test-all bench check check-layers bundle fuzz clean help deps tests fuzzers format
all: $(OUT)/sitd ## build the daemon (build/sitd)
	@ln -sf $(CONFIG)/sitd $(BUILD)/sitd

# Instruction sets are chosen at run time; only files named for one are compiled for it.
$(OUT)/%_avx2.o: ISA := -mavx2 -mfma -mf16c
$(OUT)/%_avx512.o: ISA := -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl
$(OUT)/%_avx512bf16.o: ISA := -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512bf16
$(OUT)/server/version.o: ALL_CFLAGS += -DSITD_VERSION='"$(VERSION)"' -DSITD_COMMIT='"$(COMMIT)"'
$(OUT)/server/assets.o: $(WEB)

$(OUT)/%.o: %.c
	@mkdir -p $(@D)
	$(CC) $(ALL_CFLAGS) $(ISA) -MMD -MP -c -o $@ $<

$(OUT)/libsitd.a: $(LIB_OBJ)
	@rm -f $@
	ar rcs $@ $^
$(OUT)/sitd: $(OUT)/server/main.o $(SERVER_OBJ) $(OUT)/libsitd.a
	$(CC) $(LDFLAGS) -o $@ $^ $(LDLIBS)
$(OUT)/tests/run: $(TEST_OBJ) $(SERVER_OBJ) $(OUT)/libsitd.a
	$(CC) $(LDFLAGS) -o $@ $^ $(LDLIBS)
tests: $(OUT)/tests/run

-include $(LIB_OBJ:.o=.d) $(SERVER_OBJ:.o=.d) $(TEST_OBJ:.o=.d) $(OUT)/server/main.d

clean: ## remove everything that was built
	rm -rf $(BUILD)
help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | sort
