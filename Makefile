# `make train` sets up .venv and trains the demo. `make test` adds the development tools, then runs lint, types and tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Each test process needs about 2 GB of memory.
PROCESSES ?= auto

.PHONY: train test lint faults table audit lock clean

train: $(VENV)/.installed
	$(BIN)/python train.py

test: lint
	$(BIN)/python -m pytest --numprocesses $(PROCESSES) --maxprocesses 4 --durations 20

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The long form of tests/faults: many hours. FAULTS_SEED draws other faults, and SOAK_MINUTES changes the two hours of the soak.
RESULTS ?= runs/faults
faults: $(VENV)/.installed-dev
	-$(BIN)/python -m pip install --constraint constraints.txt --editable '.[faults]'   # atheris, where it exists
	mkdir -p $(RESULTS)
	FAULTS=long FAULTS_OUT=$(abspath $(RESULTS))/results.jsonl FAULTS_FOUND=$(abspath $(RESULTS))/found \
		$(BIN)/python -m pytest tests/faults -o faulthandler_timeout=0 --durations 0

# Writes the results into the table of docs/reliability.md.
table:
	$(BIN)/python -m tests.faults.table $(RESULTS)/results.jsonl docs/reliability.md

# Known vulnerabilities of the pinned packages. It asks a service on the network.
audit: $(VENV)/audit
	$(VENV)/audit/bin/pip-audit --strict --requirement requirements.lock --require-hashes --disable-pip

# Pins constraints.txt with hashes, for this Python on this system.
lock: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --dry-run --ignore-installed --report $(VENV)/report.json \
		--constraint constraints.txt --editable '.[dask,dev,export,faults,mlflow,parquet,plot,remote,wandb]'
	$(BIN)/python -m tools.lock $(VENV)/report.json requirements.lock

$(VENV)/audit:
	$(PYTHON) -m venv $@
	$@/bin/python -m pip install pip-audit==2.10.1

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
