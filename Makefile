# Everything from a bare machine with python3 and make.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check clean

## Train a class-conditional shortcut model on 8x8 digits and judge it at 1, 2, 4 ... 128 steps.
demo: .venv/installed
	$(BIN)/anystep train digits --out runs/demo
	$(BIN)/anystep eval runs/demo

## Lint, format, types and tests.
test: .venv/installed check
	$(BIN)/python -m pytest

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv dist build
