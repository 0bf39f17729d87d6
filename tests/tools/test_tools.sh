#!/bin/sh
# The tools that make calls: check-layers.sh finds what it is for, deps.sh installs or prints the line to run. Nothing is installed here: dpkg-query,
# apt-get, sudo and id are stand-ins. Ends in "N passed, N failed".
set -u
root=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
passed=0 failed=0
verdict() { # STATUS WHAT
    if [ "$1" -eq 0 ]; then passed=$((passed + 1)); else failed=$((failed + 1)) && echo "FAIL $2"; fi
}

# violation FILE LINE CULPRIT: a tree with this one line is refused, and the file named; no culprit: it is accepted
violation() {
    rm -rf "$work/tree"
    mkdir -p "$work/tree/tools" "$work/tree/kernels" "$work/tree/core" "$work/tree/proto" "$work/tree/server" "$work/tree/$(dirname "$1")"
    cp "$root/tools/check-layers.sh" "$work/tree/tools/"
    printf '%s\n' "$2" >"$work/tree/$1"
    said=$("$work/tree/tools/check-layers.sh" 2>&1)
    status=$?
    if [ "$3" = refused ]; then [ $status -ne 0 ] && case $said in *"$1"*) true ;; *) false ;; esac; else [ $status -eq 0 ]; fi
    verdict $? "check-layers: $1 with $2 should be $3: $said"
}
violation kernels/kern.c '#include "core/base/err.h"' refused
violation kernels/cuda/norm.cu '#include "core/base/err.h"' refused
violation kernels/cuda/norm.cuh '#include "core/base/err.h"' refused
violation core/base/err.c '#include "core/io/zip.h"' refused
violation core/io/zip.c '#  include "core/engine/engine.h"' refused
violation core/model/dit.h '#include "core/diffusion/sampler.h"' refused
violation core/diffusion/ode.c '#include "core/model/dit.h"' refused
violation core/engine/engine.c '#include "proto/emit.h"' refused
violation proto/emit.c '#include "server/http.h"' refused
violation core/engine/engine.c '#include <uv.h>' refused
violation core/model/dit.c ' #include <oneapi/dnnl/dnnl.h>' refused
violation kernels/cpu/ops.c '#include <cuda_runtime.h>' refused
violation server/http.c '#include <png.h>' refused
violation server/http.c '#include "core/engine/engine.h"' accepted
violation core/engine/engine.c '#include "core/diffusion/sampler.h"' accepted
violation kernels/cuda/norm.cu '#include <cuda_runtime.h>' accepted

fake() { printf '#!/bin/sh\n%s\n' "$2" >"$work/bin/$1" && chmod +x "$work/bin/$1"; }
mkdir -p "$work/bin"
fake apt-get 'echo "apt-get $*" >>"$CALLS"'
export CALLS="$work/calls"
# deps UID SUDO-WORKS MISSING: stand-ins; the output is left in said, what was called in $CALLS
deps() {
    : >"$CALLS"
    fake id "echo $1"
    fake sudo "[ $2 = yes ] || exit 1; [ \"\$1\" = -n ] && exit 0; echo \"sudo \$*\" >>\"\$CALLS\""
    fake dpkg-query "case \"\$*\" in *\" $3\") exit 1 ;; *) echo 'install ok installed' ;; esac"
    said=$(PATH="$work/bin:$PATH" "$root/tools/deps.sh" build run 2>&1)
    status=$?
}
deps 1000 no nothing
[ $status -eq 0 ] && [ -z "$said" ] && [ ! -s "$CALLS" ]
verdict $? "deps: with nothing missing it says '$said'"
deps 1000 no curl
[ $status -ne 0 ] && [ ! -s "$CALLS" ] && case $said in *'sudo apt-get update && sudo apt-get install -y --no-install-recommends curl'*) true ;; *) false ;; esac
verdict $? "deps: without sudo it says '$said'"
deps 1000 yes curl
[ $status -eq 0 ] && grep -q '^sudo apt-get install -y --no-install-recommends curl$' "$CALLS"
verdict $? "deps: with sudo it called '$(cat "$CALLS")'"
deps 0 no libuv1-dev
[ $status -eq 0 ] && grep -q '^apt-get install -y --no-install-recommends libuv1-dev$' "$CALLS" && ! grep -q sudo "$CALLS"
verdict $? "deps: as root it called '$(cat "$CALLS")'"

echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
