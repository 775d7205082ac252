# On a fresh machine with Python >= 3.10, `make demo` and `make test` do everything, set-up included.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test gpu gpu-first needed-there gpu-stub slurm chaos fidelity codecs lint clean

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

# These two set nothing up: a machine with an NVIDIA GPU may be one that can download nothing. The tests take that Python's
# own pytest; DALI is missed by the parts that need it, which say so.
PYTHON_THERE = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
NEEDED := torch torchvision timm numpy PIL yaml jsonargparse docstring_parser webdataset rich jinja2 sklearn pytest
RESULTS ?= docs/results

# What needs an NVIDIA GPU; `make test` skips it where there is none.
gpu: needed-there
	$(PYTHON_THERE) -m pytest -m gpu

# The first ten minutes on a GPU, tests and then speed, into RESULTS/gpu-first.json; again, it goes on with the rest.
gpu-first: needed-there
	$(PYTHON_THERE) tools/benchmark.py gpu --out $(RESULTS)

needed-there:
	@missing=$$($(PYTHON_THERE) -c 'import sys; from importlib.util import find_spec; print(*[name for name in sys.argv[1:] if not find_spec(name)])' $(NEEDED)) || exit 1; [ -z "$$missing" ] || { echo "$(PYTHON_THERE) lacks $$missing: call make setup first, or make $(MAKECMDGOALS) PYTHON=/path/to/python"; exit 1; }

# The GPU path on a CUDA without a device, built by gcc; `make test` runs all but the long tests of it.
gpu-stub: setup
	$(BIN)/python tests/gpu_stub

# A SLURM cluster of one node, in a folder of its own: apt-get install slurm-wlm munge, as root.
slurm: setup
	$(BIN)/python -m pytest tests/slurm -m slurm

# Fault injection that takes minutes, into docs/chaos.md; `make test` keeps a short version of each.
chaos: setup
	$(BIN)/python -m pytest -m long -s
	$(BIN)/python tests/chaos --markdown docs/chaos.md

# The trainer against the authors' own version of timm, into docs/parity.md. AUTHORS=/path/to/clone runs their files, too.
fidelity: setup .fidelity/.complete
	$(BIN)/python tests/fidelity --markdown docs/parity.md

# Students of the demo from recordings in each codec, three seeds each; runs/codecs keeps what is done.
codecs: setup
	$(BIN)/python tests/fidelity/codecs.py runs/codecs

# timm 0.5.4 without its dependencies, beside the one in .venv: both have the same name.
.fidelity/.complete:
	rm -rf .fidelity
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .fidelity timm==0.5.4
	@touch $@

# Style, docstrings, names and complexity, and types.
lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --project pyproject.toml

clean:
	rm -rf .venv .fidelity .pytest_cache .ruff_cache
