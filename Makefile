# Everything a developer or the CI runs. `make` alone prints the list.

PYTHON ?= python3
# Where pip finds torch's CPU wheel when the configured places do not have it.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
export PYTHON TORCH_CPU_INDEX

TRAINER := .venv/.made
ENGINE := .venv-engine/.made
BIN := .venv/bin
TRITON := .venv/.triton
# Several ranks share the machine's cores in the tests: one thread each.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test check clean

help:  ## this list
	@echo "usage: make TARGET"
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

setup:  ## make both environments: .venv (trainer) and .venv-engine (SGLang), CPU builds
	@$(MAKE) --silent --no-print-directory -j2 $(TRAINER) $(ENGINE)
	@echo "Both environments are ready."

$(TRAINER): requirements/trainer-cpu.txt setup.py tools/make_env.sh
	@tools/make_env.sh trainer

$(ENGINE): requirements/engine-cpu.txt requirements/engine-cpu-nodeps.txt tools/make_env.sh \
		$(filter-out %.egg-info,$(wildcard owpo_megatron/sglang_cpu/*.toml owpo_megatron/sglang_cpu/*.py owpo_megatron/sglang_cpu/*/*.py))
	@tools/make_env.sh engine

quickstart: setup  ## train a small model from start to end on this machine, and show what it learned
	@$(BIN)/owpo quickstart

test: setup $(TRITON)  ## every test
	$(BIN)/python -m pytest -q --strict-markers --durations=15 --durations-min=2 $(PYTEST_ARGS)

# 1 GB that only these tests need, in a folder that only they look into.
$(TRITON): requirements/triton-test.txt $(TRAINER)
	rm -rf .venv/triton
	$(BIN)/python -m pip install --quiet --no-deps --target .venv/triton -r requirements/triton-test.txt
	touch $@

check: $(TRAINER)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:  ## remove both environments and every cache; runs/ stays
	rm -rf .venv .venv-engine build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
