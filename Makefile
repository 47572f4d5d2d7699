# Every target sets up what it needs in .venv by itself.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
NATIVE := $(wildcard native/*.cpp native/*.h native/*/*.cpp native/*/*.h) CMakeLists.txt

.PHONY: demo test test-all test-gpu serve bench lint format sanitize wheel clean

demo: $(STAMP)
	$(BIN)/python -m farthing.demo

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-all: $(STAMP)
	$(BIN)/python -m pytest -m "not gpu"

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu

serve: $(STAMP)
	$(BIN)/farthing serve

bench: $(STAMP)
	$(BIN)/python bench/decode.py

lint: $(STAMP)
	$(BIN)/ruff check src tests bench
	$(BIN)/ruff format --check src tests bench
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix src tests bench
	$(BIN)/ruff format src tests bench

sanitize: $(STAMP)
	bash native/sanitize

wheel: $(STAMP)
	$(BIN)/pip wheel --no-deps --no-build-isolation -w dist/raw .
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/auditwheel repair --plat auto -w dist dist/raw/farthing-*.whl

$(STAMP): pyproject.toml $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade "pip>=24" "scikit-build-core>=0.11" "nanobind>=2.4" ninja
	$(BIN)/pip install --quiet "torch>=2.9"
	$(BIN)/pip install --quiet --no-build-isolation -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist
