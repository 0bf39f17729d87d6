#!/bin/sh
# Installs the Debian packages that the named purposes (build, run, test, train) need and that are missing: as root, or through sudo that asks no password;
# otherwise prints the one line to run.
set -eu
need=""
for purpose in "$@"; do
    case $purpose in
    build) need="$need gcc libc6-dev make libmicrohttpd-dev libuv1-dev libjansson-dev libdnnl-dev libpng-dev libjpeg62-turbo-dev zlib1g-dev libssl-dev" ;;
    run) need="$need curl" ;;
    train) need="$need dataset-fashion-mnist" ;;
    test) need="$need clang libclang-rt-14-dev python3 python3-pytest python3-yaml chromium chromium-driver python3-selenium" ;;
    *) echo "deps.sh: no purpose '$purpose'" >&2; exit 2 ;;
    esac
done
missing=""
for package in $need; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' || missing="$missing $package"
done
[ -n "$missing" ] || exit 0
echo "installing:$missing"
install="apt-get install -y --no-install-recommends$missing"
if [ "$(id -u)" = 0 ]; then sudo=""
elif sudo -n true 2>/dev/null; then sudo="sudo"
else
    echo "This needs packages. Please run: sudo apt-get update && sudo $install" >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! { $sudo apt-get update && $sudo $install; } >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    echo "deps.sh: apt-get failed" >&2
    exit 1
fi
