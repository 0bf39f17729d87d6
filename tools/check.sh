#!/bin/sh
# Static checks: clang-tidy's bugprone set over everything below tests; says so where it is not installed.
set -eu
cd "$(dirname "$0")/.."
sources=$(git ls-files 'kernels/*.c' 'core/*.c' 'proto/*.c' 'server/*.c')
if command -v clang-tidy >/dev/null; then
    # shellcheck disable=SC2086
    clang-tidy --quiet --warnings-as-errors='*' \
        --checks='-*,bugprone-*,-bugprone-easily-swappable-parameters,-bugprone-narrowing-conversions,-bugprone-reserved-identifier,-bugprone-assignment-in-if-condition' \
        $sources -- -std=c17 -D_GNU_SOURCE -I. -DSITD_VERSION='""' -DSITD_COMMIT='""' -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512bf16
else echo "clang-tidy is not installed: not run"; fi
