PYTHON ?= python

.PHONY: install format check test test-slow bench

install:  ## this package with what its tests need, in the tested versions
	$(PYTHON) -m pip install --quiet --constraint constraints.txt --editable ".[dev]"

format:  ## rewrite the code in the project's style
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

check:  ## lint and types
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

test:  ## all tests that take less than 30 s each
	$(PYTHON) -m pytest

test-slow:  ## the long ones, in full
	$(PYTHON) -m pytest -m slow -n 0

bench:  ## every benchmark in its short form, figures to benchmarks/results/quick/
	mkdir -p benchmarks/results/quick
	for program in benchmarks/[a-z]*.py; do \
		$(PYTHON) $$program --quick --json benchmarks/results/quick/$$(basename $$program .py).json || exit 1; \
	done
