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

.PHONY: setup docs docs-data demo demo-sp1 demo-hf demo-hf-sp1 examples check style test test-full test-triton parity canary census house two-hosts recipes bench pictures faults soak verify wheel bench-resume bench-wire bench-curve bench-tiles bench-memory bench-kernels bench-reduction bench-offload gpu clean

setup: $(VENV)/ready

$(VENV)/ready: setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@echo "compiling DeepSpeed's CPU communication op, which its first start would do (1 to 4 minutes)"
	$(BIN)/python -m benchmarks.build_ops
	touch $@

# Spelling, links, and the site in site/. An environment of its own: it needs neither torch nor this package.
DOCS := .cache/docs
docs: $(DOCS)/ready
	$(DOCS)/bin/codespell
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build --strict

$(DOCS)/ready: Makefile
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet 'mkdocs-material>=9.8,<10' 'codespell>=2.4'
	touch $@

# Tables and sample outputs of README, docs/ and ds_configs/ that come from a program; 8 minutes on 2 cores.
docs-data: setup
	$(BIN)/ds_alst keys > docs/configuration.md
	$(BIN)/ds_alst schema > ds_configs/alst.schema.json
	$(BIN)/python -m benchmarks.samples

demo: setup
	deepspeed --num_gpus $(RANKS) examples/train.py --deepspeed ds_configs/sp2.json

demo-sp1: setup
	deepspeed --num_gpus $(RANKS) examples/train.py --deepspeed ds_configs/sp1.json

# The ranks of a host share its cores; more threads than cores wait for one another.
demo-hf demo-hf-sp1 examples: export OMP_NUM_THREADS ?= $(shell n=$$(($$(getconf _NPROCESSORS_ONLN) / $(RANKS))); echo $$((n > 1 ? n : 1)))

# The same training by the HF Trainer.
HF_ARGUMENTS := --seq_len 16384 --logging_nan_inf_filter False --save_strategy no

demo-hf: setup
	deepspeed --num_gpus $(RANKS) examples/hf_trainer.py --deepspeed ds_configs/trainer_sp2.json \
		--output_dir runs/demo_hf $(HF_ARGUMENTS)

demo-hf-sp1: setup
	deepspeed --num_gpus $(RANKS) examples/hf_trainer.py --deepspeed ds_configs/trainer_sp1.json \
		--output_dir runs/demo_hf_sp1 $(HF_ARGUMENTS)

# The examples one after the other, on short sequences, the notebook, and the code blocks of README and docs.
LAUNCH := deepspeed --num_gpus
examples: setup
	rm -rf runs/examples
	$(LAUNCH) 2 examples/train.py --deepspeed ds_configs/sp2.json --seq-len 2048
	$(LAUNCH) 2 examples/hf_trainer.py --deepspeed ds_configs/trainer_sp2.json --output_dir runs/examples/hf
	$(LAUNCH) 2 examples/trl_sft_packed.py --deepspeed ds_configs/trainer_sp2.json --output_dir runs/examples/sft
	$(LAUNCH) 2 examples/lora.py --deepspeed ds_configs/sp2.json --output runs/examples/lora
	$(LAUNCH) 2 examples/custom_loss.py --deepspeed ds_configs/sp2.json
	$(LAUNCH) 2 examples/custom_loss.py --deepspeed ds_configs/sp1.json
	$(LAUNCH) 2 examples/dpo.py --deepspeed ds_configs/sp2.json
	$(LAUNCH) 2 examples/evaluate_and_generate.py --deepspeed ds_configs/sp2.json
	$(LAUNCH) 2 examples/resume.py --deepspeed ds_configs/sp2.json --checkpoint runs/examples/resume --steps 5
	$(LAUNCH) 1 examples/resume.py --deepspeed ds_configs/sp1.json --checkpoint runs/examples/resume --steps 10
	$(BIN)/python -m pytest -m slow tests/system/test_tour.py tests/test_docs.py -k 'notebook or migration'
	$(BIN)/python -m pytest -p tests.code_blocks --timeout 900 README.md CONTRIBUTING.md docs examples ds_configs

check: setup
	ruff check .
	ruff format --check .
	mypy

style: setup
	ruff check --fix .
	ruff format .

test: setup
	$(BIN)/python -m pytest -m 'not slow' -n 2 --dist loadfile --no-loadscope-reorder --durations=10

test-full: setup
	$(BIN)/python -m pytest --durations=20

# The kernels with another Triton than .venv's, as the torch that brings a GPU's may pin it.
TRITON := 3.8.0
test-triton: setup
	$(BIN)/python -m pip install --quiet --no-deps --target .cache/triton-$(TRITON) triton==$(TRITON)
	PYTHONPATH=.cache/triton-$(TRITON) $(BIN)/python -c "import triton; assert triton.__version__ == '$(TRITON)'"
	PYTHONPATH=.cache/triton-$(TRITON) $(BIN)/python -m pytest tests/kernels/test_kernels.py tests/kernels/test_gated.py tests/kernels/test_pack_heads.py tests/kernels/test_kernels_compile.py

# The newest torch, transformers and the rest in .cache/canary, and older transformers, into docs/versions.md; 6 GB.
canary: setup
	$(BIN)/python -m benchmarks.canary --write

parity: setup
	$(BIN)/python -m benchmarks.parity

census: setup
	$(BIN)/python -m benchmarks.census
	$(BIN)/python -m benchmarks.multimodal

# How large the package is and how much of it a plain run loads, beside the goals.
house: setup
	$(BIN)/python -m benchmarks.house

# The example over two network namespaces; Linux, root.
two-hosts: setup
	TWO_HOSTS=required $(BIN)/python -m pytest -s -m slow tests/system/test_two_hosts.py

recipes: setup
	$(BIN)/python -m benchmarks.recipes

# The benchmarks one after the other, into docs/benchmarks.md; an hour on 2 cores.
bench: setup
	$(BIN)/python -m benchmarks.all

# Runs broken in nine ways, and resumed.
faults: setup
	$(BIN)/python -m pytest -s -m slow tests/system/test_nine_faults.py

# 300 steps at SP 2 beside SP 1: curves, memory, descriptors, threads.
soak: setup
	$(BIN)/python -m pytest -s -m slow tests/system/test_soak.py

# ds_alst verify on the configs of public models, in small.
verify: setup
	$(BIN)/python -m benchmarks.verify

# The wheel alone in a clean environment; QUICK=1 borrows this one's packages.
wheel: setup
	$(if $(QUICK),,FULL=1) $(BIN)/python -m pytest -s -m slow --durations=0 tests/system/test_wheel.py

bench-resume: setup
	$(BIN)/python -m benchmarks.resume

bench-wire: setup
	$(BIN)/python -m benchmarks.wire

bench-curve: setup
	$(BIN)/python -m benchmarks.curve

# README's pictures, into docs/images.
pictures: setup
	$(BIN)/python -m benchmarks.pictures

bench-tiles: setup
	$(BIN)/python -m benchmarks.tiles

# QUICK=1: half the lengths.
bench-memory: setup
	$(BIN)/python -m benchmarks.memory $(if $(QUICK),--quick)

bench-kernels: setup
	$(BIN)/python -m benchmarks.kernels

bench-reduction: setup
	$(BIN)/python -m benchmarks.reduction

bench-offload: setup
	$(BIN)/python -m benchmarks.offload

# What only a GPU can show, on one GPU or more, in 8 minutes. CPU=1: the same code in small. JSON=PATH: the rows too.
gpu: setup
	$(BIN)/python -m benchmarks.gpu $(if $(CPU),--cpu --minutes 15) $(if $(JSON),--json $(JSON))

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache
