#!/bin/sh
# The whole suite on what `make test` built. Each part prints its own lines; the last line is the sum, "N passed, N failed".
# Parts can be named: tests/run.sh unit api
set -u
cd "$(dirname "$0")/.."
build=${BUILD:-build}
python=${PYTHON:-/usr/bin/python3}
logs=$build/test-logs
mkdir -p "$logs"
passed=0 failed=0
export PYTHONDONTWRITEBYTECODE=1

# part NAME COMMAND...: runs it, counts its "N passed, N failed" (pytest's wording too); a part without counts counts as one test
part() {
    name=$1
    shift
    if [ -n "$only" ]; then case " $only " in *" $name "*) ;; *) return ;; esac; fi
    start=$(date +%s)
    "$@" >"$logs/$name.log" 2>&1
    status=$?
    p=$(grep -Eo '[0-9]+ passed' "$logs/$name.log" | tail -n 1 | grep -Eo '[0-9]+')
    f=$(grep -E '[0-9]+ (passed|failed)' "$logs/$name.log" | tail -n 1 | grep -Eo '[0-9]+ (failed|errors?)' | grep -Eo '[0-9]+' | awk '{s += $1} END {print s + 0}')
    [ -n "$p$f" ] && [ "${p:-0}${f:-0}" != 00 ] || { p=0 f=0; [ $status -eq 0 ] && p=1; }
    [ $status -eq 0 ] || [ "${f:-0}" -gt 0 ] || f=1
    passed=$((passed + ${p:-0})) failed=$((failed + ${f:-0}))
    echo "$name: ${p:-0} passed, ${f:-0} failed ($(($(date +%s) - start)) s)"
    [ $status -eq 0 ] || { grep -E 'FAIL|Error|ERROR|error:|^E  |runtime error|SUMMARY' "$logs/$name.log" | head -n 20; echo "  whole log: $logs/$name.log"; }
}

only="$*"
export ASAN_OPTIONS=abort_on_error=0:detect_leaks=1 UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS=halt_on_error=0:exitcode=66:suppressions=$PWD/tests/tsan.supp
part layers tools/check-layers.sh
part tools tests/tools/test_tools.sh
part unit "$build/release/tests/run"
part api "$python" -m pytest -q -p no:cacheprovider tests/api
part web "$python" -m pytest -q -p no:cacheprovider tests/web
part unit-address env TEST_TIME_SCALE=10 "$build/address/tests/run" tests/unit tests/bad tests/fault golden_tiny test_replay
part api-address env SITD="$build/address/sitd" SITD_SANITIZED=1 "$python" -m pytest -q -p no:cacheprovider tests/api
part api-thread env SITD="$build/thread/sitd" SITD_SANITIZED=1 "$python" -m pytest -q -p no:cacheprovider tests/api
part unit-thread env TEST_TIME_SCALE=10 "$build/thread/tests/run" test_engine test_sched
part fuzz tests/fuzz/run.sh "$build/fuzz/tests/fuzz" 20
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
