# Everything runs in .venv, which `make setup` makes from nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
GPUS := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | wc -l || echo 0)
# Without a GPU, DeepSpeed runs on CPU over gloo; two ranks are enough to share a sequence.
ifeq ($(GPUS),0)
export DS_ACCELERATOR := cpu
endif
RANKS := 2
# torch 2.13.0 first: a range would take a newer build with several GB of CUDA packages where there is no GPU.
TORCH ?= torch==2.13.0

export PATH := $(CURDIR)/$(BIN):$(PATH)
export PYTHONWARNINGS ?= ignore
export TOKENIZERS_PARALLELISM := false

.PHONY: setup demo demo-sp1 check style test test-full parity bench-wire bench-curve clean

setup: $(VENV)/ready

$(VENV)/ready: setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@# DeepSpeed compiles its CPU communication op at the first start (1 to 2 minutes); here, where one waits anyway.
	$(BIN)/python -m benchmarks.build_ops
	touch $@

demo: setup
	deepspeed --num_gpus $(RANKS) examples/train.py --deepspeed ds_configs/sp2.json

demo-sp1: setup
	deepspeed --num_gpus $(RANKS) examples/train.py --deepspeed ds_configs/sp1.json

check: setup
	ruff check .
	ruff format --check .
	mypy

style: setup
	ruff check --fix .
	ruff format .

test: setup
	$(BIN)/python -m pytest -m 'not slow' --durations=10

test-full: setup
	$(BIN)/python -m pytest --durations=20

parity: setup
	$(BIN)/python -m benchmarks.parity

bench-wire: setup
	$(BIN)/python -m benchmarks.wire

bench-curve: setup
	$(BIN)/python -m benchmarks.curve

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache
