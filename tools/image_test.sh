#!/usr/bin/env bash
# Builds the Dockerfile's cpu target and tries it out:
#
#   make image-test BUILDER=docker                             doctor and quickstart, as the image's own user; also podman
#   sudo make image-test                                       the same by buildah, with no container engine
#   make image-test TEST=1 [PYTEST_ARGS="tests/cli ..."]       and `make test` in it
#   make image-test IMAGE_FLAGS="--secret id=pip.conf,src=pip.conf"           more options of the build
#   make image-test RUN_FLAGS="--network host"                 more options of `docker run` or `podman run`
#
# The base is the Dockerfile's, or BASE_IMAGE=...; buildah's is a Debian made on the spot, so that no registry of images is
# needed (apt install buildah debootstrap). All that was made is removed at the end; with KEEP=1 the images stay, and the next
# run starts from them. The times are printed at the end, however it ends. Measured ones: docs/container.md.
set -euo pipefail
cd "$(dirname "$0")/.."
export BUILDAH_ISOLATION=chroot
builder=${BUILDER:-buildah}
made_base=localhost/owpo-test-base
image=localhost/owpo-test:cpu
base=${BASE_IMAGE:-}
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

# inside WHAT FOLDER COMMAND...: as the image's own user.
inside() {
    if [ "$builder" != buildah ]; then
        # shellcheck disable=SC2086  # several options
        step "$1" "$builder" run --rm --shm-size=1g ${RUN_FLAGS:-} --workdir "$2" --entrypoint tini "$image" -- "${@:3}"
        return
    fi
    # buildah allows 1,024 open files, Docker many more; gloo's groups of hundreds of tests need them.
    [ -n "$container" ] || container=$(buildah from --ulimit nofile=16384:16384 "$image")
    # The name: Docker puts a container's into its /etc/hosts, buildah does not.
    step "$1" buildah run --hostname localhost --workingdir "$2" "$container" -- "${@:3}"
}

label() { "$builder" inspect --type image --format "{{index $labels \"org.opencontainers.image.$1\"}}" "$image"; }

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
    $keep || [ ${#images[@]} = 0 ] || "$builder" rmi --force "${images[@]}" >/dev/null || true
    say "$([ "$code" = 0 ] && echo passed || echo "ended with exit code $code")"
    [ ${#times[@]} = 0 ] || printf '%s\n' "${times[@]}"
    exit "$code"
}

case $builder in
    docker) options=("--no-cache=$($keep && echo false || echo true)") labels=.Config.Labels ;;
    podman) options=("--layers=$keep" --format docker) labels=.Config.Labels ;;
    buildah) options=("--layers=$keep" --format docker) labels=.Docker.Config.Labels ;;
    *) die "BUILDER=$builder: docker, podman or buildah" ;;
esac
[ "$builder" != buildah ] || [ "$(id -u)" = 0 ] || die "buildah's chroot isolation needs root; BUILDER=docker or podman does not"
command -v "$builder" >/dev/null || die "no $builder here; apt install buildah debootstrap, or BUILDER=docker or podman"
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

if [ "$builder" = buildah ] && [ -z "$base" ]; then
    base=$made_base
    if ! buildah inspect --type image "$base" >/dev/null 2>&1; then
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
fi

images+=("$image")
[ -z "$base" ] || options+=(--build-arg "BASE_IMAGE=$base")
step "build" "$builder" build "${options[@]}" --target cpu "$@" --tag "$image" .

# doctor and quickstart where a user would be, the tests where the sources are
inside "owpo doctor" /workspace owpo doctor
inside "owpo quickstart" /workspace owpo quickstart
[ "${TEST:-0}" != 1 ] || inside "make test ${PYTEST_ARGS:-}" /app make test PYTEST_ARGS="${PYTEST_ARGS:-}"

say "version $(label version), revision $(label revision), run as $(inside "user" / id -un 2>/dev/null)"
"$builder" images "$image"
