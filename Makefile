# On a fresh machine with Python >= 3.10, `make demo` and `make test` do everything, set-up included.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test gpu gpu-benchmark chaos fidelity lint clean

setup: .venv/.complete

# One virtual environment, built once; rebuilt when the dependencies change.
.venv/.complete: setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "Python >= 3.10 is needed, this is %d.%d: call make PYTHON=/path/to/newer/python" % sys.version_info[:2])'
	@echo "Installing into .venv: about 6.5 GB, most of it PyTorch with CUDA. This takes some minutes."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: setup
	$(BIN)/python tools/demo.py

# Three processes for two cores: some tests wait for others.
test: setup
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

# What needs an NVIDIA GPU; `make test` skips it where there is none.
gpu: setup
	$(BIN)/python -m pytest -m gpu

# Speed on an NVIDIA GPU, into docs/benchmark-gpu-*.json. No set-up: such a machine may be one that can download nothing.
gpu-benchmark: PYTHON_THERE = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
gpu-benchmark:
	@$(PYTHON_THERE) -c 'import torch, timm, jsonargparse, docstring_parser, webdataset' || { echo "$(PYTHON_THERE) lacks a package: call make setup first, or make gpu-benchmark PYTHON=/path/to/python"; exit 1; }
	$(PYTHON_THERE) tools/benchmark.py gpu

# Fault injection that takes minutes, into docs/chaos.md; `make test` keeps a short version of each.
chaos: setup
	$(BIN)/python -m pytest -m long -s
	$(BIN)/python tests/chaos --markdown docs/chaos.md

# The trainer against the authors' own version of timm, into docs/parity.md. AUTHORS=/path/to/clone runs their files, too.
fidelity: setup .fidelity/.complete
	$(BIN)/python tests/fidelity --markdown docs/parity.md

# timm 0.5.4 without its dependencies, beside the one in .venv: both have the same name.
.fidelity/.complete:
	rm -rf .fidelity
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .fidelity timm==0.5.4
	@touch $@

lint: setup
	$(BIN)/ruff check .

clean:
	rm -rf .venv .fidelity .pytest_cache .ruff_cache
