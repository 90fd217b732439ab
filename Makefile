# The front door. Needs Python >= 3.11 and nothing else; every target makes the environment it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export HF_HUB_OFFLINE := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-peers lint types imports check bench format clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[demo]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[demo,dev]'
	# For the names of its tensors only; without its dependency torchvision, which would not fit the CPU torch.
	$(BIN)/python -m pip install --quiet --no-deps open_clip_torch timm ftfy wcwidth
	@touch $@ $(VENV)/.demo

$(VENV)-bare/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-bare
	$(VENV)-bare/bin/python -m pip install --quiet --editable .
	@touch $@

demo: $(VENV)/.demo ## two skills merged, one removed: a table and a figure in ./taskvec-demo
	$(BIN)/taskvec demo

test: $(VENV)/.dev $(VENV)-bare/.ready ## the tests, two workers
	$(BIN)/python -m pytest -n 2 --dist loadscope -m "not slow and not peer"

test-slow: $(VENV)/.dev ## the tests that take minutes
	$(BIN)/python -m pytest -n 2 -m "slow and not peer"

test-peers: $(VENV)/.dev ## comparison with mergekit (in an environment of its own), PEFT and quantisers
	benchmarks/peer_env.sh
	$(BIN)/python -m pip install --quiet bitsandbytes compressed-tensors
	$(BIN)/python -m pytest -m peer

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell src tests docs benchmarks README.md CONTRIBUTING.md CHANGELOG.md

types: $(VENV)/.dev
	$(BIN)/mypy

imports: $(VENV)/.dev
	$(BIN)/lint-imports

check: lint types imports test ## what CI runs

bench: $(VENV)/.dev ## speed and memory against mergekit and the raw floor (about 35 minutes, 36 GB of disk)
	benchmarks/peer_env.sh
	$(BIN)/python -m benchmarks.run

format: $(VENV)/.dev ## rewrite the code in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment and caches
	rm -rf $(VENV) .venv-* .mypy_cache .ruff_cache .pytest_cache .hypothesis
