#!/bin/sh
# Replays the recorded cases of tests/golden on the GPU in float32; exit status 1 if any is off.
cd "$(dirname "$0")/../.." || exit 2
sitd=${SITD:-build/sitd}
"$sitd" replay --backend cuda --model tests/golden/sit-tiny.safetensors tests/golden/sit-tiny.forward.safetensors tests/golden/transport/*.safetensors &&
"$sitd" replay --backend cuda --model tests/golden/sit-tiny.safetensors tests/golden/train/train.[GLV]*.safetensors &&
"$sitd" replay --backend cuda --model tests/golden/dit-tiny.safetensors tests/golden/train/train.dit.hybrid.safetensors &&
"$sitd" replay --backend cuda --model tests/golden/vae-small tests/golden/vae-small.golden.safetensors
