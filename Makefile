# Everything runs in .venv, which the first target makes. `make train ARGS="seed=1 name=second"` passes overrides on.
PYTHON ?= python3
VENV := .venv/bin
PIP := $(VENV)/python -m pip install --quiet --disable-pip-version-check --editable
CONFIG ?= configs/quickstart.toml
ARGS ?=

.PHONY: train test check clean

train: .venv/installed
	$(VENV)/python train.py $(CONFIG) $(ARGS)

test: .venv/installed-dev
	$(VENV)/python -m pytest $(ARGS)

check: .venv/installed-dev
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
	$(VENV)/mypy .

.venv/installed: pyproject.toml
	test -x $(VENV)/python || $(PYTHON) -m venv .venv
	$(PIP) .
	touch $@

.venv/installed-dev: .venv/installed
	$(PIP) ".[dev]"
	touch $@

clean:
	rm -rf .venv build *.egg-info
