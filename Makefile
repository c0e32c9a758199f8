# One recipe a habit; the checks call these and nothing else.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := PIP_CONSTRAINT=$(CURDIR)/constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip

help:  ## list the recipes
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

# torch first and by itself: the pinned version is the CPU build where one is offered, and no later range can pull in another.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' || \
		{ echo "Python 3.11 or 3.12 is needed, $(PYTHON) is $$($(PYTHON) --version); try make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet pip setuptools wheel
	$(PIP) install --quiet "$$(grep '^torch==' constraints.txt)"
	$(PIP) install --quiet --editable '.[dev]'
	@touch $@

setup: $(READY)  ## make .venv from the pinned versions

discover: $(READY)  ## run one round of discovery
	@$(BIN)/gnome discover

test: $(READY)  ## run the tests
	$(BIN)/python -m pytest -n 2 --dist loadfile

gpu: $(READY)  ## run the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu tests/gpu

check: lint types imports  ## everything but the tests

lint: $(READY)  ## style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)  ## static types
	$(BIN)/mypy

imports: $(READY)  ## imports go down only
	$(BIN)/lint-imports

seeds: $(READY)  ## rebuild the shipped seeds, references and validation set (some hours on one core)
	$(BIN)/python data/make_seeds.py

clean:  ## remove what was built
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

.PHONY: help setup discover test gpu check lint types imports seeds clean
