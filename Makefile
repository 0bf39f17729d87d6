# sitd. `make help` lists the targets; V=1 shows the commands. Objects live in build/<configuration>, so switching never needs a clean.
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

Q := $(if $(V),,@)
WARN := -Wall -Wextra -Wshadow -Wstrict-prototypes -Wmissing-prototypes $(if $(filter 1,$(WERROR)),-Werror)
CFLAGS ?= -O3 -g
ALL_CFLAGS = -std=c17 -D_GNU_SOURCE -I. $(WARN) $(CFLAGS) -ffp-contract=off -fno-omit-frame-pointer -pthread
# DT_RPATH (not RUNPATH) so that a bundle's own libraries find each other
LDFLAGS += -Wl,--disable-new-dtags,-rpath,'$$ORIGIN/lib'
LDLIBS := -ldnnl -ljansson -lmicrohttpd -luv -lpng -ljpeg -lcrypto -lz -lm -lpthread
ifeq ($(SAN),address)
ALL_CFLAGS += -O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined
LDFLAGS += -fsanitize=address,undefined
else ifeq ($(SAN),undefined)
ALL_CFLAGS += -O1 -fsanitize=undefined -fno-sanitize-recover=undefined
LDFLAGS += -fsanitize=undefined
else ifeq ($(SAN),thread)
ALL_CFLAGS += -O1 -fsanitize=thread
LDFLAGS += -fsanitize=thread
else ifeq ($(SAN),fuzz)
CC := clang
ALL_CFLAGS += -O1 -fsanitize=fuzzer-no-link,address,undefined -fno-sanitize-recover=undefined
LDFLAGS += -fsanitize=fuzzer,address,undefined
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

.PHONY: all run test test-all bench check check-layers bundle fuzz clean help deps tests fuzzers
all: $(OUT)/sitd ## build the daemon (build/sitd)
	@ln -sf $(CONFIG)/sitd $(BUILD)/sitd

# Instruction sets are chosen at run time; only files named for one are compiled for it.
$(OUT)/%_avx2.o: ISA := -mavx2 -mfma -mf16c
$(OUT)/%_avx512.o: ISA := -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl
$(OUT)/%_avx512bf16.o: ISA := -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512bf16
$(OUT)/server/version.o: ALL_CFLAGS += -DSITD_VERSION='"$(VERSION)"' -DSITD_COMMIT='"$(COMMIT)"'
$(OUT)/server/version.o: $(OUT)/commit
# Written anew only when it changes, so that `sitd --version` follows the working tree and nothing else is built for it.
$(OUT)/commit: always
	@mkdir -p $(@D)
	@echo '$(VERSION) $(COMMIT)' | cmp -s - $@ || echo '$(VERSION) $(COMMIT)' >$@
.PHONY: always
$(OUT)/server/assets.o: $(WEB)

$(OUT)/%.o: %.c
	@mkdir -p $(@D)
	@echo "  CC    $<"
	$(Q)$(CC) $(ALL_CFLAGS) $(ISA) -MMD -MP -c -o $@ $<

$(OUT)/libsitd.a: $(LIB_OBJ)
	@rm -f $@
	@echo "  AR    $@"
	$(Q)ar rcs $@ $^
$(OUT)/sitd: $(OUT)/server/main.o $(SERVER_OBJ) $(OUT)/libsitd.a
	@echo "  LINK  $@"
	$(Q)$(CC) $(LDFLAGS) -o $@ $^ $(LDLIBS)
$(OUT)/tests/run: $(TEST_OBJ) $(SERVER_OBJ) $(OUT)/libsitd.a
	@echo "  LINK  $@"
	$(Q)$(CC) $(LDFLAGS) -o $@ $^ $(LDLIBS)
tests: $(OUT)/tests/run
$(OUT)/bench-ops: $(OUT)/tests/bench/bench_ops.o $(OUT)/tests/ops/cases.o $(OUT)/tests/ops/cases_train.o $(OUT)/libsitd.a
	@echo "  LINK  $@"
	$(Q)$(CC) $(LDFLAGS) -o $@ $^ $(LDLIBS)
$(OUT)/bench-samplers: $(OUT)/tests/bench/bench_samplers.o $(OUT)/tests/unit/f64_exec.o $(OUT)/libsitd.a
	@echo "  LINK  $@"
	$(Q)$(CC) $(LDFLAGS) -o $@ $^ $(LDLIBS)
$(OUT)/bench-vae: $(OUT)/tests/bench/bench_vae.o $(OUT)/libsitd.a
	@echo "  LINK  $@"
	$(Q)$(CC) $(LDFLAGS) -o $@ $^ $(LDLIBS)

$(OUT)/make-model: $(OUT)/tests/bench/make_model.o $(OUT)/libsitd.a
	@echo "  LINK  $@"
	$(Q)$(CC) $(LDFLAGS) -o $@ $^ $(LDLIBS)
$(OUT)/bench-train: $(OUT)/tests/bench/bench_train.o $(OUT)/libsitd.a
	@echo "  LINK  $@"
	$(Q)$(CC) $(LDFLAGS) -o $@ $^ $(LDLIBS)
$(OUT)/bench-step: $(OUT)/tests/bench/bench_step.o $(OUT)/libsitd.a
	@echo "  LINK  $@"
	$(Q)$(CC) $(LDFLAGS) -o $@ $^ $(LDLIBS)

-include $(LIB_OBJ:.o=.d) $(SERVER_OBJ:.o=.d) $(TEST_OBJ:.o=.d) $(OUT)/server/main.d $(wildcard $(OUT)/tests/bench/*.d)

# CUDA: kernels/cuda/*.cu become a library beside the executable (kernels/cuda/cuda.c loads it). CUDA=0: leave it out; 1: insist; auto: where nvcc is.
# CUDA_ARCH=all builds for every card that we know, for bundles; else sm_90a and PTX that any card from 8.0 on compiles at first use.
NVCC ?= $(or $(shell command -v nvcc 2>/dev/null),$(wildcard /usr/local/cuda/bin/nvcc))
CUDA_HOME ?= $(patsubst %/bin/nvcc,%,$(realpath $(NVCC)))
CUDA_SMS := $(if $(filter all,$(CUDA_ARCH)),80 86 89 90a 100,90a)
CUDA_GENCODE := $(foreach a,$(CUDA_SMS),-gencode arch=compute_$(a),code=sm_$(a)) -gencode arch=compute_80,code=compute_80
CUDA_WARN := -Xcompiler -Wall,-Wextra,-Wno-missing-field-initializers $(if $(filter 1,$(WERROR)),-Werror all-warnings)
CUDA_FLAGS = -std=c++20 -O3 -lineinfo -I. $(CUDA_GENCODE) $(CUDA_WARN) -Xcompiler -fPIC,-fvisibility=hidden
CUDA_OBJ := $(patsubst %.cu,$(OUT)/%.cu.o,$(wildcard kernels/cuda/*.cu))
ifeq ($(filter $(CUDA),0 1 auto),)
$(error CUDA is $(CUDA), neither 0, 1 nor auto)
endif
ifeq ($(CUDA),0)
else ifneq ($(SAN),)
else ifneq ($(NVCC),)
all tests: $(OUT)/libsitd_cuda.so
else ifeq ($(CUDA),1)
$(error CUDA=1, but there is no nvcc)
else
all: no-cuda
endif
.PHONY: no-cuda test-cuda
no-cuda:
	@echo "nvcc is not here: built without the CUDA back end"
# Products and sums meet only inside fmaf there: noise, samplers and optimiser have the CPU's bits.
$(OUT)/kernels/cuda/sampler.cu.o $(OUT)/kernels/cuda/step.cu.o: CUDA_FLAGS += -fmad=false
$(OUT)/%.cu.o: %.cu
	@mkdir -p $(@D)
	@echo "  NVCC  $<"
	$(Q)$(NVCC) $(CUDA_FLAGS) -MMD -MP -MF $(@:.o=.d) -c -o $@ $<
$(OUT)/libsitd_cuda.so: $(CUDA_OBJ)
	@echo "  LINK  $@"
	@ln -sfn $(CURDIR)/deploy/products $(@D)/products
	$(Q)$(NVCC) -shared -cudart static -o $@ $^ -lcublasLt -Xlinker -rpath,'$$ORIGIN:$$ORIGIN/lib:/usr/local/cuda/lib64:$(CUDA_HOME)/lib64'
-include $(CUDA_OBJ:.o=.d)
CUDA_TEST_OBJ := $(patsubst %.c,$(OUT)/%.o,tests/main.c tests/ops/cases.c tests/ops/cases_train.c tests/unit/engine_fixture.c tests/unit/serve_failure.c $(wildcard tests/cuda/*.c))
BENCH_OBJ := $(patsubst %.c,$(OUT)/%.o,$(wildcard tests/bench/*.c))
-include $(CUDA_TEST_OBJ:.o=.d) $(BENCH_OBJ:.o=.d)
$(OUT)/run-cuda: $(CUDA_TEST_OBJ) $(SERVER_OBJ) $(OUT)/libsitd.a
	@echo "  LINK  $@"
	$(Q)$(CC) $(LDFLAGS) -o $@ $^ $(LDLIBS)
test-cuda: all $(OUT)/run-cuda ## op cases, golden cases, row invariance, failures and the daemon's API tests on a GPU that nobody else uses
	$(OUT)/run-cuda
	tests/cuda/golden.sh
	SITD_TEST_BACKEND=cuda $(PYTHON) -m pytest -q -p no:cacheprovider tests/api

.SECONDARY: # keep objects of fuzz targets
# Fuzz targets: libFuzzer by clang, in a configuration of their own.
FUZZERS := $(FUZZ_SRC:%.c=$(BUILD)/fuzz/%)
$(BUILD)/fuzz/tests/fuzz/fuzz_%: $(OUT)/tests/fuzz/fuzz_%.o $(OUT)/libsitd.a
	@echo "  LINK  $@"
	$(Q)$(CC) $(LDFLAGS) -o $@ $^ $(LDLIBS)
fuzzers:
	$(MAKE) SAN=fuzz $(FUZZERS)
fuzz: fuzzers ## run every fuzz target for SECONDS=N each
	tests/fuzz/run.sh $(BUILD)/fuzz/tests/fuzz $(SECONDS)

# What `make run` and `make test` build, they build on every core, unless -j was given.
JOBS = $(if $(findstring -j,$(MAKEFLAGS)),,-j$(shell nproc))
deps: ## install the Debian packages that build and tests need
	@tools/deps.sh build test
run: ## install what is missing, build, serve on 127.0.0.1:8080 and make a first picture
	@tools/deps.sh build run
	@$(MAKE) $(JOBS) --no-print-directory all
	@tools/run.sh
test: ## install what is missing, build, run the whole test suite
	@tools/deps.sh build run test
	@$(MAKE) $(JOBS) --no-print-directory all tests fuzzers
	@$(MAKE) $(JOBS) --no-print-directory SAN=address $(BUILD)/address/sitd tests
	@$(MAKE) $(JOBS) --no-print-directory SAN=thread $(BUILD)/thread/sitd tests
	@tests/run.sh
test-all: test ## the test suite, then every recorded case of ../shared/golden when it is there
	@tests/golden/all.sh
bench: all $(OUT)/bench-ops $(OUT)/bench-step $(OUT)/bench-vae ## forward passes and training steps beside torch where it is installed (TORCH_PYTHON=python[:python]), ops against their ceiling; CSV in build/
	@$(PYTHON) tests/bench/forward.py
	@$(PYTHON) tests/bench/train.py
	@$(OUT)/bench-ops
	@$(OUT)/bench-vae
bundle: ## build/sitd-VERSION.tar.gz: the binary for every processor and GPU, its libraries and the bundled models, to unpack anywhere
	@$(MAKE) --no-print-directory BUILD=$(BUILD)/bundle CUDA_ARCH=all all
	@tools/bundle.sh $(VERSION) $(BUILD)/bundle/release
check: ## static checks: layers, clang-tidy (bugprone)
	@tools/check-layers.sh
	@tools/check.sh
check-layers: ## each layer includes only lower ones
	@tools/check-layers.sh

clean: ## remove everything that was built
	rm -rf $(BUILD)
help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | sort
