# Every target sets up what it needs in .venv, so a fresh clone needs only `make test`.

PYTHON ?= python3
# Test processes, with one thread each: several processes of several threads compete
# for the cores and are many times slower. WORKERS=0 runs all in one process.
WORKERS ?= 2
# More arguments for pytest and for pip (for example, another package index).
PYTEST_ARGS ?=
PIP_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

export HF_HUB_DISABLE_TELEMETRY := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# torch goes first and by itself, so that whichever build of it is found (CPU or CUDA)
# is the one that the rest is resolved against.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	touch $@

.PHONY: install
install: $(STAMP) ## set up .venv with the package and the development tools

.PHONY: demo
demo: $(STAMP) ## run the demo
	$(BIN)/fedlora demo

PYTEST := $(BIN)/python -m pytest -n $(WORKERS)

.PHONY: test-unit test test-slow test-all
test-unit test test-slow: export HF_HUB_OFFLINE := 1
test-unit test test-slow: export OMP_NUM_THREADS := 1
test-unit test test-slow: export MKL_NUM_THREADS := 1
test-unit: $(STAMP) ## run the tests of single modules
	$(PYTEST) --dist worksteal tests/unit -m "not slow" $(PYTEST_ARGS)

test: $(STAMP) ## run the tests but the slow ones (WORKERS=2, PYTEST_ARGS=...)
	$(PYTEST) --dist worksteal -m "not slow" --durations=15 $(PYTEST_ARGS)

# The tests of a file share what is slow to set up, such as a deployment, so they stay in one
# process (loadfile). They have their own call, because engines wait by clocks of their own, which
# run out where hundreds of other tests take the cores. That none is chosen (5) is no failure.
test-slow: $(STAMP) ## run the slow ones: deployments, whole studies, the documentation's site
	$(PYTEST) --dist loadfile -m slow --durations=15 $(PYTEST_ARGS) || [ $$? -eq 5 ]

test-all: test test-slow ## run all tests, as .ci/run does

.PHONY: lint
lint: $(STAMP) ## check style, formatting, types and the import contract
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

.PHONY: docs
docs: export NO_MKDOCS_2_WARNING := 1
docs: export HF_HUB_OFFLINE := 1
docs: $(STAMP) ## build the documentation into build/docs, without a network
	$(BIN)/mkdocs build --strict --quiet
	@echo "built: build/docs/index.html"

.PHONY: format
format: $(STAMP) ## format the code and fix what can be fixed automatically
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

.PHONY: clean
clean: ## remove .venv, caches and build output
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests -type d -name __pycache__ -prune -exec rm -rf {} +
