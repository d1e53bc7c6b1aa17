# Every target works in a fresh clone: GNU make and Python 3.11 or newer are all that is needed.

PYTHON ?= python3
BIN := .venv/bin
DEMO_ARGS ?=
CHECK_ARGS ?=
BUNDLE_ARGS ?=
PYTEST_ARGS ?=

# Else threads of torch and FAISS that have nothing to do spin, and take the cores from those that have.
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help

.PHONY: help
help: ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version) if sys.version_info < (3, 11) else None'
	@echo "Making .venv with pinned versions of torch and all else: a few minutes, once"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

.PHONY: demo
demo: .venv/.installed ## Train a timm model on handwritten digits with the callback and draw its clusters
	$(BIN)/python -m benchmarks.demo $(DEMO_ARGS)

# Tests that need a GPU are for `make gpu-check`, and on a CPU all others have one result.
test test-long: export CUDA_VISIBLE_DEVICES =

.PHONY: test
test: .venv/.installed ## Run all tests; PYTEST_ARGS=--cov measures their coverage
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal $(PYTEST_ARGS)

.PHONY: test-long
test-long: .venv/.installed ## Run the tests that take minutes: the timm zoo, ranks, kills, fuzz
	$(BIN)/python -m pytest -m long $(PYTEST_ARGS)

.PHONY: lint
lint: .venv/.installed ## Check style, types and the import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

.PHONY: format
format: .venv/.installed ## Put the code into the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: bench
bench: .venv/.installed ## Train with and without the callback on the digits; one JSON line each
	$(BIN)/python -m benchmarks.gain.train --regularizer none
	$(BIN)/python -m benchmarks.gain.train --regularizer dropcluster

.PHONY: gpu-check
gpu-check: $(if $(wildcard .gpu),,.venv/.installed) ## Try all of it on a GPU in ten minutes, against goals; options in CHECK_ARGS
	@python=$(BIN)/python; [ -x $$python ] || python=$(PYTHON); $$python -m benchmarks.gpu.check $(CHECK_ARGS)

.PHONY: gpu-bundle
gpu-bundle: .venv/.installed ## Pack into .gpu/ what a GPU machine without internet lacks
	$(BIN)/python -m benchmarks.gpu.bundle $(BUNDLE_ARGS)

.PHONY: docs
docs: .venv/.installed ## Build the documentation into site/; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet
	@echo site/index.html

.PHONY: dist
dist: .venv/.installed ## Build wheel and sdist into dist/, and try the wheel in an empty environment
	rm -rf build dist
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[release]'
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv build/empty
	build/empty/bin/pip install --quiet --constraint constraints.txt dist/*.whl
	build/empty/bin/python -I tests/smoke.py

.PHONY: constraints
constraints: ## Pin what the newest releases resolve to
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet --editable '.[dev,release]'
	{ head -1 constraints.txt; $(BIN)/pip freeze --exclude-editable | sed -E 's/^faiss-gpu(==.*)/faiss-cpu\1\n&/'; } > constraints.new
	mv constraints.new constraints.txt

.PHONY: clean
clean: ## Remove what the other targets made
	rm -rf .venv .gpu .coverage .pytest_cache .ruff_cache .hypothesis .import_linter_cache demo site build dist *.egg-info
