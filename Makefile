PYTHON ?= python3
BIN := .venv/bin
ENV := .venv/.installed
LMMS := .venv-lmms/bin
MAKEFLAGS += --no-print-directory

.PHONY: demo test lint typecheck unit docs test-slow test-lmms clean

demo: $(ENV)
	$(BIN)/mmzoo demo

# Cheap checks first. One make for each, so that -j cannot mix their output or their order.
test: $(ENV)
	$(MAKE) lint
	$(MAKE) typecheck
	$(MAKE) unit
	$(MAKE) docs

lint: $(ENV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(ENV)
	$(BIN)/mypy

# `python -m pytest` puts the repository root first on sys.path: the harder case for the folder named kernels.
unit: $(ENV)
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Without --quiet, which would also silence the warnings that --strict counts. The variable silences the theme's notice
# about its successor.
docs: $(ENV)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

test-slow: $(ENV)
	$(BIN)/python -m pytest -m "slow and not gpu"

# In an environment of its own: lmms-eval's pins conflict with ours.
test-lmms: .venv-lmms/.installed
	$(LMMS)/python -m pytest -m slow tests/test_lmms.py

clean:
	rm -rf .venv .venv-lmms build dist site *.egg-info */*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis demo_output

# The stamp is written last: an interrupted installation is done again.
$(ENV): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,docs]'
	touch $@

.venv-lmms/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-lmms
	$(LMMS)/python -m pip install --quiet --disable-pip-version-check -e '.[lmms]' pytest pytest-timeout hypothesis
	$(LMMS)/python -m pip install --quiet --disable-pip-version-check --no-deps lmms-eval==0.7.3
	touch $@
