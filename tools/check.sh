#!/bin/sh
# Static checks: clang-tidy's bugprone set over everything below tests, less the checks that argue with this code's idioms (strcmp as a truth, sizes
# of arrays of pointers, indices computed in int, tags without a final zero); says so where it is not installed.
set -eu
cd "$(dirname "$0")/.."
sources=$(git ls-files 'kernels/*.c' 'core/*.c' 'proto/*.c' 'server/*.c')
if command -v clang-tidy >/dev/null; then
    checks='-*,bugprone-*'
    for no in easily-swappable-parameters narrowing-conversions reserved-identifier assignment-in-if-condition suspicious-string-compare \
        sizeof-expression misplaced-widening-cast implicit-widening-of-multiplication-result not-null-terminated-result; do
        checks=$checks,-bugprone-$no
    done
    # shellcheck disable=SC2086
    clang-tidy --quiet --warnings-as-errors='*' --checks="$checks" \
        $sources -- -std=c17 -D_GNU_SOURCE -I. -DSITD_VERSION='""' -DSITD_COMMIT='""' -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512bf16
else echo "clang-tidy is not installed: not run"; fi
