# `make serve` and `make test` need Python 3.11 or newer and nothing else; each makes the environment it needs.

PYTHON ?= python3
PORT ?= 8000
EXAMPLES ?= 100000
SERVE := .venv-serve
DEV := .venv
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help serve demo test test-fast test-e2e check bench soak fuzz lock image-test clean

help: ## What there is to do
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

serve: $(SERVE)/installed ## Serve models/ on port 8000 (PORT=9000 for another), without torch
	@$(SERVE)/bin/evalmode serve models --port $(PORT)

demo: $(DEV)/installed ## The whole road: train, export, admission, serve, predict
	@scripts/demo $(DEV)/bin

test: $(DEV)/installed ## Every test, fast ones first
	$(DEV)/bin/python -m pytest -n auto
	$(DEV)/bin/python -m pytest -m "e2e or slow"

test-fast: $(DEV)/installed ## The fast tests alone
	$(DEV)/bin/python -m pytest -n auto

check: $(DEV)/installed ## Lint, format and types
	$(DEV)/bin/ruff check .
	$(DEV)/bin/ruff format --check .
	$(DEV)/bin/mypy

bench: $(DEV)/installed ## What is claimed, measured
	$(DEV)/bin/python -m benchmarks.credit_auc
	$(DEV)/bin/python -m benchmarks.start
	$(DEV)/bin/python -m benchmarks.fold
	$(DEV)/bin/python -m benchmarks.export_large
	$(DEV)/bin/python -m benchmarks.steady
	$(DEV)/bin/python -m benchmarks.seeing
	$(DEV)/bin/python -m benchmarks.chaos
	$(DEV)/bin/python -m benchmarks.faults
	$(DEV)/bin/python -m benchmarks.overload
	$(DEV)/bin/python -m benchmarks.serving

soak: $(DEV)/installed ## Half an hour of everything at once: broken requests, new versions, kills, bursts
	$(DEV)/bin/python -m benchmarks.soak

fuzz: $(DEV)/installed ## Damaged requests for the parsers, others every time (EXAMPLES=100000 of each kind)
	FUZZ_EXAMPLES=$(EXAMPLES) $(DEV)/bin/python -m pytest -n auto tests/service/test_fuzz_*.py

image-test: ## Build the container image, start it, predict from outside, print its size
	deploy/image-test

lock: ## Choose the newest versions anew and pin them in constraints.txt
	scripts/lock

clean: ## Remove the environments and what was built
	rm -rf $(SERVE) $(DEV) build evalmode.egg-info

# A stamp is written last, so an interrupted install is done again.
$(SERVE)/installed: pyproject.toml constraints.txt
	@echo "making $(SERVE) (once) …"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "evalmode needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Try make PYTHON=python3.12 $@")'
	@$(PYTHON) -m venv $(SERVE)
	@$(SERVE)/bin/python $(PIP_INSTALL) --editable '.[service]'
	@touch $@

$(DEV)/installed: pyproject.toml constraints.txt
	@echo "making $(DEV) with torch and the test tools (once; some minutes) …"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "evalmode needs Python 3.11 or newer; this is " + sys.version.split()[0])'
	@$(PYTHON) -m venv $(DEV)
	@$(DEV)/bin/python $(PIP_INSTALL) --editable '.[dev]'
	@touch $@
