# `make help` lists the targets. The first of them makes the environment; nothing else needs to be installed than Python, git and make.
PYTHON ?= python3
PIP_ARGS ?=
EXTRAS ?= cpu,rtx,kernels,torch,minilm,dev
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OUT := out

.DEFAULT_GOAL := help
.PHONY: help env demo test test-fast test-search test-exports test-gpu check fix types imports coverage bench conformance wheel clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

env: $(STAMP)  ## make the environment in .venv (PIP_ARGS=... passes through to pip, PYTHON=... chooses the interpreter)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(PIP_ARGS) -c constraints.txt -e ".[$(EXTRAS)]"
	touch $@

demo: $(STAMP)  ## the main job on a real model: export, build, compare, load, run
	$(BIN)/python models/demo.py $(OUT)

test: $(STAMP)  ## every test that needs no GPU
	$(BIN)/pytest -m "not gpu and not exports" --durations=15

test-fast: $(STAMP)  ## the tests that take less than ten seconds each
	$(BIN)/pytest -m "not gpu and not exports and not slow"

test-search: $(STAMP)  ## the tests that draw their inputs, with other draws than last time and more of them
	HYPOTHESIS_PROFILE=search $(BIN)/pytest -m "not gpu and not exports" $$(grep -lr hypothesis tests --include='test_*.py')

test-exports: $(STAMP)  ## every architecture in every export style: an hour
	$(BIN)/pytest -m exports --durations=15

test-gpu: $(STAMP)  ## the tests that need an NVIDIA GPU
	$(BIN)/pytest -m gpu tests/gpu

check: $(STAMP) types imports  ## linters, types and the arrows between rooms
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

fix: $(STAMP)  ## let the formatter and the linter mend what they can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP)  ## mypy, strict
	$(BIN)/mypy

imports: $(STAMP)  ## which room may import which
	$(BIN)/lint-imports --no-logo

coverage: $(STAMP)  ## the tests again, with the lines they reach
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -m "not gpu and not exports"
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

bench: $(STAMP)  ## the benchmarks, paired against what a user would use instead
	$(BIN)/python benchmarks/start_up.py
	$(BIN)/python benchmarks/graph_passes.py
	$(BIN)/python benchmarks/build_overhead.py
	$(BIN)/python benchmarks/decode.py
	$(BIN)/python benchmarks/frontier.py

conformance: $(STAMP)  ## ONNX's own node tests through the whole tool (hours; goes on where it stopped)
	$(BIN)/python benchmarks/conformance.py $(OUT)/conformance

wheel: $(STAMP)  ## the wheel
	$(BIN)/pip wheel --quiet --no-deps -w $(OUT)/wheel .

clean:  ## remove the environment and everything that was made
	rm -rf $(VENV) $(OUT) build *.egg-info .coverage* .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
