#!/bin/sh
# bundle.sh VERSION: a tarball that runs where none of our packages is installed. Holds sitd, every shared library that it needs except the C library's
# own (they must match the machine's loader), the CUDA back end if it was built, the bundled models and the documents.
set -eu
cd "$(dirname "$0")/.."
name=sitd-$1-$(uname -m)
folder=build/$name
rm -rf "$folder"
mkdir -p "$folder/lib"
cp build/release/sitd "$folder/"
for plugin in build/release/libsitd_*.so; do [ -e "$plugin" ] && cp "$plugin" "$folder/"; done
ldd build/release/sitd | awk '$2 == "=>" && $3 ~ "^/" {print $3}' |
    grep -vE '/(libc|libm|libpthread|libdl|librt|libresolv|ld-linux[^/]*)\.so' | while read -r library; do cp -L "$library" "$folder/lib/"; done
cp -r deploy/models README.md LICENSE "$folder/"
tar -C build -czf "build/$name.tar.gz" "$name"
echo "build/$name.tar.gz ($(du -h "build/$name.tar.gz" | cut -f1)): unpack anywhere, run ./sitd serve --models models"
