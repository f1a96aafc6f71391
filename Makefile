# Everything runs from one virtual environment that `make` keeps up to date with pyproject.toml.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-all extended lint slow bench evaluate gpu gpu-folder clean
.DEFAULT_GOAL := test

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: $(VENV)/.installed  ## Simulate, fit, stream a day through real Kafka and Valkey, show alerts and a scorecard
	$(BIN)/ripcurrent demo

lint: $(VENV)/.installed  ## Style, types and import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Test processes, each with a Kafka and a Valkey of its own; a file's tests run in one of them. They mostly wait.
PARALLEL := --numprocesses 4 --dist loadfile

test: lint  ## Each promise once, on a real Kafka and a real Valkey: at most eight minutes on two cores
	$(BIN)/pytest $(PARALLEL)

# Two processes: these tests kill and slow down servers, and a machine with too much to do looks like a fault.
extended: $(VENV)/.installed  ## What `make test` leaves out and every change must pass
	$(BIN)/pytest --numprocesses 2 --dist loadfile -m 'extended and not slow and not gpu'

test-all: test  ## `make test`, then the rest that every change must pass
	$(MAKE) extended

slow: $(VENV)/.installed  ## Training to target, soak
	$(BIN)/pytest -m slow

bench: $(VENV)/.installed  ## Events a second and where the time goes, for docs/performance.md
	$(BIN)/python tests/bench.py

EVAL_DATA ?= $(or $(RIPCURRENT_EVAL_DATA),../shared/data)

evaluate: $(VENV)/.installed  ## Each labelled recording of EVAL_DATA beside simple detectors; FAST=1: the record part
	$(BIN)/python tests/evaluate.py $(EVAL_DATA) $(if $(FAST),--fast) $(if $(CHOOSE),--choose)

# The Python of a machine with a GPU, which has torch and numpy and no network; here, to build wheels for it.
GPU_PYTHON ?= python3.12

gpu-folder: $(VENV)/.installed  ## build/gpu: what `make gpu` needs on a machine without a network
	deploy/gpu-folder $(BIN)/python $(GPU_PYTHON)

gpu:  ## GPU tests, parity with the CPU, events/s and memory by batch size: build/gpu/result.json, within eight minutes
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(GPU_PYTHON)) tests/gpu_check.py

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
