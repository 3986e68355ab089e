# The CPU target: trainer and engine environments, as `make setup` makes them.
#
#   docker build -t owpo:cpu .
#   docker run --rm -it --shm-size=1g owpo:cpu quickstart
#
# The GPU target is not here: it was not built. It needs a CUDA base image, torch and SGLang with CUDA, Transformer Engine and
# apex compiled for it, and a machine with a GPU to test them on.
#
# --build-arg TORCH_CPU_INDEX=... replaces the index of the Makefile.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc g++ git make \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /app
# The environments first: a change of the code alone does not make them again.
COPY Makefile setup.py pyproject.toml ./
COPY requirements requirements
COPY tools/make_env.sh tools/make_env.sh
COPY owpo_megatron/__init__.py owpo_megatron/__init__.py
COPY owpo_megatron/sglang_cpu owpo_megatron/sglang_cpu
ARG TORCH_CPU_INDEX
ENV PIP_NO_CACHE_DIR=1
RUN make setup
COPY . .

FROM ${BASE_IMAGE}
# gcc: some packages compile small helpers when they are first used.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc g++ git make libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home owpo
COPY --from=build --chown=owpo /app /app
WORKDIR /app
RUN mkdir -p runs cache && chown owpo runs cache
USER owpo
ENV PATH=/app/.venv/bin:$PATH PYTHONUNBUFFERED=1
# runs/ and cache/ are written below the working directory: mount volumes there to keep them.
VOLUME ["/app/runs", "/app/cache"]
ENTRYPOINT ["owpo"]
CMD ["--help"]
