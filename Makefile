# Everything a developer or the CI runs. `make` alone prints the list.

PYTHON ?= python3
# Where pip finds torch's CPU wheel when the configured places do not have it.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
export PYTHON TORCH_CPU_INDEX

TRAINER := .venv/.made
ENGINE := .venv-engine/.made
NEMO := .venv-nemo/.made
DOCS := .venv-docs/.made
SINKS := .venv-sinks/.made
PEERS := .venv-peers/.made
AGENTS := .venv-agents/.made
BIN := .venv/bin
TRITON := .venv/.triton
# Several ranks share the machine's cores in the tests: one thread each.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup setup-gpu setup-gpu-kernels quickstart test-fast test test-extra test-all matrix faults check docs nemo sinks peers agents slurm image image-gpu image-test clean

help:  ## this list
	@echo "usage: make TARGET"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

setup:  ## make both environments: .venv (trainer) and .venv-engine (SGLang), CPU builds
	@$(MAKE) --silent --no-print-directory -j2 $(TRAINER) $(ENGINE)
	@echo "Both environments are ready."

setup-gpu:  ## the same for NVIDIA GPUs: torch for CUDA 13, all of SGLang; Python 3.12 (docs/container.md)
	@tools/make_env.sh trainer-gpu
	@tools/make_env.sh engine-gpu
	@echo "Both environments are ready. make setup-gpu-kernels adds Transformer Engine."

setup-gpu-kernels:  ## add Transformer Engine to .venv, whose extension for torch is compiled; needs nvcc
	@tools/make_env.sh trainer-kernels

$(TRAINER): requirements/trainer-cpu.txt setup.py tools/make_env.sh
	@tools/make_env.sh trainer

$(ENGINE): requirements/engine-cpu.txt requirements/engine-cpu-nodeps.txt tools/make_env.sh \
		$(filter-out %.egg-info,$(wildcard owpo_megatron/sglang_cpu/*.toml owpo_megatron/sglang_cpu/*.py owpo_megatron/sglang_cpu/*/*.py owpo_megatron/sglang_cpu/*/*/*.py))
	@tools/make_env.sh engine

quickstart: setup  ## train a small model from start to end on this machine, and show what it learned
	@$(BIN)/owpo quickstart

# The tiers of the tests (docs/testing.md). PYTEST_ARGS selects in each of them: make test PYTEST_ARGS=tests/report
PYTEST := $(BIN)/python -m pytest -q --durations=15 --durations-min=2
# Two processes, each taking file after file: what a file's tests share is made once. One that crashes ends the run
# (xdist would wait for ever for the rest of its file), and so does one that is stuck where no signal is heard, below
# Python, a while after the test's own limit (pyproject.toml).
TWO := -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart=0 \
	-o faulthandler_timeout=1000 -o faulthandler_exit_on_timeout=true
EXTRA := slurm or nemo or sinks or triton or image or docs or extra
HEAVY := ranks or server or slow or $(EXTRA)

test-fast: $(TRAINER)  ## tests without ranks or engines, none above two CPU seconds: while you write
	$(PYTEST) $(TWO) -m "not ($(HEAVY))" --cpu-limit=$(CPU_LIMIT) $(PYTEST_ARGS)

# Above the two seconds that `slow` begins at: a busy machine makes CPU seconds longer, too.
CPU_LIMIT ?= 4

test: setup  ## the tests before every change: with ranks and real SGLang engines
	$(PYTEST) $(TWO) -m "not ($(EXTRA))" $(PYTEST_ARGS)

# Slurm's tests share the machine's one Slurm: in one process, after the others. 5: PYTEST_ARGS selects none of them.
test-extra: setup slurm  ## what needs more installed: Slurm (as root, by apt-get), NeMo-Run, trackers, verl and TRL, agents, Triton, the site, images
	@$(MAKE) --silent --no-print-directory -j3 $(TRITON) $(NEMO) $(SINKS) $(PEERS) $(AGENTS) $(DOCS)
	$(PYTEST) $(TWO) -m "($(EXTRA)) and not slurm" $(PYTEST_ARGS) || [ $$? = 5 ]
	$(PYTEST) -m slurm $(PYTEST_ARGS) || [ $$? = 5 ]

test-all:  ## test, then test-extra
	@$(MAKE) --no-print-directory test
	@$(MAKE) --no-print-directory test-extra

matrix: setup  ## hours: every layout with every family, curves of many seeds, fuzzing; writes docs/matrix.md
	$(PYTEST) -m matrix --matrix-result=docs/matrix.md $(PYTEST_ARGS)

# N faults of kinds drawn uniformly: make faults N=200 SEED=1; KIND="rank" for those whose name has it. RESULTS=FILE
# MINUTES=8 begins no fault after so many minutes, and goes on when it is called again.
N ?= 20
faults: $(TRAINER)  ## inject N faults into real runs (docs/reliability.md); SEED=... repeats a draw
	$(BIN)/python tests/faults/suite.py --count $(N) $(if $(SEED),--seed $(SEED)) $(if $(KIND),--kind "$(KIND)") \
		$(if $(RESULTS),--results $(RESULTS)) $(if $(MINUTES),--minutes $(MINUTES))

nemo: $(NEMO)  ## make .venv-nemo, the environment of NeMo-Run, for `owpo launch --with nemo-run`

$(NEMO): requirements/nemo.txt tools/make_env.sh
	@tools/make_env.sh nemo

sinks: $(SINKS)  ## make .venv-sinks, where the tests of W&B, MLflow and trackio run

$(SINKS): requirements/sinks.txt tools/make_env.sh
	@tools/make_env.sh sinks

peers: $(PEERS)  ## make .venv-peers, where methods are compared with the functions of verl and TRL

agents: $(AGENTS)  ## make .venv-agents, where agents and environments of other packages are tested

$(AGENTS): requirements/agents.txt tools/make_env.sh $(TRAINER)
	@tools/make_env.sh agents

$(PEERS): requirements/peers.txt tools/make_env.sh $(TRAINER)
	@tools/make_env.sh peers

slurm:  ## install Debian's Slurm for tests/slurm; reports where it cannot (no root, no apt-get)
	@tools/slurm_lab.sh install || echo "tests/slurm will be skipped"

# 1 GB that only the tests of Triton's kernels need, in a folder that only they look into.
$(TRITON): requirements/triton-test.txt $(TRAINER)
	rm -rf .venv/triton
	$(BIN)/python -m pip install --quiet --no-deps --target .venv/triton -r requirements/triton-test.txt
	touch $@

check: $(TRAINER)  ## ruff, codespell, mypy, hadolint and the English of tools/check_english.py
	$(BIN)/ruff check .
	$(BIN)/codespell
	$(BIN)/mypy
	$(BIN)/python tools/check_english.py
	$(BIN)/hadolint Dockerfile

# NO_MKDOCS_2_WARNING: mkdocs-material advertises its successor otherwise.
docs: $(DOCS)  ## build the documents' site, site/index.html; fails for a broken link or anchor
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet
	@echo "site/index.html is ready."

$(DOCS): requirements/docs.txt tools/make_env.sh
	@tools/make_env.sh docs

# docs/container.md; IMAGE_FLAGS may hold secrets for pip, another BASE_IMAGE, mounts.
BUILDER ?= docker
IMAGE_LABELS = --build-arg VERSION=$(shell sed -n 's/__version__ = "\(.*\)"/\1/p' owpo_megatron/__init__.py) \
	--build-arg REVISION=$(shell git rev-parse HEAD 2>/dev/null || echo unknown)

image:  ## the CPU image owpo:cpu (BUILDER=docker, podman or buildah; IMAGE_FLAGS=...)
	$(BUILDER) build --target cpu $(IMAGE_LABELS) $(IMAGE_FLAGS) -t owpo:cpu .

image-gpu:  ## the GPU image owpo:gpu, on NVIDIA's CUDA 13 base
	$(BUILDER) build --target gpu $(IMAGE_LABELS) \
		--build-arg BASE_IMAGE=nvidia/cuda:13.0.2-cudnn-devel-ubuntu24.04@sha256:ae7f650405a3964972dacfa889273bf8e3fbe9709899afd187da01c4cdff3105 \
		$(IMAGE_FLAGS) -t owpo:gpu .

# By buildah unless a builder is named: it needs neither a container engine nor a registry of images.
image-test:  ## build the CPU image and run the quickstart in it (BUILDER=buildah, as root; TEST=1: and every test)
	BUILDER=$(if $(filter file,$(origin BUILDER)),buildah,$(BUILDER)) tools/image_test.sh $(IMAGE_LABELS) $(IMAGE_FLAGS)

clean:  ## remove the environments and every cache; runs/ stays
	rm -rf .venv .venv-engine .venv-nemo .venv-sinks .venv-peers .venv-agents .venv-docs site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
