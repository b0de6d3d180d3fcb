# make demo and make test set up everything on a clean clone; second runs start in seconds.
# Needs Python 3.11+, a C++ compiler and make. TORCH_ARGS is passed to the installation of torch,
# for example to choose an index with CPU builds.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH_ARGS ?=
UV := $(shell command -v uv 2>/dev/null)
NATIVE := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' 2>/dev/null)
BANDWIDTH ?= 100Mbps
PEERS := --texts 4 --codec progressive:profile=true --codec progressive:profile=false --codec cachegen-lmcache \
  --codec cachegen-paper --codec cachegen:tables=parametric --codec int8 --codec kivi \
  --codec turboquant --codec kvtc --codec kvtc-no-window

.PHONY: demo test check format lint types sanitize neon results clean help

help:
	@echo "make demo | test | check | format | lint | types | sanitize | results | clean"

demo: $(VENV)/.installed
	@$(BIN)/cachegen demo --bandwidth $(BANDWIDTH)

test: $(VENV)/.installed
	@$(BIN)/python -m pytest -n 2

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

# The committed figures behind the README's tables and charts.
results: $(VENV)/.installed
	@$(BIN)/cachegen demo --bandwidth $(BANDWIDTH) --json benchmarks/results/demo.json --plot docs/demo.png
	@$(BIN)/python benchmarks/cachegen_variants.py --json benchmarks/results/cachegen_variants.json
	@$(BIN)/cachegen eval models/reference $(PEERS) --json benchmarks/results/evaluation.json --plot docs/rate_quality.png
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
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
