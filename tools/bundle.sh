#!/bin/sh
# bundle.sh VERSION FOLDER: a tarball of what was built in FOLDER that runs where none of our packages is installed. Holds sitd, every shared library that
# it needs except the C library's own (they must match the machine's loader), the CUDA back end if it was built, the bundled models and the documents.
# NVIDIA's cuBLASLt (500 MB) is not in it: the CUDA back end takes the machine's own, beside itself, in lib, in /usr/local/cuda/lib64 or where the
# loader looks. Without it, or without a driver, the CPU serves.
set -eu
cd "$(dirname "$0")/.."
name=sitd-$1-$(uname -m)
from=$2
folder=build/$name
rm -rf "$folder"
mkdir -p "$folder/lib"
cp "$from/sitd" "$folder/"
for plugin in "$from"/libsitd_*.so; do [ -e "$plugin" ] && cp "$plugin" "$folder/"; done
ldd "$from/sitd" | awk '$2 == "=>" && $3 ~ "^/" {print $3}' |
    grep -vE '/(libc|libm|libpthread|libdl|librt|libresolv|ld-linux[^/]*)\.so' | while read -r library; do cp -L "$library" "$folder/lib/"; done
mkdir "$folder/deploy"
cp -r deploy/models deploy/recipes "$folder/deploy/"
cp -r deploy/products docs README.md SPEED.md LICENSE "$folder/"
tar -C build -czf "build/$name.tar.gz" "$name"
for plugin in "$folder"/libsitd_*.so; do
    [ -e "$plugin" ] && echo "$(basename "$plugin") takes from the machine: $(ldd "$plugin" | awk '/cublas|not found/ {print $1}' | sort -u | tr '\n' ' ')"
done
echo "build/$name.tar.gz ($(du -h "build/$name.tar.gz" | cut -f1)): unpack anywhere, run ./sitd serve in its folder"
