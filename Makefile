# Two commands set up a fresh machine: `make demo` and `make test`. Python >= 3.11, pip and make are all that is needed.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test check format clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(STAMP) ## local training, FedAvg and MIRA on the bundled base and demo data; prints where the report is
	@number=1; while [ -e "runs/demo-$$number" ]; do number=$$((number + 1)); done; \
	$(BIN)/fedmira compare --preset demo --algorithms local,fedavg,mira --output "runs/demo-$$number"

test: $(STAMP) ## all tests
	$(BIN)/pytest

check: $(STAMP) ## format, lint, types, layers, public names; changes nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_layers.py tests/test_public_api.py

format: $(STAMP) ## rewrite the files in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove .venv and caches; runs/ stays
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -type d -name __pycache__ -prune -exec rm -rf {} +

# Redone when the dependencies change.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit(1)' || \
		{ echo "fedmira needs Python 3.11 or newer; '$(PYTHON)' is not: $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@
