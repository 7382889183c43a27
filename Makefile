# Tasks of the project; `make` lists them.
.DEFAULT_GOAL := help
VENV ?= .venv
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
export OMP_WAIT_POLICY := PASSIVE

.PHONY: help install demo test test-all chaos test-gpu test-lowest test-ray lint type bench bench-gpu clean

help:  ## list the tasks
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

install: $(VENV)/installed  ## virtual environment with everything the project needs

$(VENV)/installed: pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS) -e '.[dev]'
	touch $@

# Networks this small lose by more threads (docs/speed.md).
demo: export OMP_NUM_THREADS := 1
demo: install  ## train the default on one core of this machine (some 10 minutes), then sample
	$(BIN)/python -m genfound.train
	$(BIN)/python -m genfound.sample from=runs/default/default size='[[16,16],[12,20],[20,12],[22,22]]' n=2 rope.rule=linear out=runs/demo
	@echo "pictures: runs/demo/grid.png, and those of the training in runs/default/default/samples/"

test: install  ## the tests, on the CPU and offline
	$(BIN)/python -m pytest -m 'not slow and not gpu' -n 2 --dist worksteal

test-all: install  ## also the slow ones
	$(BIN)/python -m pytest -m 'not gpu' -n 2 --dist worksteal

CASES ?= 200

chaos: install  ## trainings killed at random moments, CASES=200 of them, compared with undisturbed ones
	$(BIN)/python -m tests.chaos $(CASES)

test-gpu: install  ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

# What versions of the dependencies can differ in: layers, random numbers, training, sampling, tokenizers, evaluation.
LOWEST_TESTS := tests/test_dependencies.py tests/test_rng.py tests/test_batch.py tests/layers tests/samplers/test_dopri5.py \
  tests/test_training.py tests/alignment tests/sampling/test_pipeline.py tests/tokenizers tests/loggers tests/metrics \
  tests/data/latents/test_store.py

test-lowest:  ## with the lowest versions of the dependencies that pyproject.toml allows
	$(MAKE) install VENV=$(VENV)-lowest CONSTRAINTS=constraints-lowest.txt
	$(VENV)-lowest/bin/python -m pytest -m 'not slow and not gpu' -n 2 --dist worksteal $(LOWEST_TESTS)

test-ray:  ## sweeps on Ray, whose launcher and joblib need different versions of cloudpickle
	$(PYTHON) -m venv $(VENV)-ray
	$(VENV)-ray/bin/python -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS) -e '.[ray,report]' pytest hypothesis
	$(VENV)-ray/bin/python -m pytest tests/cli/test_ray.py

lint: install  ## style
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

type: install  ## types
	$(BIN)/mypy

bench: install  ## speed, written to benchmarks/results/
	$(BIN)/python -m benchmarks.throughput
	$(BIN)/python -m benchmarks.official_forms
	$(BIN)/python -m benchmarks.framework_tax
	$(BIN)/python -m benchmarks.packing
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.store
	$(BIN)/python -m benchmarks.decode
	$(BIN)/python -m benchmarks.startup

bench-gpu: install  ## what a graphics card must show, in eight minutes
	PYTHON=$(BIN)/python bash benchmarks/gpu.sh

clean:  ## remove what the tasks made, but not the runs
	rm -rf $(VENV) $(VENV)-lowest $(VENV)-ray dist .pytest_cache .mypy_cache .ruff_cache
