# `make help` lists the targets. The targets create the environment; only Python, git and make must be installed.
PYTHON ?= python3
PIP_ARGS ?=
EXTRAS ?= cpu,rtx,kernels,torch,text,gguf,minilm,dev
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OUT := out
JOBS ?= 2
# Each test process uses one thread: more threads than cores make the numeric libraries wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

# Tests start hundreds of Python processes, which without bytecode would compile the project anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help env demo test test-fast test-search test-exhaustive test-all test-gpu check fix types imports tables coverage bench conformance fuzz wheel clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 17

env: $(STAMP)  ## create the environment in .venv (PIP_ARGS=... are passed to pip, PYTHON=... selects the interpreter)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(PIP_ARGS) -c constraints.txt -e ".[$(EXTRAS)]"
	touch $@

demo: $(STAMP)  ## the main workflow on a real model: export, build, compare, load, run
	$(BIN)/python examples/demo.py $(OUT)

test: $(STAMP)  ## run the tests that need no GPU, with a sample of the combinations
	$(PYTEST) -m "not gpu and not exhaustive" --durations=15

test-fast: $(STAMP)  ## run the tests that take less than 10 s each
	$(PYTEST) -m "not gpu and not exhaustive and not slow"

test-search: $(STAMP)  ## run the property-based tests with more examples and a new random seed
	HYPOTHESIS_PROFILE=search $(BIN)/pytest -m "not gpu and not exhaustive" $$(grep -lr hypothesis tests --include='test_*.py')

test-exhaustive: $(STAMP)  ## run all combinations of which `make test` runs a sample, such as every decoder in every export style (15 minutes)
	$(PYTEST) -m exhaustive --durations=15

test-all: $(STAMP)  ## run the tests that need no GPU, with all combinations (half an hour)
	HYPOTHESIS_PROFILE=deep $(PYTEST) -m "not gpu" --durations=30

test-gpu: $(STAMP)  ## run the tests that need an NVIDIA GPU
	$(BIN)/pytest -m gpu tests/gpu

check: $(STAMP) types imports  ## run linters, type checks and import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

fix: $(STAMP)  ## apply the formatter and the automatic fixes of the linter
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP)  ## run mypy in strict mode
	$(BIN)/mypy
	$(BIN)/mypy benchmarks

imports: $(STAMP)  ## check the import contracts between packages
	$(BIN)/lint-imports --no-logo

tables: $(STAMP)  ## write the tables of the documentation that are generated from the code
	$(BIN)/python docs/generate_tables.py

coverage: $(STAMP)  ## run the tests with line coverage
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -m "not gpu and not exhaustive"
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

bench: $(STAMP)  ## run the benchmarks, paired with what a user would use instead
	$(BIN)/python benchmarks/start_up.py
	$(BIN)/python benchmarks/graph_passes.py
	$(BIN)/python benchmarks/build_overhead.py
	$(BIN)/python benchmarks/decode.py
	$(BIN)/python benchmarks/frontier.py

conformance: $(STAMP)  ## run ONNX's own node tests through the whole tool (about 20 minutes; resumes after an interruption)
	$(BIN)/python benchmarks/conformance.py $(OUT)/conformance

fuzz: $(STAMP)  ## run the commands on mutated models, packages, data files and arguments (hours; resumes after an interruption)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/fuzz.py $(OUT)/fuzz --models 20000 --packages 2000 --samples 500 --commands 2000

wheel: $(STAMP)  ## build the wheel
	$(BIN)/pip wheel --quiet --no-deps -w $(OUT)/wheel .

clean:  ## remove the environment and all generated files
	rm -rf $(VENV) $(OUT) build *.egg-info .coverage* .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
