# Everything sets itself up: a virtual environment in $(VENV), pinned dependencies, this package.
PYTHON ?= python3
VENV ?= .venv
TESTS ?= tests
BIN := $(VENV)/bin
PINS := constraints/$(shell $(PYTHON) -c 'import sys; print("py312" if sys.version_info >= (3, 12) else "py311")').txt

.PHONY: help demo test test-slow peers lint typecheck format newest clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/core  ## train, stop, resume, evaluate and sample a 1M-parameter model (about 3 minutes)
	$(BIN)/python experiments/demo.py

test: $(VENV)/dev  ## quick tests
	$(BIN)/python -m pytest -n 2 -m "not slow and not gpu and not tpu" $(TESTS)

test-slow: $(VENV)/dev  ## the tests marked slow
	$(BIN)/python -m pytest -n 2 -m "slow and not gpu and not tpu" $(TESTS)

peers: $(VENV)/dev  ## add transformers and torch: more slow tests and benchmarks compare with them
	$(BIN)/pip install -q -c $(PINS) -e '.[dev,hf,bench]'

lint: $(VENV)/dev  ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(VENV)/dev  ## mypy
	$(BIN)/mypy

format: $(VENV)/dev  ## rewrite files in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

newest:  ## quick tests against the newest release of every dependency, in a new environment
	rm -rf .venv-newest
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip install -q --upgrade --upgrade-strategy eager -e '.[dev]'
	.venv-newest/bin/python -m pytest -n 2 -m "not slow and not gpu and not tpu" $(TESTS)

clean:  ## remove environments and caches
	rm -rf .venv .venv-newest .venv-second .cache .pytest_cache .mypy_cache .ruff_cache *.egg-info

# Stamps: the environment is made once, and again when the dependencies change.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed: make PYTHON=python3.12 ..."'
	$(PYTHON) -m venv $(VENV) || (echo "the venv module is missing: on Debian, apt install python3-venv"; exit 1)

$(VENV)/core: $(VENV)/bin/python pyproject.toml $(PINS)
	$(BIN)/pip install -q -c $(PINS) -e '.[plot]'
	@touch $@

$(VENV)/dev: $(VENV)/bin/python pyproject.toml $(PINS)
	$(BIN)/pip install -q -c $(PINS) -e '.[dev]'
	@touch $@ $(VENV)/core
