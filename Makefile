# Each target sets up all that it needs: Python >= 3.11 and make are enough. See README.md for the same as plain commands.
.DEFAULT_GOAL := help
.PHONY: help quickstart test clean

VENV := .venv
# The stamp is younger than what it was installed from: editing either file installs again.
STAMP := $(VENV)/.installed
BIN := $(VENV)/bin

help:
	@echo "make quickstart   train, export and draw with the embedded photographs (5 minutes on two CPU cores)"
	@echo "make test         ruff, mypy and pytest"
	@echo "make clean        remove .venv and the caches; runs/ is kept"

$(STAMP): pyproject.toml constraints.txt
	@PYTHON="$(PYTHON)"; \
	for candidate in python3 python python3.13 python3.12 python3.11; do \
	    [ -z "$$PYTHON" ] || break; \
	    "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && PYTHON="$$candidate"; \
	done; \
	if [ -z "$$PYTHON" ]; then \
	    echo "error: no Python >= 3.11 found: install one, or name it with 'make $(MAKECMDGOALS) PYTHON=/path/to/python'" >&2; exit 2; \
	fi; \
	if ! "$$PYTHON" -c 'import ensurepip, venv' 2>/dev/null; then \
	    echo "error: $$PYTHON has no venv module: install it (Debian and Ubuntu: 'apt install python3-venv')" >&2; exit 2; \
	fi; \
	if ! $(BIN)/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "Making $(VENV) with $$PYTHON"; "$$PYTHON" -m venv --clear $(VENV) || exit 2; \
	fi
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

quickstart: $(STAMP)
	$(BIN)/python -m diffusion_unet quickstart

test: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/python -m pytest -m "not slow" -n auto

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache
