#!/bin/sh
# run.sh FOLDER SECONDS: replays each target's corpus, then fuzzes it for so long. One "ok" or "FAIL" line a target; inputs that fail are kept
# in build/fuzz/failures. Ends with "N passed, N failed".
set -u
folder=$1 seconds=$2 passed=0 failed=0
here=$(dirname "$0")
for target in "$folder"/fuzz_*; do
    case $target in *.o | *.d) continue ;; esac
    name=${target##*/fuzz_}
    work=build/fuzz/corpus/$name
    mkdir -p "$work" build/fuzz/failures
    dict=$here/$name.dict
    if "$target" "$work" "$here/corpus/$name" -max_total_time="$seconds" -rss_limit_mb=2048 -timeout=10 -print_final_stats=1 \
        -artifact_prefix="build/fuzz/failures/$name-" $([ -f "$dict" ] && echo "-dict=$dict") >"build/fuzz/$name.log" 2>&1; then
        echo "ok   fuzz $name: $(grep -Eo 'number_of_executed_units: [0-9]+' "build/fuzz/$name.log" | tail -n 1)"
        passed=$((passed + 1))
    else
        echo "FAIL fuzz $name (build/fuzz/$name.log)"
        tail -n 30 "build/fuzz/$name.log"
        failed=$((failed + 1))
    fi
done
echo "$passed passed, $failed failed"
[ $failed -eq 0 ] && [ $passed -gt 0 ]
