# Two commands do everything on a fresh machine: `make train` and `make test`.
# PYTHON picks the interpreter for the virtual environment (3.11).

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.fathom-installed
TPU_VENV := .venv-tpu
TPU_STAMP := $(TPU_VENV)/.fathom-installed
CORPUS := data/installed_cpp

.PHONY: setup setup-tpu train test test-slow test-kernels test-tpu check format bench clean

setup: $(STAMP)

# Reinstalled only when the declared dependencies change, so that a second `make train` installs nothing.
$(STAMP): pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info[:2] != (3, 11))" || { echo "error: '$(PYTHON)' is not Python 3.11; set PYTHON=..." >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev,eval]'
	touch $@

# torch_xla works with one version of torch, which is not the main environment's: infra/tpu/README.md.
setup-tpu: $(TPU_STAMP)

$(TPU_STAMP): $(wildcard infra/tpu/requirements*.txt infra/tpu/setup.sh infra/tpu/cuda_stubs.py)
	PYTHON=$(PYTHON) infra/tpu/setup.sh $(TPU_VENV)
	touch $@

train: setup
	$(BIN)/fathom data build --source installed --out $(CORPUS) --force
	$(BIN)/fathom train --recipe cpu_demo
	$(BIN)/fathom eval --checkpoint runs/latest --suite loss_by_position --max-documents 64 --max-tokens 16k --ablation-documents 8
	$(BIN)/fathom report runs/latest

# Everything but the tests marked slow or kernels, in two processes of one thread each.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not kernels" -n 2 --dist worksteal -q

test-slow: setup
	$(BIN)/python -m pytest -m "slow and not kernels" -q

# Every Hopper kernel at every shape and gate setting: run on the CPU, and compiled for sm_90a against the tile table.
test-kernels: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m kernels -n 2 --dist worksteal -q

# The XLA lane on the CPU, and compiled for a TPU, in two processes of up to 3 GB each; no TPU is needed.
test-tpu: setup-tpu
	OMP_NUM_THREADS=1 $(TPU_VENV)/bin/python -m pytest tests/tpu -m "not slow" -q -n 2 --dist loadfile

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/fathom bench ops --device cpu --receipt-dir infra/receipts

clean:
	rm -rf $(VENV) $(TPU_VENV) data runs .pytest_cache .mypy_cache .ruff_cache
