# Everything runs from one virtual environment that `make` keeps up to date with pyproject.toml.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint slow bench evaluate clean
.DEFAULT_GOAL := test

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: $(VENV)/.installed  ## Simulate, fit, stream a day through real Kafka and Valkey, show alerts and a scorecard
	$(BIN)/ripcurrent demo

lint: $(VENV)/.installed  ## Style, types and the table of rooms
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint  ## Everything that is fast, on a real Kafka and a real Valkey
	$(BIN)/pytest

slow: $(VENV)/.installed  ## Training to target, soak
	$(BIN)/pytest -m slow

bench: $(VENV)/.installed  ## Events a second and where the time goes, for docs/performance.md
	$(BIN)/python tests/bench.py

EVAL_DATA ?= $(or $(RIPCURRENT_EVAL_DATA),../shared/data)

evaluate: $(VENV)/.installed  ## Each labelled recording of EVAL_DATA beside simple detectors; FAST=1: the record part
	$(BIN)/python tests/evaluate.py $(EVAL_DATA) $(if $(FAST),--fast) $(if $(CHOOSE),--choose)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
