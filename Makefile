# Two commands do everything: `make demo` and `make test`. Both install first.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV_VERSION := 0.13.8
TORCH_VERSION := 2.13.0
export PATH := $(CURDIR)/$(BIN):$(PATH)
ifneq (,$(wildcard .env))
include .env
export
endif

.PHONY: demo up down test lint check bench faults base-model revision install install-dev lock help
.DEFAULT_GOAL := help

help:  ## Lists the commands
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

# torch comes first, by pip: the index that pip is set to decides between the CPU and the CUDA build. A torch that is there already stays.
$(VENV)/.installed: requirements.lock pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==$(TORCH_VERSION) uv==$(UV_VERSION)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --require-hashes --compile-bytecode -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -e .
	@touch $@

$(VENV)/.installed-dev: requirements-dev.lock $(VENV)/.installed
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --require-hashes -r requirements-dev.lock
	@touch $@

install: $(VENV)/.installed  ## Installs into .venv what the lock file names

install-dev: $(VENV)/.installed-dev

demo: install  ## Installs, then runs the main job on this machine: two batches to two verdicts (KEEP=1 leaves Airflow and MLflow up)
	@$(BIN)/python -m retune.local.demo

up: install  ## Starts Airflow and MLflow on this machine, and says where to look
	@$(BIN)/retune up

down:  ## Stops them
	@if test -x $(BIN)/retune; then $(BIN)/retune down; else echo "nothing is installed, so nothing runs"; fi

test: install-dev  ## Installs, then runs all tests (RETUNE_ALL_TIERS=1: a missing component is a failure, not a skip)
	@$(BIN)/pytest

lint: install-dev  ## Style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

check: lint  ## Style, types and fast tests: clean before every commit
	@$(BIN)/pytest -q -m "not integration"

bench: install-dev  ## Measures speed and memory as ratios in one run
	@$(BIN)/python benchmarks/bench.py

faults: install-dev  ## Does every fault of docs/reliability.md to real components, and writes its table (20 to 30 minutes)
	@$(BIN)/python tests/faults/run.py

base-model: install  ## Trains the small base model of the examples anew (one thread; it took 25 minutes on a busy machine)
	@$(BIN)/python examples/base_model.py

revision: install  ## Writes data.dvc and dvc.lock anew from the example batches (after a change to them or to preprocess)
	@$(BIN)/python examples/revision.py

lock: install  ## Resolves the lock files anew from pyproject.toml and constraints.txt
	$(BIN)/uv pip compile -q --universal --generate-hashes --python-version 3.11 --constraint constraints.txt --no-emit-package torch \
	  --no-header --no-annotate --upgrade pyproject.toml -o requirements.lock
	$(BIN)/uv pip compile -q --universal --generate-hashes --python-version 3.11 --constraint requirements.lock \
	  --no-header --no-annotate --upgrade --group dev -o requirements-dev.lock
