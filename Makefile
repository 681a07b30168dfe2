# One virtual environment, in .venv, installed again only when what it is made from has changed.
# Paths are relative and every tool runs as a module, so a checkout may lie anywhere.

PYTHON ?= python3
PY     := .venv/bin/python
STAMP  := .venv/.installed
# The oldest torch and Triton that are allowed, beside the newest: these two packages alone, over
# the virtual environment's others, NVIDIA's libraries among them.
TORCH  := 2.11.0
TRITON := 3.6.0
OLDEST := .venv/oldest
# The sums, the nodes of autograd, torch.compile, a step, the constraint, the graph, prune, kernels.
OLDEST_TESTS := tests/maths tests/autograd tests/layers/test_layers_in_a_model.py \
	tests/constraints/test_constraint.py tests/training/test_cuda_graph.py \
	tests/pruning/test_prune.py tests/kernels
DEMO   := runs/demo
# Tests run in so many processes.
WORKERS ?= 2

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help venv demo test test-all test-oldest lint format docs bench gpu release clean
.DEFAULT_GOAL := help

help:
	@echo 'make demo    train the embedded digits to 33 % density and prune; about a minute after installing'
	@echo 'make test    the tests that need no GPU; of many cases alike, some'
	@echo 'make test-all  the same, with all cases; several times as long'
	@echo 'make test-oldest  the core with torch $(TORCH) and Triton $(TRITON), the oldest that are allowed'
	@echo 'make lint    ruff and pyright'
	@echo 'make format  apply the formatting that lint asks for'
	@echo 'make docs    the site, in docs/_build/html: every page and example runs, warnings are errors'
	@echo 'make bench   test, then measure, on this machine'
	@echo 'make gpu     the same on a GPU, with the PyTorch that $$(PYTHON) has: nothing is installed'
	@echo 'make release  build the wheel and the sdist in dist/, check them, and say how to tag'
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
	$(PY) -m pytest -n $(WORKERS) -m "not gpu and not exhaustive"

test-all: $(STAMP)
	$(PY) -m pytest -n $(WORKERS) -m "not gpu"

$(OLDEST)/.installed: $(STAMP)
	rm -rf $(OLDEST)
	$(PY) -m pip install --quiet --no-deps --target $(OLDEST) torch==$(TORCH) triton==$(TRITON)
	@touch $@

test-oldest: $(OLDEST)/.installed
	PYTHONPATH='$(CURDIR)/$(OLDEST)' $(PY) -c 'import torch, triton; assert torch.__version__.startswith("$(TORCH)"), torch.__file__; assert triton.__version__ == "$(TRITON)", triton.__file__'
	PYTHONPATH='$(CURDIR)/$(OLDEST)' $(PY) -m pytest -n $(WORKERS) -m "not gpu and not exhaustive" $(OLDEST_TESTS)

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath $(PY)

format: $(STAMP)
	$(PY) -m ruff check --fix-only .
	$(PY) -m ruff format .

docs: $(STAMP)
	$(PY) -m pip install --quiet -c constraints.txt -e ".[docs]"
	OMP_NUM_THREADS=1 $(PY) -m sphinx -W --keep-going -b html docs docs/_build/html -d docs/_build/doctrees

release: $(STAMP)
	rm -rf dist
	$(PY) -m pip install --quiet -c constraints.txt build twine
	$(PY) -m build
	$(PY) -m twine check --strict dist/*
	$(PY) -m pip install --quiet --force-reinstall --no-deps --target build/check dist/*.whl
	cd build/check && $(CURDIR)/$(PY) -c 'import l0fast, pathlib; assert pathlib.Path(l0fast.__file__).is_relative_to(pathlib.Path.cwd())'
	@echo "now: git tag v$$($(PY) -c 'import l0fast; print(l0fast.__version__)') && git push --tags, and upload dist/*"

bench: $(STAMP)
	$(PY) -m bench

gpu:
	$(PYTHON) -m bench --gpu

clean:
	rm -rf .venv $(DEMO) dist build docs/_build docs/gallery docs/sg_execution_times.rst .pytest_cache .ruff_cache .hypothesis .benchmarks
	find l0fast kernels tests bench -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
