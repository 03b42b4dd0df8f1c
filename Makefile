# make run: the default experiment. make test: everything CI checks. make test-slow: the tests marked slow, before a
# release. All make .venv when it is missing.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test test-slow lint install clean

run: .venv/.installed
	$(BIN)/fedsim run

test: .venv/.installed-dev lint
	$(BIN)/python -m pytest

test-slow: .venv/.installed-dev
	$(BIN)/python -m pytest -m slow

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

install: .venv/.installed-dev

# The lock names exact versions; as constraints, packages of other platforms are left out.
.venv/.installed: pyproject.toml requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c requirements.lock -e .
	touch $@

.venv/.installed-dev: .venv/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
