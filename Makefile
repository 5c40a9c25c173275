# Two commands on a fresh machine: `make run` and `make test`. Each installs what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN_ARGS ?=
PYTEST := $(BIN)/python -m pytest --numprocesses=2 --dist=loadfile
INSTALL := PYTHONWARNINGS=ignore $(BIN)/pip install --quiet --editable

.PHONY: run test test-slow lint docs

$(VENV)/installed: setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(INSTALL) .
	touch $@

# With PyTorch and other implementations of the attacks, which the tests compare with.
$(VENV)/installed-test: $(VENV)/installed
	$(INSTALL) '.[test]'
	touch $@

$(VENV)/installed-docs: $(VENV)/installed
	$(INSTALL) '.[docs]'
	touch $@

run: $(VENV)/installed
	$(BIN)/python -m advmoe_jax.train --config=configs/digits.py --workdir=runs/digits $(RUN_ARGS)

# What a change is tried with; `make test-slow` has the rest.
test: $(VENV)/installed-test
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/installed-test
	$(PYTEST) -m slow

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The pages of docs/ and a reference of the package's docstrings, in site/index.html.
docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
