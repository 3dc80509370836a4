PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= /dev/null
# Files of tests are spread over the cores: most of their time is the start of processes.
PYTEST := -m pytest -q -n auto --maxprocesses 4 --dist loadfile

# make demo PY=python uses an interpreter that has the packages, and makes no environment.
ifndef PY
PY := $(VENV)/bin/python
ENVIRONMENT := $(VENV)/.stamp
endif

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(VENV)/.stamp: requirements.txt requirements-dev.txt
	@command -v $(PYTHON) > /dev/null || { echo "error: no $(PYTHON) here: install Python 3.10 or newer, or name one (make demo PYTHON=python3.12)" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: $$($(PYTHON) --version) is too old: install Python 3.10 or newer, or name one (make demo PYTHON=python3.12)" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || { echo "error: $(PYTHON) cannot create environments: install its venv module (Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 2; }
	@echo "installing the packages into $(VENV) (once; a few minutes, 5.6 GB)"
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt -c $(CONSTRAINTS)
	@touch $@

demo: $(ENVIRONMENT)  ## run the five-minute demo; all files go to demo/
	@OMP_NUM_THREADS=1 $(PY) examples/demo.py

test: $(ENVIRONMENT)  ## run the quick tests (CPU)
	OMP_NUM_THREADS=1 $(PY) $(PYTEST) -m "not slow"

test-all: $(ENVIRONMENT)  ## run all tests (CPU), slow ones included
	OMP_NUM_THREADS=1 $(PY) $(PYTEST)

test-oldest:  ## run the quick tests with the oldest Python and packages that the requirements admit
	$(MAKE) in-new-environment VENV=.venv-oldest CONSTRAINTS=requirements-oldest.txt \
		PYTHON="$$($(PYTHON) .ci/find_python.py 3.10)"

test-newest:  ## run the quick tests with the newest Python found and the newest packages
	PIP_CONFIG_FILE=/dev/null $(MAKE) in-new-environment VENV=.venv-newest \
		PYTHON="$$($(PYTHON) .ci/find_python.py newest)"

in-new-environment:
	rm -rf $(VENV)
	trap 'rm -rf $(VENV)' EXIT; $(MAKE) test

lint: $(ENVIRONMENT)  ## check style and formatting
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m codespell_lib .

bench: $(ENVIRONMENT)  ## time a training step; tables go to benchmarks/results/
	$(PY) benchmarks/train_step.py
	$(PY) benchmarks/static_clip.py --batch 1

.PHONY: help demo test test-all test-oldest test-newest in-new-environment lint bench
