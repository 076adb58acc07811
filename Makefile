# Everything runs in .venv, which the first target makes. `make train ARGS="seed=1 name=second"` passes overrides on,
# `make test ARGS="-n 0 tests/run"` runs a part of the tests, in one process.
PYTHON ?= python3
VENV := .venv/bin
PIP := $(VENV)/python -m pip install --quiet --disable-pip-version-check --editable
CONFIG ?= configs/quickstart.toml
ARGS ?=
WORKERS ?= 2

.PHONY: train compare test check clean

train: .venv/installed
	$(VENV)/python train.py $(CONFIG) $(ARGS)

# Dense against a mixture of experts of the same active parameters, three seeds each.
compare: .venv/installed
	$(VENV)/python compare.py configs/compare/dense_moe.toml $(ARGS)

# A file goes to one worker, as its tests share ranks; more threads than cores would make all of them crawl.
test: .venv/installed-dev
	OMP_NUM_THREADS=1 $(VENV)/python -m pytest --numprocesses $(WORKERS) --dist loadfile $(ARGS)

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
