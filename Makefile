# One virtual environment, in .venv, installed again only when what it is made from has changed.
# Paths are relative and every tool runs as a module, so a checkout may lie anywhere.

PYTHON ?= python3
PY     := .venv/bin/python
STAMP  := .venv/.installed
# The oldest Triton that is allowed, beside the one that torch brings.
TRITON := 3.6.0
OLDEST := .venv/triton36
DEMO   := runs/demo
# Tests run in so many processes.
WORKERS ?= 2

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help venv demo test test-triton36 lint format bench gpu clean
.DEFAULT_GOAL := help

help:
	@echo 'make demo    train the embedded digits to 33 % density and prune; about a minute after installing'
	@echo 'make test    every test that needs no GPU'
	@echo 'make test-triton36  the tests of the kernels with Triton $(TRITON), the oldest that is allowed'
	@echo 'make lint    ruff and pyright'
	@echo 'make format  apply the formatting that lint asks for'
	@echo 'make bench   test, then measure, on this machine'
	@echo 'make gpu     the same on a GPU, with the PyTorch that $$(PYTHON) has: nothing is installed'
	@echo 'make clean   remove all that make has made'

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "l0fast needs Python 3.11 or newer; $(PYTHON) is " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $@

venv: $(STAMP)

demo: $(STAMP)
	rm -rf $(DEMO)
	$(PY) -m l0fast train --dataset digits --model mlp --density 0.33 --seed 0 --compare-dense --out $(DEMO)
	@echo 'plot:    $(DEMO)/dynamics.png'
	@echo 'summary: $(DEMO)/summary.json'

test: $(STAMP)
	$(PY) -m pytest -n $(WORKERS) -m "not gpu"

$(OLDEST)/.installed: $(STAMP)
	rm -rf $(OLDEST)
	$(PY) -m pip install --quiet --no-deps --target $(OLDEST) triton==$(TRITON)
	@touch $@

test-triton36: $(OLDEST)/.installed
	PYTHONPATH='$(CURDIR)/$(OLDEST)' $(PY) -c 'import triton; assert triton.__version__ == "$(TRITON)", triton.__file__'
	PYTHONPATH='$(CURDIR)/$(OLDEST)' $(PY) -m pytest -n $(WORKERS) -m "not gpu" tests/kernels

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath $(PY)

format: $(STAMP)
	$(PY) -m ruff check --fix-only .
	$(PY) -m ruff format .

bench: $(STAMP)
	$(PY) -m bench

gpu:
	$(PYTHON) -m bench --gpu

clean:
	rm -rf .venv $(DEMO) dist build .pytest_cache .ruff_cache .hypothesis .benchmarks
	find l0fast kernels tests bench -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
