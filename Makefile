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

test check: lint
	$(MAKE) --jobs 2 types pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

# Files of tests side by side, the longest first (tests/conftest.py), a thread each: compilers and thread pools
# would wait for each other. Plugins are named, since pytest rewrites the assertions in all modules of every
# package that offers one; and bytecode is kept, or each of the many processes would compile all that it imports.
PLUGINS := anyio.pytest_plugin,schemathesis.pytest.plugin,xdist.plugin
pytest: export OMP_NUM_THREADS = 1
pytest: export PYTHONDONTWRITEBYTECODE =
pytest: export PYTEST_DISABLE_PLUGIN_AUTOLOAD = 1
pytest: export PYTEST_PLUGINS = $(PLUGINS)
pytest: $(READY)
	$(BIN)/pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

slow: $(READY)
	$(BIN)/pytest -m slow

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --editable ".[cpu,export,sde,serve,dev]" --constraint constraints.txt
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
