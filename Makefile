# make sample MODEL=DIR   pictures of PROMPT from a checkpoint folder (the original's format, or converted)
# make test               lint, types and tests
#
# Both make their own virtual environment. Another Python: make test PYTHON=python3.12 (gets its own environment).

PYTHON ?= python3
VENV ?= $(if $(filter python3,$(PYTHON)),.venv,.venv-$(notdir $(PYTHON)))
BIN := $(VENV)/bin

MODEL ?=
PROMPT ?= a painting of a cat with sunglasses in the frame
OUT ?= out
N ?= 16

.PHONY: sample test

sample: $(VENV)/installed
	@test -n "$(MODEL)" || { echo "Name a model: make sample MODEL=DIR (or MODEL=minDALL-E/1.3B, a download of 5 GB)"; exit 2; }
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
