# make demo | test | slow | check | models; everything is installed into .venv, nothing elsewhere but the models' cache.
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
RUN := .venv/bin/python -m
# Two workers with one thread each: small tests gain nothing from threads within an operation.
TEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(RUN) pytest -q
.PHONY: demo test slow check models clean

demo: models
	.venv/bin/deltaloom tune examples/tickets.yaml --overwrite

test: models
	$(TEST) -n 2 -m "not real and not slow and not gpu"
	$(TEST) -m "real and not slow and not gpu"

slow: models
	$(TEST) -m "slow or gpu"

check: .venv/.installed
	$(RUN) ruff check .
	$(RUN) mypy
	.venv/bin/lint-imports --no-logo
	$(TEST) tests/test_house.py tests/test_lazy.py

models: .venv/.installed
	.venv/bin/deltaloom models get minilm smollm2-135m-instruct

# Pinned by constraints.txt: a loose torch would pull gigabytes of CUDA packages.
.venv/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "deltaloom needs Python 3.11 or newer, and there is no python3 here." >&2; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "deltaloom needs Python 3.11 or newer; $(PYTHON) is $$("$(PYTHON)" -V). Try: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@echo "Installing into .venv (a few minutes, once)"
	"$(PYTHON)" -m venv .venv
	$(RUN) pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[all,dev]"
	@touch .venv/.installed

clean:
	rm -rf .venv runs .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache
