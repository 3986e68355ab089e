#!/usr/bin/env bash
# Builds the Dockerfile's cpu target and runs the quickstart in it, with no container engine and no registry of images:
#
#   tools/image_test.sh [options of buildah build, e.g. --secret id=pip.conf,src=pip.conf]
#
# As root, after `apt install buildah debootstrap`. The base is a Debian made on the spot, or BASE_IMAGE=... where one can be
# pulled. The images are removed at the end, unless KEEP=1. Measured times: docs/container.md.
set -euo pipefail
cd "$(dirname "$0")/.."
export BUILDAH_ISOLATION=chroot
base=${BASE_IMAGE:-localhost/owpo-test-base}
image=localhost/owpo-test:cpu
made=()

say() { printf '\n[image-test] %s\n' "$*"; }
remove() { [ "${KEEP:-0}" = 1 ] || buildah rmi --force "${made[@]}" >/dev/null 2>&1 || true; }
trap remove EXIT

[ "$(id -u)" = 0 ] || { echo "image_test.sh: chroot isolation needs root" >&2; exit 2; }
command -v buildah >/dev/null || { echo "image_test.sh: apt install buildah debootstrap" >&2; exit 2; }

if ! buildah inspect --type image "$base" >/dev/null 2>&1 && [ -z "${BASE_IMAGE:-}" ]; then
    began=$SECONDS
    root=$(mktemp -d)
    debootstrap --variant=minbase --include=ca-certificates bookworm "$root" >/dev/null
    container=$(buildah from scratch)
    buildah add --quiet "$container" "$root" / >/dev/null
    buildah commit --quiet --rm "$container" "$base" >/dev/null
    rm -rf "$root"
    made+=("$base")
    say "the base, by debootstrap: $((SECONDS - began)) s"
fi

began=$SECONDS
buildah build --layers --format docker --target cpu --build-arg "BASE_IMAGE=$base" "$@" --tag "$image" .
made+=("$image")
say "built in $((SECONDS - began)) s: $(buildah images --noheading --format '{{.Size}}' "$image")"

# Not as root: the image's own user, in its own working directory.
container=$(buildah from "$image")
trap 'buildah rm "$container" >/dev/null; remove' EXIT
began=$SECONDS
buildah run "$container" -- owpo doctor
buildah run "$container" -- owpo quickstart
say "doctor and quickstart, as $(buildah run "$container" -- id -un): $((SECONDS - began)) s"
