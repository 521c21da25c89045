# make setup   .venv/ with the project (editable), the test tools and transformers
# make demo    from raw text to a trained model and back, on the CPU
# make test    the test suite
# make check   lint, format, types
# make bench   the benchmarks; meaningful on an idle machine only

PYTHON ?= python3
# Where there is no NVIDIA GPU, the CPU build of this release is taken if pip offers one.
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Product code only: tests are linted and run, the harness that others build on is type-checked too.
TYPED := megatron tests/distributed.py $(filter-out setup.py,$(wildcard tools weights_conversion benchmarks *.py))

.PHONY: setup demo test check bench
.DELETE_ON_ERROR:

setup: $(READY)

$(READY): pyproject.toml setup.py constraints.txt $(wildcard megatron/data/*.cpp megatron/data/*.h)
	@$(PYTHON) -c 'import sys; v = "%d.%d" % sys.version_info[:2]; sys.version_info >= (3, 10) or sys.exit(\
	    f"{sys.executable} is Python {v}, and 3.10 or newer is needed; choose one with: make $(MAKECMDGOALS) PYTHON=...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@if test ! -e /dev/nvidiactl && $(BIN)/python -m pip install --no-deps "$(TORCH)+cpu" 2>/dev/null; \
	then echo "No NVIDIA GPU here: installed the CPU build of torch."; \
	else echo "Installing the build of torch that pip offers by default."; fi
	$(BIN)/python -m pip install --constraint constraints.txt "$(TORCH)" setuptools wheel pybind11
	$(BIN)/python -m pip install --constraint constraints.txt --no-build-isolation --editable ".[test]"
	@touch $@

demo: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/demo.sh

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(TYPED)

bench: setup
	$(BIN)/python -m benchmarks
