# make sample             images of PROMPT in a new folder below out/, from the model in the package or MODEL=NAME
# make check              lint, types and the tests of CHECKED, before each commit
# make test               lint, types and all tests
# make docs               the site of docs/ in site/; open site/index.html
# make test-structure     compiled programs for an H100 and a TPU, neither of which need be there (4 GB)
#
# Each makes its own virtual environment. Another Python or JAX gets its own: make test PYTHON=python3.12 JAX=0.11.2

PYTHON ?= python3
JAX ?=
VENV ?= .venv$(if $(JAX)$(filter-out python3,$(PYTHON)),-$(notdir $(PYTHON)))$(if $(JAX),-jax$(JAX))
BIN := $(VENV)/bin
VERSIONS := $(if $(JAX),jax==$(JAX) jaxlib==$(JAX))

MODEL ?= demo
PROMPT ?= a parrot
OUT ?=
N ?= 16

# Tests with programs that are optimised, as those of a user are; those of the others are not, see tests/conftest.py.
OPTIMISED := tests/test_golden.py tests/test_demo.py tests/test_demo_scenes.py tests/models/test_transformer.py tests/models/test_attention.py \
	tests/models/test_kernels.py
# Layout, configuration, files, data, and parity with the original in training; `check` adds parity in sampling. With lint
# and types about a minute on two idle cores (docs/log.md).
CHECKED := tests/test_layout.py tests/test_contributing.py tests/config tests/text tests/storage tests/data \
	tests/training/test_step.py

.PHONY: sample check lint test docs test-structure

sample: $(VENV)/installed
	$(BIN)/mindalle sample "$(PROMPT)" --model "$(MODEL)" --num-candidates $(N) $(if $(OUT),--out "$(OUT)")

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

check: lint
	$(BIN)/python -m pytest -q -n 2 --dist loadfile $(CHECKED)
	XLA_FLAGS=--xla_backend_optimization_level=3 $(BIN)/python -m pytest -q -n 2 --dist load tests/test_golden.py

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile $(OPTIMISED:%=--ignore=%)
	XLA_FLAGS=--xla_backend_optimization_level=3 $(BIN)/python -m pytest -n 2 --dist load $(OPTIMISED)

docs: $(VENV)/installed-docs
	$(BIN)/zensical build --clean --strict

test-structure: $(VENV)-structure/installed
	$(VENV)-structure/bin/python -m pytest -ra tests/structure/test_devices.py

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable . $(VERSIONS)
	@touch $@

$(VENV)/installed-test: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[test]' $(VERSIONS)
	@touch $@

$(VENV)/installed-docs: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[docs]' $(VERSIONS)
	@touch $@

$(VENV)-structure/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)-structure
	$(VENV)-structure/bin/python -m pip install --quiet --editable '.[structure]' $(VERSIONS)
	@touch $@
