# Every target installs its dependencies in .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# Many tests wait for servers and timers: three processes keep two cores busy.
WORKERS ?= 3
farthing_tests       := tests --ignore=tests/fleet --ignore=tests/gpu --ignore=tests/lab --ignore=tests/ray
farthing_fleet_tests := tests/fleet
farthing_gpu_tests   := tests/gpu
farthing_lab_tests   := tests/lab
farthing_ray_tests   := tests/ray
# `make test HOUSE=farthing_fleet` runs the tests of one house.
HOUSE   ?=
TESTS   := $(if $(HOUSE),$(or $($(HOUSE)_tests),$(error HOUSE: got $(HOUSE); expected farthing, farthing_fleet, farthing_gpu, farthing_lab or farthing_ray)))
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(TESTS)
NATIVE := $(wildcard native/*/*) CMakeLists.txt

SOURCES := $(wildcard native/*/*.cpp native/*/*.h native/*/*.inl)

.PHONY: demo test test-all test-slow test-isa test-amx test-gpu serve bench bench-gpu lint format docs sanitize lock wheel clean

demo: $(STAMP)
	$(BIN)/python -m farthing_lab.demo

test: $(STAMP)
	$(PYTEST) -m "not slow and not gpu"

test-all: $(STAMP)
	FARTHING_TEST_ISAS=all $(PYTEST) -m "not gpu" --hypothesis-profile thorough

test-slow: $(STAMP)
	FARTHING_TEST_ISAS=all $(PYTEST) -m "slow and not gpu"

# Tests of kernels and backends with every instruction set in turn; AMX tiles are emulated (native/test-isa),
# ARM's sets where a cross compiler and QEMU are installed (native/test-neon).
test-isa: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash native/test-isa -n $(WORKERS) --dist loadfile
	PATH="$(CURDIR)/$(BIN):$$PATH" bash native/test-neon

# The tests of AMX tiles alone, on every push: of the build that `make test` uses, three files are compiled again.
test-amx: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" FARTHING_ISA_DIR=$(lastword $(sort $(wildcard build/cp*))) bash native/test-isa amx -q -n $(WORKERS)

# Kernel tests on the GPU instead of Triton's interpreter, and all other tests that need a GPU.
test-gpu: $(STAMP)
	$(BIN)/python -c "import sys, torch; torch.cuda.is_available() or sys.exit('test-gpu needs an NVIDIA GPU and a CUDA build of torch: torch.cuda.is_available() is False')"
	TRITON_INTERPRET=0 $(BIN)/python -m pytest tests/gpu -m "not slow"
	TRITON_INTERPRET=0 $(BIN)/python -m pytest -m "gpu and not slow" --ignore=tests/gpu || test $$? -eq 5

serve: $(STAMP)
	$(BIN)/farthing serve

# No peers by default. PEERS="--llama-bench ik_llama.cpp=PATH/llama-bench".
# V3S and V2L each need 30 GB of disk, and memory for their packed files (7 and 9 GB).
MODELS     ?= V3S V2L L576
PEERS      ?=
RESULTS    ?= bench/results.json
bench: $(STAMP)
	set -e; for model in $(MODELS); do \
	  $(BIN)/python bench/decode.py --model $$model --into $(RESULTS) $(PEERS); \
	done
	set -e; run="$(BIN)/python bench/decode.py --model $(lastword $(MODELS)) --into $(RESULTS) $(PEERS)"; \
	$$run --weights int8 --prefill --batches 1; \
	$$run --weights bf16 --prefill --batches 1; \
	$$run --prefill --batches 4 --cached 4096 --rounds 1
	$(BIN)/python bench/startup.py --model $(lastword $(MODELS)) $(PEERS)
	$(BIN)/python bench/page.py $(RESULTS)

# Writes each kernel's time, share of this GPU's measured ceiling, and torch's time into docs/performance.md.
bench-gpu: $(STAMP)
	$(BIN)/python -m farthing_gpu.bench --page docs/performance.md

lint: $(STAMP)
	$(BIN)/ruff check src tests bench
	$(BIN)/ruff format --check src tests bench
	$(BIN)/clang-format --dry-run -Werror $(SOURCES)
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix src tests bench
	$(BIN)/ruff format src tests bench
	$(BIN)/clang-format -i $(SOURCES)

# The documentation site, into build/site; fails on a dead link.
docs: $(STAMP)
	$(BIN)/zensical build --strict

sanitize: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash native/sanitize

# The versions that the image is built with, and those of a developer's environment: `pip install -c dev.lock …`.
LOCK := uv pip compile pyproject.toml --quiet --universal --python-version 3.11 --no-header --no-annotate --no-emit-index-url --upgrade
lock: $(STAMP)
	$(BIN)/pip install --quiet uv
	$(BIN)/$(LOCK) --extra fleet -o deploy/constraints.txt
	$(BIN)/$(LOCK) --extra test -o dev.lock

wheel: $(STAMP)
	$(BIN)/pip wheel --no-deps --no-build-isolation -w dist/raw .
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/auditwheel repair --plat auto -w dist dist/raw/farthing-*.whl

$(STAMP): pyproject.toml $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade "pip>=24" "scikit-build-core>=0.11" "nanobind>=2.4" "hatch-fancy-pypi-readme>=24" ninja
	$(BIN)/pip install --quiet "torch>=2.9"
	$(BIN)/pip install --quiet --no-build-isolation -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build dist
