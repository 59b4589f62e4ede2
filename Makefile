# Two commands do everything: `make demo` and `make test`. Both install first.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV_VERSION := 0.13.8
TORCH_VERSION := 2.13.0
PIP_AUDIT_VERSION := 2.10.1
export PATH := $(CURDIR)/$(BIN):$(PATH)
ifneq (,$(wildcard .env))
include .env
export
endif

.PHONY: demo up down test lint scan-secrets audit check bench faults base-model revision secrets images install install-dev lock help
.DEFAULT_GOAL := help

help:  ## Lists the commands
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

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

lint: install-dev scan-secrets  ## Style, types and no secret in a tracked file
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

# What looks like a secret and is none says so in its line: `# pragma: allowlist secret`.
scan-secrets: install-dev  ## Fails where a tracked file holds what looks like a secret
	@set -o pipefail; git ls-files -z | xargs -0 $(BIN)/detect-secrets-hook --baseline .secrets.baseline

# --strict: where the database of vulnerabilities cannot be asked, or knows nothing of a package, this fails. It is no part of `make check`,
# which needs no network. torch is in no lock file, and is not asked for.
audit: install  ## Fails where a locked package has a known vulnerability (needs the network: asks PyPI)
	@$(BIN)/uv tool run -q --from pip-audit==$(PIP_AUDIT_VERSION) pip-audit --strict --progress-spinner off --disable-pip --require-hashes \
	  -r requirements.lock -r requirements-production.lock

check: lint  ## Style, types, secrets and fast tests: clean before every commit
	@$(BIN)/pytest -q -m "not integration"

bench: install-dev  ## Measures speed and memory as ratios in one run
	@$(BIN)/python benchmarks/bench.py

faults: install-dev  ## Does every fault of docs/reliability.md to real components, and writes its table (long; on a quiet machine)
	@$(BIN)/python tests/faults/run.py

base-model: install  ## Trains the small base model of the examples anew (one thread; it took 25 minutes on a busy machine)
	@$(BIN)/python examples/base_model.py

revision: install  ## Writes data.dvc and dvc.lock anew from the example batches (after a change to them or to preprocess)
	@$(BIN)/python examples/revision.py

secrets:  ## Writes into .env the secrets of docker-compose.yml that it lacks (nothing to install; what is there stays)
	@PYTHONPATH=src $(PYTHON) -m retune.production.secrets

images:  ## Builds the images of docker-compose.yml from a checkout without changes
	@test -z "$$(git status --porcelain)" || { echo "the checkout has changes: commit them first, since lineage names the commit"; exit 1; }
	RETUNE_CODE_COMMIT=$$(git rev-parse HEAD) docker compose build

lock: install  ## Resolves the lock files anew from pyproject.toml and constraints.txt
	$(BIN)/uv pip compile -q --universal --generate-hashes --python-version 3.11 --constraint constraints.txt --no-emit-package torch \
	  --no-header --no-annotate --upgrade pyproject.toml -o requirements.lock
	$(BIN)/uv pip compile -q --universal --generate-hashes --python-version 3.11 --constraint requirements.lock \
	  --no-header --no-annotate --upgrade --group dev -o requirements-dev.lock
	$(BIN)/uv pip compile -q --universal --generate-hashes --python-version 3.11 --constraint requirements.lock \
	  $$(sed -nE 's/^([a-z0-9.-]+)==.*/--no-emit-package \1/p' requirements.lock) \
	  --no-header --no-annotate --upgrade --group production -o requirements-production.lock
