# make sample             pictures of PROMPT, from the small model in the package or from MODEL=DIR
# make test               lint, types and tests
# make test-structure     what compiled programs look like on an H100 and a TPU, neither of which need be there (4 GB)
#
# Each makes its own virtual environment. Another Python: make test PYTHON=python3.12 (gets its own).

PYTHON ?= python3
VENV ?= $(if $(filter python3,$(PYTHON)),.venv,.venv-$(notdir $(PYTHON)))
BIN := $(VENV)/bin

MODEL ?= demo
PROMPT ?= a large striped green circle to the left of a small red heart on a grey background
OUT ?= out
N ?= 16

# Tests with programs that are optimised, as those of a user are; those of the others are not, see tests/conftest.py.
OPTIMISED := tests/test_golden.py tests/test_demo.py tests/models/test_transformer.py

.PHONY: sample test test-structure

sample: $(VENV)/installed
	$(BIN)/mindalle sample "$(PROMPT)" --model "$(MODEL)" --out "$(OUT)" --num-candidates $(N)

test: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest -n 2 --dist loadfile $(OPTIMISED:%=--ignore=%)
	XLA_FLAGS=--xla_backend_optimization_level=3 $(BIN)/python -m pytest -n 2 --dist load $(OPTIMISED)

test-structure: $(VENV)-structure/installed
	$(VENV)-structure/bin/python -m pytest -ra tests/structure/test_devices.py

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/installed-test: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@

$(VENV)-structure/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)-structure
	$(VENV)-structure/bin/python -m pip install --quiet --editable '.[structure]'
	@touch $@
