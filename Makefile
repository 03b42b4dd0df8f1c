# make run: the default experiment. make test: everything CI checks. make test-slow: the tests marked slow, before a
# release. make test-oldest: fast tests with the oldest versions that pyproject.toml allows, in an environment of 7 GB.
# All make the environment when it is missing.
PYTHON ?= python3
BIN := .venv/bin
CONSTRAINTS := .venv/constraints.txt
OF_TORCH := ^(torch|torchvision|torchaudio|triton|nvidia-[^=]*|cuda-[^=]*)==
OLDEST ?= build/oldest
TESTS ?= tests

.PHONY: run test test-slow test-oldest lint install clean

run: .venv/.installed
	$(BIN)/fedsim run

test: .venv/.installed-dev lint
	$(BIN)/python -m pytest

test-slow: .venv/.installed-dev
	$(BIN)/python -m pytest -m slow

test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest -m "not slow and not ray and not flower and not data" $(TESTS)

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

install: .venv/.installed-dev

# The lock names exact versions; as constraints, packages of other platforms are left out. A torch that is there already,
# perhaps PyTorch's build for CPUs, stays as long as pyproject.toml allows it: it is not held to the lock.
$(CONSTRAINTS): requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip show --quiet torch 2>/dev/null && drop='$(OF_TORCH)' || drop='^$$'; \
	grep -vE "$$drop" requirements.lock > $@

.venv/.installed: pyproject.toml $(CONSTRAINTS)
	$(BIN)/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e .
	touch $@

.venv/.installed-dev: .venv/.installed $(CONSTRAINTS)
	$(BIN)/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[dev]'
	touch $@

$(OLDEST)/.installed: pyproject.toml tests/oldest.py
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(PYTHON) tests/oldest.py > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/pip install --quiet --disable-pip-version-check -c $(OLDEST)/constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
