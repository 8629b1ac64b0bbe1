# Every target is safe under `make -j`; nothing is installed outside $(VENV).
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# Every worker and every script that a test starts would compile the sources again.
export PYTHONDONTWRITEBYTECODE :=

PYTHON ?= python3
VENV ?= .venv
GPU_VENV ?= .venv-gpu
WORKERS ?= 2
MINUTES ?= 8

PY ?= $(VENV)/bin/python
# .venv's if there is one; a borrowed machine has none, and its own Python has JAX.
ANY_PY = $(or $(shell command -v $(PY)),$(PYTHON))
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check --quiet
FRESH := $(VENV)/.made
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
INSTALLED_DOCS := $(VENV)/.installed-docs
PINS := pyproject.toml constraints.txt

.PHONY: help venv demo test quick lint types docs notebooks smoke check evidence fuzz fuzz-part verify-gpu
.PHONY: verify-device device-wheels clean

help:  ## print this list
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /\1|/' | \
	  awk -F'|' '{printf "make %-14s %s\n", $$1, $$2}'

venv: $(INSTALLED)  ## make .venv and install mpjax into it

demo: $(INSTALLED)  ## train one model under several precisions; table and plots in runs/demo
	$(PY) experiments/compare_precisions.py --out runs/demo --fresh

test: $(INSTALLED_DEV)  ## run the tests and the examples in the docstrings
	$(PY) -m pytest -n $$(($(WORKERS) + 1)) --dist loadfile --no-loadscope-reorder -m "not notebook and not smoke"

quick: $(INSTALLED_DEV)  ## the tests of the modules that differ from the last commit, and the rules of imports
	$(PY) -m pytest -n $(WORKERS) -m "not notebook and not smoke" $$($(PY) tests/quick.py)

lint: $(INSTALLED_DEV)  ## ruff: rules and formatting
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(INSTALLED_DEV)  ## mypy
	$(PY) -m mypy mpjax experiments benchmarks

docs: $(INSTALLED_DOCS)  ## build the site, warnings are errors; open docs/_build/html/index.html
	$(PY) -m sphinx -b html -W --keep-going -q docs docs/_build/html

notebooks: $(INSTALLED_DEV)  ## execute the notebooks, and the blocks of README and docs
	$(PY) -m pytest -n $(WORKERS) tests/test_notebooks.py tests/test_documents.py tests/test_side_by_side.py

smoke: $(INSTALLED_DEV)  ## run every experiment with tiny settings, and with mistakes
	$(PY) -m pytest -n $(WORKERS) --dist loadgroup tests/test_experiments.py \
	  tests/test_bad_input.py tests/benchmarks/test_device.py

check: lint types test docs notebooks smoke fuzz-part  ## all of the above and fuzz-part, as CI does

evidence: $(INSTALLED_DEV)  ## measure the README's figures again, nine hours; pages in docs/evidence
	$(PY) -m benchmarks.cost.state_bytes
	$(PY) -m benchmarks.cost.loop_overhead
	$(PY) -m benchmarks.robustness.kill_resume
	$(PY) -m benchmarks.robustness.kill_finetuning
	$(PY) -m benchmarks.robustness.kill_stages
	$(PY) -m benchmarks.robustness.kill_own_run
	$(PY) -m benchmarks.robustness.two_runs
	$(PY) -m benchmarks.robustness.lost_processes
	$(PY) -m benchmarks.robustness.cluster_faults
	$(PY) -m benchmarks.robustness.damaged_logs
	$(PY) -m benchmarks.robustness.planted
	$(PY) -m benchmarks.numerics.rounding
	$(PY) -m benchmarks.numerics.recipes
	$(PY) -m benchmarks.numerics.numeric_edges
	$(PY) -m benchmarks.numerics.transforms
	$(PY) -m benchmarks.numerics.layouts
	$(PY) -m benchmarks.cost.recipe_cost
	$(PY) -m benchmarks.quality.low_bit_products
	$(PY) -m benchmarks.quality.fp8_parts
	$(PY) -m benchmarks.quality.low_bit_adam
	$(PY) -m benchmarks.numerics.moment_decay
	$(PY) -m benchmarks.numerics.optimizers
	$(PY) -m benchmarks.tools.autocast_table
	$(PY) -m benchmarks.cost.autocast_cost
	$(PY) -m benchmarks.tools.whole_models
	$(PY) -m benchmarks.tools.audit
	$(PY) -m benchmarks.cost.monitor
	$(PY) -m benchmarks.tools.nonfinite
	$(PY) -m benchmarks.tools.cure
	$(PY) -m benchmarks.checkpoints.assets_checkpoints
	$(PY) -m benchmarks.quality.image_cnn
	$(PY) -m benchmarks.quality.rnn_lm
	$(PY) -m benchmarks.quality.low_bit_inference
	$(PY) -m benchmarks.quality.annealing
	$(PY) -m benchmarks.quality.anneal
	$(PY) -m benchmarks.quality.augment
	$(PY) -m benchmarks.quality.adversarial
	$(PY) -m benchmarks.quality.multitask
	$(PY) -m benchmarks.quality.distil
	$(PY) -m benchmarks.quality.compress
	$(PY) -m benchmarks.quality.residuals
	$(PY) -m benchmarks.tools.preflight
	$(PY) -m benchmarks.numerics.methods
	$(PY) -m benchmarks.quality.finetune
	$(PY) -m benchmarks.quality.recommend
	$(PY) experiments/bench_step.py
	$(PY) experiments/low_bit_weights.py --out runs/evidence/low_bit_weights --fresh
	$(PY) experiments/compare_precisions.py --out runs/evidence/demo --fresh

fuzz: $(INSTALLED_DEV)  ## damaged and hostile files to every reader, half an hour; Linux
	$(PY) -m benchmarks.fuzz

fuzz-part: $(INSTALLED_DEV)  ## four minutes of it: the hostile files, then as many damaged ones
	$(PY) -m benchmarks.fuzz.odd_calls
	$(PY) -m benchmarks.fuzz --minutes 4 --workers $(WORKERS)

verify-gpu: $(GPU_VENV)/.installed  ## compile for an H100 without one, 6 GB, once; page in docs/evidence
	$(GPU_VENV)/bin/python -m benchmarks.gpu.verify

verify-device:  ## measure this machine's accelerator, eight minutes; page in docs/evidence
	$(ANY_PY) benchmarks/device.py --minutes $(MINUTES)

# What a bare machine with JAX and Flax lacks, for Python 3.12 on Linux x86-64.
device-wheels:  ## download what verify-device needs on a machine without a package index
	$(ANY_PY) -m pip --disable-pip-version-check download --quiet \
	  --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
	  --platform manylinux2014_x86_64 -c constraints.txt -d wheels jmp
	@du -sh wheels

clean:  ## remove both environments, caches and builds; runs/ stays
	rm -rf $(VENV) $(GPU_VENV) .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	find mpjax experiments benchmarks tests notebooks -name __pycache__ -type d -prune -exec rm -rf {} +

$(FRESH):
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON): not found; \
	install Python 3.11 or newer, or name one: make venv PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is \
	$$($(PYTHON) -V 2>&1); mpjax needs 3.11 or newer: make venv PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "$(PYTHON) has no venv or \
	ensurepip; install them (Debian, Ubuntu: apt install python3-venv) or name another Python: \
	make venv PYTHON=python3.12" >&2; exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) -V)"
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(INSTALLED): $(PINS) | $(FRESH)
	@echo "installing mpjax into $(VENV): about 1 GB, once"
	@$(PIP) install -c constraints.txt -e .
	@touch $@

$(INSTALLED_DEV): $(INSTALLED)
	@echo "installing what the tests need into $(VENV)"
	@$(PIP) install -c constraints.txt -e '.[dev,parquet]'
	@touch $@

$(INSTALLED_DOCS): $(INSTALLED)
	@echo "installing what the site needs into $(VENV)"
	@$(PIP) install -c constraints.txt -e '.[docs]'
	@touch $@

$(GPU_VENV)/.installed: $(PINS)
	@room=$$(df -Pk . | awk 'NR == 2 {print int($$4 / 1048576)}'); \
	if [ ! -d $(GPU_VENV) ] && [ "$$room" -lt 12 ]; then echo "verify-gpu: $$room GB are free, \
	NVIDIA's libraries need 6 GB and as much again while they are unpacked; free some or set \
	GPU_VENV=/another/disk/venv" >&2; exit 1; fi
	@echo "installing mpjax with NVIDIA's libraries into $(GPU_VENV): about 6 GB, once"
	@[ -x $(GPU_VENV)/bin/python ] || $(PYTHON) -m venv $(GPU_VENV)
	@$(GPU_VENV)/bin/python -m pip --disable-pip-version-check --quiet install -c constraints.txt \
	  -e '.[cuda12]'
	@touch $@
