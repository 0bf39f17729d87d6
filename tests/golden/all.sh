#!/bin/sh
# Replays every case of a full set of recordings (default ../shared/golden with its models in ../shared/models), where one is there.
set -u
cd "$(dirname "$0")/../.."
golden=${1:-../shared/golden} models=${2:-../shared/models}
[ -d "$golden" ] || { echo "no recordings in $golden: nothing more to replay"; exit 0; }
status=0
replay() {
    model=$1
    shift
    build/sitd replay --model "$model" "$@" || status=1
}
for weights in "$golden/sit-tiny.pt" "$golden/sit-tiny.safetensors"; do replay "$weights" "$golden"/sit-tiny.forward.safetensors "$golden"/transport/*.safetensors; done
for weights in "$golden/dit-tiny.pt" "$golden/dit-tiny.safetensors"; do replay "$weights" "$golden"/dit-tiny.forward.safetensors "$golden"/dit.*.safetensors; done
for weights in "$golden/maskdit-tiny.pt" "$golden/maskdit-tiny.safetensors"; do replay "$weights" "$golden"/maskdit-tiny.forward.safetensors "$golden"/maskdit.*.safetensors; done
replay "$models/fashion-dit.pt" "$golden"/fashion/dit*.safetensors
replay "$models/fashion-sit.pt" "$golden"/fashion/sit.forward.safetensors "$golden"/fashion/sit/*.safetensors
replay "$golden/vae-tiny" "$golden"/vae-tiny.golden.safetensors
exit $status
