# Everything runs in .venv, which `install` makes. `make train ARGS="seed=1 name=second"` passes overrides on.
PYTHON ?= python3
VENV := .venv/bin
CONFIG ?= configs/quickstart.toml
ARGS ?=

.PHONY: train test check install clean

train: install
	$(VENV)/python train.py $(CONFIG) $(ARGS)

test: install
	$(VENV)/python -m pytest $(ARGS)

check: install
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
	$(VENV)/mypy .

install: .venv/installed

.venv/installed: pyproject.toml
	test -d .venv || $(PYTHON) -m venv .venv
	$(VENV)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv build *.egg-info
