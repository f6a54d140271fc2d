# Each target sets up what it needs in .venv; a second run finds its stamps and starts at once.
#
#   make setup    packages, native module, model and data
#   make demo     fine-tune SmolLM2-135M on Rotten Tomatoes; DEMO_ARGS adds to the command
#   make test     lint and tests, no GPU needed; PYTEST_ARGS='-k report' narrows the tests
#   make proof    the longer proofs, which make test leaves out; PYTEST_ARGS as above
#   make bench    the pytest-benchmark files; BENCH_ARGS adds to the command
#   make docs     the docs site, in build/docs; a broken link or a missing docstring fails
#   make tables   README's and docs' tables and figures, written from bench/results
#   make lint     ruff and mypy
#   make clean    build outputs and caches; .venv, runs and the model stay
#
# PIP_ARGS goes to each pip install, for example an index that carries torch's CPU builds.

PYTHON ?= python3
ENGINE ?= sglang
DEMO_ARGS ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=
PIP_ARGS ?=

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS += --no-print-directory

BIN := .venv/bin
STAMPS := .venv/.stamps
# -qq leaves pip's errors and drops its warnings.
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-warn-conflicts $(PIP_ARGS)
NATIVE_SOURCES := setup.py CMakeLists.txt $(shell find csrc -type f 2>/dev/null)

# No CUDA build of torch belongs on a host without an NVIDIA GPU; these versions are tested there.
CPU_TORCH := torch==2.13.0
CPU_NO_DEPS := torchvision==0.28.0 sglang==0.5.23
BUILD_REQUIRES := 'setuptools>=77' 'pybind11>=2.13' ninja 'cmake>=3.24'

export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: setup demo test proof bench docs tables lint clean
.DELETE_ON_ERROR:

setup: $(STAMPS)/installed
	@$(BIN)/python -I mezo/tasks/assets.py

# What differs from the task's preset. 512 sentences: their prompts stay in the engine's cache, so
# that a step computes only suffixes.
demo: setup
	$(BIN)/mezo train --task rotten_tomatoes --engine $(ENGINE) --output runs/demo \
	  --overwrite_output_dir true --prefix activated --train-examples 512 --steps 1000 --lr 4e-3 --clip 2 \
	  --eval-examples 400 --eval-every 250 $(DEMO_ARGS)

test: setup lint
	$(BIN)/python -m pytest --durations=15 $(PYTEST_ARGS)

proof: setup
	$(BIN)/python -m pytest --proof --durations=15 $(PYTEST_ARGS)

bench: setup
	$(BIN)/python -m pytest tests/bench --benchmark-enable --benchmark-only $(BENCH_ARGS)

# -E: pages that have not changed are read too, since their warnings would not come again.
docs: $(STAMPS)/installed
	@$(BIN)/python -m sphinx -W --keep-going -E -q docs build/docs
	@echo "docs: build/docs/index.html"

tables: $(STAMPS)/installed
	@$(BIN)/python -m bench.tables

lint: $(STAMPS)/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean:
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks .hypothesis $(STAMPS)/installed
	rm -f mezo_kernels/_C*.so
	find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMPS)/venv:
	@need=10; $(has_gpu) || need=11; \
	version=$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || { \
	  echo "setup: PYTHON must be a Python >= 3.$$need, got '$(PYTHON)', which does not run;" \
	    "pass make PYTHON=python3.11." >&2; exit 1; }; \
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, $$need))" || { \
	  echo "setup: PYTHON must be at least 3.$$need here, as SGLang asks for it, got $$version;" \
	    "pass make PYTHON=python3.11." >&2; exit 1; }; \
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "setup: PYTHON must have the modules venv and ensurepip, got $$version without them;" \
	    "install the system's python3-venv package or pass another make PYTHON=..." >&2; exit 1; }; \
	$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	  echo "setup: making .venv with Python $$version"; $(PYTHON) -m venv --clear .venv; }
	@mkdir -p $(STAMPS) && touch $@

# Where only native sources have changed, the packages need no second look.
$(STAMPS)/installed: $(NATIVE_SOURCES) pyproject.toml Makefile | $(STAMPS)/venv
	@if [ -z "$(filter pyproject.toml Makefile,$?)" ]; then \
	  echo "setup: building the native module"; \
	  $(PIP) --no-build-isolation --no-deps -e .; \
	elif $(has_gpu); then \
	  echo "setup: installing packages for a host with an NVIDIA GPU (takes minutes)"; \
	  $(PIP) -e '.[sglang,plots,trackers,docs,dev]' $(BUILD_REQUIRES); \
	else \
	  echo "setup: installing packages for a host without an NVIDIA GPU (takes minutes)"; \
	  $(PIP) $(CPU_TORCH) $(BUILD_REQUIRES); \
	  $(PIP) --no-build-isolation -e '.[sglang-cpu,plots,trackers,docs,dev]'; \
	  $(PIP) --no-deps $(CPU_NO_DEPS); \
	fi
	@touch $@

# A shell condition: is there an NVIDIA GPU?
has_gpu = { test -e /dev/nvidiactl || nvidia-smi >/dev/null 2>&1; }
