# make sample             pictures of PROMPT, from the small model in the package or from MODEL=DIR
# make test               lint, types and tests
#
# Both make their own virtual environment. Another Python: make test PYTHON=python3.12 (gets its own environment).

PYTHON ?= python3
VENV ?= $(if $(filter python3,$(PYTHON)),.venv,.venv-$(notdir $(PYTHON)))
BIN := $(VENV)/bin

MODEL ?= demo
PROMPT ?= a large striped green circle to the left of a small red heart on a grey background
OUT ?= out
N ?= 16

.PHONY: sample test

sample: $(VENV)/installed
	$(BIN)/mindalle sample "$(PROMPT)" --model "$(MODEL)" --out "$(OUT)" --num-candidates $(N)

test: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest -n 2 --dist loadfile

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/installed-test: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@
