# Everything runs in .venv, which the first target makes. `make train` and `make test` need nothing else.
PYTHON ?= python3
VENV := .venv/bin

.PHONY: train test check install clean

train: install
	$(VENV)/python train.py configs/quickstart.toml

test: install
	$(VENV)/python -m pytest

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
