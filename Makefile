# Everything sets itself up: a virtual environment in $(VENV), pinned dependencies, this package.
PYTHON ?= python3
VENV ?= .venv
TESTS ?= tests
BIN := $(VENV)/bin
PINS := constraints/$(shell $(PYTHON) -c \
  'import sys; print("py312" if sys.version_info >= (3, 12) else "py311")').txt

.PHONY: help demo report test test-slow test-gpu test-slurm peers browser lint typecheck format newest lock
.PHONY: install-locked audit clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/core  ## train, stop, resume, evaluate and sample a 0.8M model (about 2 minutes)
	$(BIN)/python experiments/demo.py

report: $(VENV)/core  ## build/report/index.html: all studies, and all papers in the code
	$(BIN)/jaxlm report

test: $(VENV)/dev  ## quick tests
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not gpu and not tpu" $(TESTS)

test-slow: $(VENV)/dev  ## the tests marked slow
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder \
	  -m "slow and not gpu and not tpu and not slurm" $(TESTS)

test-gpu: $(VENV)/dev  ## the tests that need a GPU (install jax's CUDA plugin first: extra cuda)
	JAX_PLATFORMS=cuda,cpu $(BIN)/python -m pytest -m gpu $(TESTS)

test-slurm: $(VENV)/dev  ## the job file on a Slurm of two nodes, started here from Debian's packages
	$(BIN)/python -m pytest -m slurm -rs $(TESTS)/slurm

peers: $(VENV)/dev  ## add transformers and torch: more slow tests and benchmarks compare with them
	$(BIN)/pip install -q -c $(PINS) -e '.[dev,hf,bench]'

browser: $(VENV)/dev  ## add Playwright, and Debian's Chromium as root: slow tests look at the report
	$(BIN)/pip install -q -c $(PINS) -e '.[dev,browser]'
	command -v chromium >/dev/null || (apt-get update -qq && apt-get install -y -qq chromium)

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
	.venv-newest/bin/python -m pytest -n 2 --dist worksteal -m "not slow and not gpu and not tpu" $(TESTS)

lock: $(VENV)-lock/tools  ## constraints/*.lock.txt: the known-good versions with hashes of files
	for python in 3.11 3.12; do \
	  set=constraints/py$$(echo $$python | tr -d .); \
	  $(VENV)-lock/bin/uv pip compile -q --generate-hashes --no-annotate --no-emit-index-url \
	    --custom-compile-command "make lock" --python-version $$python \
	    --python-platform x86_64-manylinux_2_31 \
	    -c $$set.txt --extra dev pyproject.toml constraints/build.in -o $$set.lock.txt || exit 1; \
	done

install-locked: $(VENV)/bin/python  ## environment of locked files, by their hashes (Linux x86-64)
	$(BIN)/pip install -q --require-hashes --no-deps -r $(PINS:.txt=.lock.txt)
	$(BIN)/pip install -q --no-deps --no-build-isolation -e .
	@touch $(VENV)/dev $(VENV)/core

audit: $(VENV)-lock/tools  ## known vulnerabilities of the locked versions (needs an index)
	$(VENV)-lock/bin/pip-audit --strict --no-deps --disable-pip -r $(PINS:.txt=.lock.txt)

clean:  ## remove environments and caches
	rm -rf .venv .venv-lock .venv-newest .venv-second *.egg-info
	rm -rf .cache .pytest_cache .mypy_cache .ruff_cache

# Stamps: the environment is made once, and again when the dependencies change.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  (echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..."; exit 1)
	$(PYTHON) -m venv $(VENV) || \
	  (echo "the venv module is missing: on Debian, apt install python3-venv"; exit 1)

$(VENV)-lock/tools:
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/pip install -q uv pip-audit
	@touch $@

$(VENV)/core: $(VENV)/bin/python pyproject.toml $(PINS)
	$(BIN)/pip install -q -c $(PINS) -e '.[plot]'
	@touch $@

$(VENV)/dev: $(VENV)/bin/python pyproject.toml $(PINS)
	$(BIN)/pip install -q -c $(PINS) -e '.[dev]'
	@touch $@ $(VENV)/core
