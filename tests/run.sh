#!/bin/sh
# The whole suite on what `make test` built. Its parts run in two lanes side by side, as most of them keep one core busy. Each part prints its own
# lines; the last line is the sum, "N passed, N failed". Parts can be named: tests/run.sh unit api
set -u
cd "$(dirname "$0")/.."
build=${BUILD:-build}
python=${PYTHON:-/usr/bin/python3}
logs=$build/test-logs
mkdir -p "$logs"
rm -f "$logs"/*.count
export PYTHONDONTWRITEBYTECODE=1

# part NAME COMMAND...: runs it, counts its "N passed, N failed" (pytest's wording too); a part without counts counts as one test
part() {
    name=$1
    shift
    if [ -n "$only" ]; then case " $only " in *" $name "*) ;; *) return ;; esac; fi
    echo "0 1" >"$logs/$name.count" # unless it comes to its end
    start=$(date +%s)
    "$@" >"$logs/$name.log" 2>&1
    status=$?
    p=$(grep -Eo '[0-9]+ passed' "$logs/$name.log" | tail -n 1 | grep -Eo '[0-9]+')
    f=$(grep -E '[0-9]+ (passed|failed)' "$logs/$name.log" | tail -n 1 | grep -Eo '[0-9]+ (failed|errors?)' | grep -Eo '[0-9]+' | awk '{s += $1} END {print s + 0}')
    [ -n "$p$f" ] && [ "${p:-0}${f:-0}" != 00 ] || { p=0 f=0; [ $status -eq 0 ] && p=1; }
    [ $status -eq 0 ] || [ "${f:-0}" -gt 0 ] || f=1
    echo "${p:-0} ${f:-0}" >"$logs/$name.count"
    echo "$name: ${p:-0} passed, ${f:-0} failed ($(($(date +%s) - start)) s)"
    [ $status -eq 0 ] || { grep -E 'FAIL|Error|ERROR|error:|^E  |runtime error|SUMMARY' "$logs/$name.log" | head -n 20; echo "  whole log: $logs/$name.log"; }
}

only="$*"
export ASAN_OPTIONS=abort_on_error=0:detect_leaks=1 UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS=halt_on_error=0:exitcode=66:suppressions=$PWD/tests/tsan.supp
lane_of_units() {
    part layers tools/check-layers.sh
    part tools tests/tools/test_tools.sh
    part unit "$build/release/tests/run"
    part unit-address env TEST_TIME_SCALE=10 "$build/address/tests/run" tests/unit tests/bad tests/fault golden_tiny test_replay
    part unit-thread env TEST_TIME_SCALE=10 "$build/thread/tests/run" tests/unit/test_engine test_sched
    part fuzz tests/fuzz/run.sh "$build/fuzz/tests/fuzz" 20
}
lane_of_daemons() {
    part api "$python" -m pytest -q -p no:cacheprovider tests/api
    part web "$python" -m pytest -q -p no:cacheprovider tests/web
    part api-address env SITD="$build/address/sitd" SITD_SANITIZED=1 "$python" -m pytest -q -p no:cacheprovider tests/api
    part api-thread env SITD="$build/thread/sitd" SITD_SANITIZED=1 "$python" -m pytest -q -p no:cacheprovider tests/api
}
trap 'trap - INT TERM; kill -s TERM 0' INT TERM # a background lane does not hear Ctrl-C
lane_of_units &
lane_of_daemons
wait
cat "$logs"/*.count 2>/dev/null | awk '{p += $1; f += $2} END {printf "%d passed, %d failed\n", p, f; exit !(f == 0 && p > 0)}'
