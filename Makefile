# `make demo` and `make test` work in a fresh clone: the first of them creates .venv.

PYTHON ?= python3
BIN := .venv/bin

# A half-made virtual environment is made anew.
.DELETE_ON_ERROR:
.PHONY: help .venv test test-matrix test-newest test-quantised lint demo docs hub clean

help:  ## show this list
	@awk -F ':.*## ' '/^[.a-z-]+:.*## / { printf "  make %-14s  %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.venv: .venv/installed  ## create the virtual environment, or bring it up to date

REQUIREMENTS := benchmarks/requirements.txt examples/serve/requirements.txt tests/requirements.txt docs/requirements.txt

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("sink-cache needs Python 3.10 or newer, but \
	$(PYTHON) is %d.%d; name a newer one: make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv .venv

.venv/installed: setup.cfg constraints.txt examples/requirements.txt $(REQUIREMENTS) | $(BIN)/python
	$(BIN)/python -m pip install -e . $(REQUIREMENTS:%=-r %) -c constraints.txt
	@touch $@

# Much less than the above, for those who come to see.
.venv/for-demo: setup.cfg constraints.txt examples/requirements.txt | $(BIN)/python
	$(BIN)/python -m pip install -e . -r examples/requirements.txt -c constraints.txt
	@touch $@

# The site is made from texts alone: neither torch nor the package is needed.
.venv/for-docs: constraints.txt docs/requirements.txt | $(BIN)/python
	$(BIN)/python -m pip install -r docs/requirements.txt -c constraints.txt
	@touch $@

# One thread for each of the two workers.
test: .venv/installed  ## run the test suite, on small models that it makes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# The oldest transformers that setup.cfg takes, the last one without `cache` as the name of a cache, and the pinned one.
MATRIX ?= 5.18.0 5.23.0 5.24.0

test-matrix: $(MATRIX:%=build/matrix/%/installed)  ## the test suite on several versions of transformers, with the torch of .venv
	@failed=0; for version in $(MATRIX); do \
		OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/build/matrix/$$version \
			$(BIN)/python -m pytest -n 2 > build/matrix/$$version.log 2>&1 || failed=1; \
		echo "transformers $$version: $$(tail -n 1 build/matrix/$$version.log)"; \
	done; exit $$failed

# In a folder that goes before what .venv has, and with transformers' own dependencies, which it wants in other versions too.
build/matrix/%/installed: .venv/installed
	$(BIN)/python -m pip install --quiet --upgrade --target $(@D) transformers==$*
	@touch $@

# In a folder that is made anew: pip leaves the metadata of an older version beside that of the newest one.
test-newest: .venv/installed  ## the test suite on the newest transformers that pip finds now, with the torch of .venv
	rm -rf build/newest
	$(BIN)/python -m pip install --quiet --upgrade --target build/newest transformers
	PYTHONPATH=$(CURDIR)/build/newest $(BIN)/python -c \
		'from importlib.metadata import version; print("transformers", version("transformers"))'
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/build/newest $(BIN)/python -m pytest -n 2

# In a folder of their own: where they are, transformers imports them at once, which takes a second and writes lines to stderr.
build/quantised/installed: .venv/installed
	$(BIN)/python -m pip install --quiet --upgrade --no-deps --target $(@D) torchao bitsandbytes -c constraints.txt
	@touch $@

test-quantised: build/quantised/installed  ## models of weights that torchao and bitsandbytes have rounded
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/build/quantised $(BIN)/python -m pytest tests/test_quantised.py

lint: .venv/installed  ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# PASSIVE: threads that spin while they wait make a token take five times as long on a machine that is not idle.
demo: .venv/for-demo  ## a real model: a story with both caches, and a long text that breaks one of them; under six minutes
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m examples.generate --max-new-tokens 384
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m examples.collapse

docs: .venv/for-docs  ## build/site: the documentation, with every link checked; `mkdocs serve` shows it while you write
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

hub:  ## build/hub/sink_cache: a folder that can be pushed to the Hugging Face hub
	$(PYTHON) hub/build.py build/hub/sink_cache

clean:  ## remove the virtual environment and what the tools leave behind
	rm -rf .venv build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
