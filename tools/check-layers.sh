#!/bin/sh
# Each layer includes only itself and lower ones; vendor headers stay in their place. Prints offenders, exit 1 if any.
# Layers: kernels 0, core/base 1, core/tensor core/io 2, core/model core/diffusion 3 (not each other), core/engine 4, proto 5, server 6.
set -eu
cd "$(dirname "$0")/.."
level() {
    case $1 in
    kernels/*) echo 0 ;; core/base/*) echo 1 ;; core/tensor/* | core/io/*) echo 2 ;; core/model/* | core/diffusion/*) echo 3 ;;
    core/engine/* | core/train/*) echo 4 ;; proto/*) echo 5 ;; server/*) echo 6 ;; *) echo 9 ;;
    esac
}
sources="--include=*.c --include=*.h --include=*.cu --include=*.cuh"
# allowed VENDOR-HEADER-PATTERN FILE-PATTERN
vendor() { grep -rnE "^[[:space:]]*#[[:space:]]*include[[:space:]]*<($1)" $sources kernels core proto server | grep -vE "^($2)" || true; }
bad=$(
    grep -rnE '^[[:space:]]*#[[:space:]]*include[[:space:]]*"' $sources kernels core proto server | while IFS=: read -r file line text; do
        included=$(printf '%s' "$text" | sed -E 's/.*"([^"]*)".*/\1/')
        from=$(level "$file") to=$(level "$included")
        if [ "$to" -gt "$from" ]; then echo "$file:$line: includes the higher layer $included"; fi
        case $file:$included in
        core/model/*:core/diffusion/* | core/diffusion/*:core/model/*) echo "$file:$line: model and diffusion must not include each other ($included)" ;;
        server/cmd_*) ;;
        server/*:core/model/* | server/*:core/tensor/* | server/*:kernels/*) echo "$file:$line: the daemon knows no tensors ($included)" ;;
        esac
    done
    vendor 'dnnl|oneapi/dnnl' 'kernels/cpu/'
    vendor 'cuda|cublas|cudnn|nccl' 'kernels/cuda/'
    vendor 'microhttpd|uv\.h' 'server/'
    vendor 'png\.h|jpeglib\.h|jerror\.h|zlib\.h|openssl/' 'core/io/'
    vendor 'jansson' 'core/io/|proto/|server/cmd_'
)
[ -z "$bad" ] || { printf '%s\n' "$bad"; exit 1; }
echo "layers: clean"
