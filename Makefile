# `make train` sets up .venv and trains the demo. `make test` adds the development tools, then runs lint, types and tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Each test process needs about 2 GB of memory.
PROCESSES ?= auto

.PHONY: train test lint clean

train: $(VENV)/.installed
	$(BIN)/python train.py

test: lint
	$(BIN)/python -m pytest --numprocesses $(PROCESSES) --maxprocesses 4 --durations 20

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The stamps are touched only after everything is installed, so an interrupted installation is repeated.
$(VENV)/.installed: EXTRA =
$(VENV)/.installed-dev: EXTRA = [dev]
$(VENV)/.installed $(VENV)/.installed-dev: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed; name one: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.$(EXTRA)'
	touch $@

clean:
	rm -rf $(VENV) *.egg-info
