# Two commands set up a fresh machine: `make demo` and `make test`. Python >= 3.11, pip and make are all that is needed.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
FLOWER ?=
FLOWER_ENVIRONMENT := .venv-flower$(if $(FLOWER),-$(FLOWER))
FLOWER_BIN := $(FLOWER_ENVIRONMENT)/bin
FLOWER_STAMP := $(FLOWER_ENVIRONMENT)/.installed
FLOWER_WANTED := -e '.[dev,flower,flower-simulation]'
ifneq ($(FLOWER),)
FLOWER_WANTED := -e '.[dev,flower]' 'flwr==$(FLOWER)'
endif
TRACKERS_BIN := .venv-trackers/bin
TRACKERS_STAMP := .venv-trackers/.installed
BENCH_BIN := .venv-bench/bin
BENCH_STAMP := .venv-bench/.installed
RELEASE_BIN := .venv-release/bin
RELEASE_STAMP := .venv-release/.installed
LOCKED := --universal --generate-hashes --no-emit-index-url --no-annotate --no-header --quiet
LOCKS := locked/fedmira.txt locked/flower.txt
SIZE ?= small

.DEFAULT_GOAL := help
.PHONY: help demo test federation trackers check audit lock sbom docs format bench gpu rehearse torture clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(STAMP) ## each client alone, one adapter for all, and two levels on the demo, and what each client should take; prints where the page is
	@number=1; while [ -e "runs/demo-$$number" ]; do number=$$((number + 1)); done; \
	$(BIN)/fedmira decide --preset demo --output "runs/demo-$$number"

test: $(STAMP) ## all tests, in two processes; in one: .venv/bin/pytest
	$(BIN)/pytest -n 2 --dist loadfile

federation: $(FLOWER_STAMP) ## tests of runs over Flower, as real processes too (minutes); FLOWER=1.40.0: with that release
	$(FLOWER_BIN)/pytest tests/federation/flower tests/federation/processes tests/clients/test_clients_contract.py

trackers: $(TRACKERS_STAMP) ## tests of observers with TensorBoard, Trackio, W&B and MLflow, and of the page for a conversation, all offline
	$(TRACKERS_BIN)/pytest tests/observers tests/studies/test_talking_page.py

check: $(STAMP) audit ## format, lint, types, layers, public names, known vulnerabilities; changes nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_layers.py tests/test_public_api.py

audit: ## ask the package index for known vulnerabilities of the locked releases, where it keeps them
	@if [ -e $(RELEASE_STAMP) ] || $(MAKE) --silent $(RELEASE_STAMP); then $(RELEASE_BIN)/python locked/audit.py $(LOCKS); \
	else echo "not audited: pip-audit cannot be installed here"; fi

lock: $(RELEASE_STAMP) ## write locked/ anew from pyproject.toml: exact releases with their hashes
	$(RELEASE_BIN)/uv pip compile pyproject.toml --extra privacy $(LOCKED) -o locked/fedmira.txt
	$(RELEASE_BIN)/uv pip compile pyproject.toml --extra flower --extra privacy $(LOCKED) -o locked/flower.txt

sbom: $(RELEASE_STAMP) ## write bills of materials of the locked releases into dist/
	@mkdir -p dist
	$(RELEASE_BIN)/cyclonedx-py requirements locked/fedmira.txt --pyproject pyproject.toml --output-reproducible --of JSON -o dist/fedmira.cdx.json
	$(RELEASE_BIN)/cyclonedx-py requirements locked/flower.txt --pyproject pyproject.toml --output-reproducible --of JSON -o dist/flower.cdx.json

docs: $(STAMP) ## write what the pages say of the code
	$(BIN)/python docs/generate.py

format: $(STAMP) ## rewrite the files in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(BENCH_STAMP) ## fedmira beside other tools, into benchmarks/results/ (minutes; SIZE=full: hours)
	$(BENCH_BIN)/python benchmarks/run.py --size $(SIZE) --threads 1 --output benchmarks/results/$(SIZE).json
	$(BENCH_BIN)/python benchmarks/generation.py --size $(SIZE) --threads 1 --output benchmarks/results/generation-$(SIZE).json
ifeq ($(SIZE),full)
	$(BENCH_BIN)/python benchmarks/curves.py --output benchmarks/results/curves.json
	$(BENCH_BIN)/python benchmarks/profile_step.py --output benchmarks/results/profile.json
	$(BENCH_BIN)/python benchmarks/qr_svd.py --output benchmarks/results/qr-svd.json
endif

gpu: $(STAMP) ## what a CUDA device gives: correctness, then times, into benchmarks/results/gpu/ (at most ten minutes)
	$(BIN)/python benchmarks/gpu_check.py --output benchmarks/results/gpu

rehearse: $(STAMP) ## walk through `make gpu` with tiny shapes on a CPU (half a minute)
	@folder="$$(mktemp -d)" && $(BIN)/python benchmarks/gpu_check.py --dry --output "$$folder" && rm -r "$$folder"

torture: $(STAMP) ## kills, refused operations, flipped bits and odd input, into torture.json (an hour or two; TORTURE="--kills 20": less)
	PYTHONPATH=tests $(BIN)/python tests/torture/long.py --output torture.json $(TORTURE)

clean: ## remove virtual environments and caches; runs/ stays
	rm -rf .venv .venv-flower* .venv-trackers .venv-bench .venv-release build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -type d -name __pycache__ -prune -exec rm -rf {} +

# Redone when the dependencies change.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit(1)' || \
		{ echo "fedmira needs Python 3.11 or newer; '$(PYTHON)' is not: $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,privacy]'
	@touch $@

# Flower wants older releases of typer and rich than the rest is tested with.
$(FLOWER_STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(FLOWER_ENVIRONMENT)
	$(FLOWER_BIN)/python -m pip install --quiet -c constraints.txt $(FLOWER_WANTED)
	@touch $@

# These bring some hundred packages that nothing else needs.
$(TRACKERS_STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-trackers
	$(TRACKERS_BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,trackers,page]'
	@touch $@

# What locks, audits and lists the dependencies; no part of the package needs it.
$(RELEASE_STAMP): pyproject.toml
	$(PYTHON) -m venv .venv-release
	$(RELEASE_BIN)/python -m pip install --quiet 'cyclonedx-bom>=7.3,<8' 'pip-audit>=2.9,<3' 'uv>=0.9,<1'
	@touch $@

# A peer that cannot be installed takes only its own tools away; the result says so.
$(BENCH_STAMP): pyproject.toml constraints.txt benchmarks/requirements-peers.txt
	$(PYTHON) -m venv .venv-bench
	$(BENCH_BIN)/python -m pip install --quiet -c constraints.txt -e .
	@sed -e 's/#.*//' -e '/^ *$$/d' benchmarks/requirements-peers.txt | while read -r peer; do \
		$(BENCH_BIN)/python -m pip install --quiet -c constraints.txt "$$peer" || \
			echo "$$peer cannot be installed here; the tools that need it are left out" >&2; \
	done
	@touch $@
