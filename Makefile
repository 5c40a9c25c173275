# Two commands on a fresh machine: `make run` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN_ARGS ?=
PYTEST := $(BIN)/python -m pytest --numprocesses=2 --dist=loadfile

.PHONY: run test test-slow lint

$(VENV)/installed: setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	PYTHONWARNINGS=ignore $(BIN)/pip install --quiet --editable '.[test]'
	touch $@

run: $(VENV)/installed
	$(BIN)/python -m advmoe_jax.train --config=configs/digits.py --workdir=runs/digits $(RUN_ARGS)

# What a change is tried with; `make test-slow` has the rest.
test: $(VENV)/installed
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/installed
	$(PYTEST) -m slow

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
