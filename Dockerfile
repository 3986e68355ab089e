# Both environments, trainer and engine, and the project, in one image. docs/container.md has the commands, what was built and
# run, and what was not.
#
#   docker build --target cpu -t owpo:cpu .                              (make image)
#   docker build --target gpu --build-arg BASE_IMAGE=nvidia/cuda:... .   (make image-gpu has the base's digest)
#   docker run --rm -it --shm-size=1g -v "$PWD/work:/workspace" owpo:cpu quickstart
#
# Any base works that has Debian's apt and Python 3.10 to 3.12; the gpu target's needs CUDA 13 with nvcc and cuDNN.
# A proxy's certificate or another package index come in as build secrets and leave no trace: docs/container.md.
ARG BASE_IMAGE=debian:12.11-slim@sha256:2424c1850714a4d94666ec928e24d86de958646737b1d113f5b2207be44d37d8

# What both targets share: the system's packages, an unprivileged user, how the image is started and asked for its health.
FROM ${BASE_IMAGE} AS base
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# gcc and python3-dev stay in: triton and SGLang compile small helpers when they are first used. git: for a checkout's tests.
# tini: the first process of a container passes `docker stop` on to owpo, and buries what its ranks and engines leave behind.
# The base fixes the release; within it Debian drops old versions of a package from its archive, so none is named here.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ca-certificates gcc g++ git libgomp1 libnuma1 make python3 python3-dev python3-venv tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --home-dir /workspace --no-create-home --shell /bin/bash owpo \
    && install -d -m 1777 /workspace \
    && install -d -o owpo -g owpo /app
ENV PATH=/app/.venv/bin:$PATH \
    HOME=/workspace \
    PYTHONUNBUFFERED=1
# runs/ and cache/ are written below the working directory, whoever the user is: mount a volume there to keep them.
WORKDIR /workspace
ENTRYPOINT ["tini", "--", "owpo"]
CMD ["--help"]
# Asks the server of `owpo serve`; a container that runs something else counts as healthy.
HEALTHCHECK --interval=30s --timeout=10s --start-period=300s --retries=3 CMD ["python", "/app/tools/container_health.py"]
EXPOSE 30000

# ------------------------------------------------------------------------------------------------------------------------- GPU
# Never run. Its trainer was built, on another base and without a GPU: docs/container.md.
FROM base AS gpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /app
USER owpo
COPY --chown=owpo:owpo LICENSE Makefile setup.py pyproject.toml ./
COPY --chown=owpo:owpo requirements requirements
COPY --chown=owpo:owpo tools/make_env.sh tools/make_env.sh
COPY --chown=owpo:owpo owpo_megatron/__init__.py owpo_megatron/__init__.py
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf,mode=0444 --mount=type=secret,id=ca.crt,mode=0444 \
    command -v nvcc || { echo "the gpu target needs a base with CUDA: see make image-gpu" >&2; exit 1; } \
    && tools/make_env.sh trainer-gpu
# Compiles Transformer Engine's extension for torch, 28 C++ files.
ARG MAX_JOBS=8
# hadolint ignore=DL3059
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf,mode=0444 --mount=type=secret,id=ca.crt,mode=0444 \
    tools/make_env.sh trainer-kernels
# hadolint ignore=DL3059
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf,mode=0444 --mount=type=secret,id=ca.crt,mode=0444 \
    tools/make_env.sh engine-gpu
COPY --chown=owpo:owpo . .
WORKDIR /workspace
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="owpo_megatron, GPU" \
    org.opencontainers.image.description="One-Way Policy Optimization on Megatron and SGLang" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}"

# ------------------------------------------------------------------------------------------------------------------------- CPU
FROM base AS cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /app
# As the image's user from the start: a change of owner afterwards would copy 5 GB.
USER owpo
# The two large environments first: a change of the code alone does not make them again.
COPY --chown=owpo:owpo LICENSE Makefile setup.py pyproject.toml ./
COPY --chown=owpo:owpo requirements requirements
COPY --chown=owpo:owpo tools/make_env.sh tools/make_env.sh
COPY --chown=owpo:owpo owpo_megatron/__init__.py owpo_megatron/__init__.py
COPY --chown=owpo:owpo owpo_megatron/sglang_cpu owpo_megatron/sglang_cpu
ARG TORCH_CPU_INDEX
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf,mode=0444 --mount=type=secret,id=ca.crt,mode=0444 \
    make setup && make .venv/.triton
# NeMo-Run's (a minute) is tried out with the project's own pipeline, so it comes after that.
COPY --chown=owpo:owpo owpo_megatron owpo_megatron
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf,mode=0444 --mount=type=secret,id=ca.crt,mode=0444 \
    make nemo
COPY --chown=owpo:owpo . .
# The environments are of these very sources, whatever times a fresh clone gave the files: `make test` has nothing to install.
RUN touch .venv/.made .venv-engine/.made .venv-nemo/.made .venv/.triton
WORKDIR /workspace
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="owpo_megatron, CPU" \
    org.opencontainers.image.description="One-Way Policy Optimization on Megatron and SGLang" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}"
