# make demo   a picture from an exported engine, and the proof that it is the right one
# make test   ruff, mypy, tests (what CI runs); make check is the same
# Both make .venv first, with the tested versions of constraints.txt.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test check lint types pytest slow clean

demo: $(READY)
	$(BIN)/sdfast demo

test check: lint types pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

# Files of tests side by side, a thread each: compilers and thread pools would wait for each other.
pytest: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist loadfile

slow: $(READY)
	$(BIN)/pytest -m slow

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable ".[cpu,export,sde,serve,dev]" --constraint constraints.txt
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
