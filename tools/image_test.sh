#!/usr/bin/env bash
# Builds the Dockerfile's cpu target and tries it out, with no container engine and no registry of images:
#
#   sudo make image-test                                       doctor and quickstart, as the image's own user
#   sudo make image-test TEST=1 [PYTEST_ARGS="tests/cli ..."]  and `make test` in it
#   sudo make image-test IMAGE_FLAGS="--secret id=pip.conf,src=pip.conf"      more options of `buildah build`
#
# As root, after `apt install buildah debootstrap`. The base is a Debian made on the spot, or BASE_IMAGE=... where one can be
# pulled. All that was made is removed at the end; with KEEP=1 the images stay, and the next run starts from them.
# The times are printed at the end, however it ends. Measured ones: docs/container.md.
set -euo pipefail
cd "$(dirname "$0")/.."
export BUILDAH_ISOLATION=chroot
base=${BASE_IMAGE:-localhost/owpo-test-base}
image=localhost/owpo-test:cpu
keep=$([ "${KEEP:-0}" = 1 ] && echo true || echo false)
images=() container='' root='' child='' doing='' began=0 times=()

say() { printf '\n[image-test] %s\n' "$*" >&2; }
die() { echo "image_test.sh: $*" >&2; exit 2; }

# step WHAT COMMAND...: runs it, and keeps its time. In a session of its own, so that a signal ends it at once, and all of it.
step() {
    doing=$1 began=$SECONDS
    shift
    say "$doing ..."
    setsid "$@" &
    child=$!
    wait "$child"
    child=''
    times+=("$(printf '%6d s  %s' $((SECONDS - began)) "$doing")")
    doing=''
}

# The name: Docker puts a container's into its /etc/hosts, buildah does not.
inside() { step "$1" buildah run --hostname localhost --workingdir "$2" "$container" -- "${@:3}"; }

finish() {
    local code=$?
    trap '' INT TERM HUP
    [ -z "$doing" ] || times+=("$(printf '%6d s  %s: NOT FINISHED' $((SECONDS - began)) "$doing")")
    if [ -n "$child" ]; then
        kill -TERM -- "-$child" 2>/dev/null || true
        wait "$child" 2>/dev/null || true
    fi
    [ -z "$container" ] || buildah rm "$container" >/dev/null || true
    [ -z "$root" ] || rm -rf "$root"
    $keep || [ ${#images[@]} = 0 ] || buildah rmi --force "${images[@]}" >/dev/null || true
    say "$([ "$code" = 0 ] && echo passed || echo "ended with exit code $code")"
    [ ${#times[@]} = 0 ] || printf '%s\n' "${times[@]}"
    exit "$code"
}

[ "$(id -u)" = 0 ] || die "chroot isolation needs root"
command -v buildah >/dev/null || die "apt install buildah debootstrap"
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

if [ -z "${BASE_IMAGE:-}" ] && ! buildah inspect --type image "$base" >/dev/null 2>&1; then
    command -v debootstrap >/dev/null || die "apt install debootstrap, or name a BASE_IMAGE that can be pulled"
    root=$(mktemp -d)
    step "base, by debootstrap" debootstrap --variant=minbase --include=ca-certificates bookworm "$root" >/dev/null
    container=$(buildah from scratch)
    buildah add --quiet "$container" "$root" / >/dev/null
    buildah commit --quiet "$container" "$base" >/dev/null
    images+=("$base")
    buildah rm "$container" >/dev/null
    rm -rf "$root"
    container='' root=''
fi

images+=("$image")
step "build" buildah build --layers="$keep" --format docker --target cpu --build-arg "BASE_IMAGE=$base" "$@" --tag "$image" .

# From here on as the image's own user: doctor and quickstart where a user would be, the tests where the sources are.
# buildah allows 1,024 open files, Docker many more; gloo's groups of hundreds of tests need them.
container=$(buildah from --ulimit nofile=16384:16384 "$image")
inside "owpo doctor" /workspace owpo doctor
inside "owpo quickstart" /workspace owpo quickstart
[ "${TEST:-0}" != 1 ] || inside "make test ${PYTEST_ARGS:-}" /app make test PYTEST_ARGS="${PYTEST_ARGS:-}"

label() { buildah inspect --type image --format "{{index .Docker.Config.Labels \"org.opencontainers.image.$1\"}}" "$image"; }
say "version $(label version), revision $(label revision), $(buildah images --noheading --format '{{.Size}}' "$image")," \
    "run as $(buildah run "$container" -- id -un)"
