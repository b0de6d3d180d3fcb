# make demo and make test set up everything on a clean clone; second runs start in seconds.
# Needs Python 3.11+, a C++ compiler and make. TORCH_ARGS is passed to the installation of torch,
# for example to choose an index with CPU builds.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH_ARGS ?=
UV := $(shell command -v uv 2>/dev/null)
NATIVE := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)
BANDWIDTH ?= 100Mbps
# Chunk sizes beside 256 concern those that work in chunks.
PEERS := --texts 8 --chunk-tokens 256 --chunk-tokens 64 --chunk-tokens 1024 \
  --codec progressive:profile=true --codec progressive:profile=false \
  --codec cachegen-lmcache --codec cachegen-paper \
  --codec int8 --codec int8-zstd --codec kivi --codec turboquant --codec kvtc --codec kvtc-no-window \
  --codec h2o --codec h2o+progressive:profile=true --codec h2o+progressive:profile=false \
  --codec h2o+int8 --codec h2o+cachegen-lmcache --codec h2o+cachegen-paper --codec h2o+kvtc

.PHONY: demo test test-vllm check format lint types sanitize neon guard guard-write results clean help

help:
	@echo "make demo | test | test-vllm | check | format | lint | types | sanitize | neon | guard | guard-write | results | clean"

demo: $(VENV)/.installed
	@$(BIN)/cachegen demo --bandwidth $(BANDWIDTH)

test: $(VENV)/.installed
	@$(BIN)/python -m pytest -n 2

# A real vLLM (CPU build) in a venv of its own, on top of this one: minutes to set up, once.
VLLM := .venv-vllm

test-vllm: $(VLLM)/.installed
	@timeout -k 30 1500 $(VLLM)/bin/python -m pytest tests/vllm -p no:cacheprovider -W ignore \
	  --durations=8 -rs -o faulthandler_timeout=600

$(VLLM)/.installed: scripts/setup_vllm.sh $(VENV)/.installed
	@echo "setting up $(VLLM) (once)"
	@bash scripts/setup_vllm.sh $(VLLM) $(VENV)

check: lint types test

format: $(VENV)/.installed
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .

lint: $(VENV)/.installed
	@$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/python scripts/readme_tables.py --check

types: $(VENV)/.installed
	@$(BIN)/mypy

sanitize: $(VENV)/.installed
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash csrc/fuzz/run.sh

# The NEON kernels, cross-compiled and run under qemu-user; skipped where the tools are missing.
neon: $(VENV)/.installed
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash csrc/fuzz/neon.sh

# Instructions per symbol of the hot loops against the committed figures; guard-write replaces them.
guard: $(VENV)/.installed
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python scripts/instruction_guard.py --check

guard-write: $(VENV)/.installed
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python scripts/instruction_guard.py --write

# The committed figures behind the README's tables and charts.
results: $(VENV)/.installed
	@$(BIN)/cachegen demo --bandwidth $(BANDWIDTH) --json benchmarks/results/demo.json --plot docs/demo.png
	@$(BIN)/python benchmarks/cachegen_variants.py --json benchmarks/results/cachegen_variants.json
	@$(BIN)/cachegen eval models/reference $(PEERS) --json benchmarks/results/evaluation.json --plot docs/rate_quality.png
	@$(BIN)/python benchmarks/embedding.py --json benchmarks/results/embedding.json
	@$(BIN)/python benchmarks/token_redundancy.py --json benchmarks/results/token_redundancy.json
	@$(BIN)/cachegen bench --bandwidth 20Mbps --json benchmarks/results/serving.json --plot docs/serving.png
	@$(BIN)/cachegen bench speed --json benchmarks/results/speed.json --plot docs/speed.png
	@$(BIN)/python benchmarks/stream_lengths.py --json benchmarks/results/stream_lengths.json
	@$(BIN)/python scripts/make_segment_tables.py
	@$(BIN)/cachegen simulate --json benchmarks/results/simulation.json --html docs/simulation.html --plot docs/simulation.png
	@$(BIN)/python benchmarks/simulation_variants.py --json benchmarks/results/simulation_variants.json
	@$(BIN)/python benchmarks/link.py --json benchmarks/results/link.json --plot docs/link.png
	@$(BIN)/python scripts/readme_tables.py

# torch comes first and pinned: a plain "torch" through another package pulls the CUDA build.
$(VENV)/.dependencies: pyproject.toml constraints.txt
	@echo "setting up $(VENV) (once)"
ifneq ($(UV),)
	@test -x $(BIN)/python || uv venv --quiet --seed --python $(PYTHON) $(VENV)
	@uv pip install --quiet --python $(BIN)/python --torch-backend cpu $(TORCH_ARGS) -c constraints.txt torch \
	  || $(BIN)/python -m pip install --quiet $(TORCH_ARGS) -c constraints.txt torch
else
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet $(TORCH_ARGS) -c constraints.txt torch
endif
	@touch $@

$(VENV)/.installed: $(VENV)/.dependencies CMakeLists.txt $(NATIVE)
	@echo "building cachegen"
ifneq ($(UV),)
	@uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[hf,dev]'
else
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[hf,dev]'
endif
	@touch $@

clean:
	rm -rf $(VENV) $(VLLM) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
