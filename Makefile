# Every command of the project. `make` lists them.
PYTHON ?= python3
BIN := .venv/bin
CONFIG ?=
SHELL := /bin/bash

help: ## list these commands
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

setup: .venv/run ## make .venv with what training needs

.venv/run: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/test: .venv/run tests/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	@touch $@

demo: setup ## train, export, score and adapt a small model on this machine: about 3 minutes on 2 cores
	$(BIN)/python data/demo.py
	rm -rf logs/demo
	set -a && source records/env/demo.env && set +a && RUN_ID=demo $(BIN)/python train_gpt.py
	$(BIN)/python data/demo.py check logs/demo

train: setup ## train one of the systems in records/env/ on all GPUs here: make train CONFIG=pr1092, or CONFIG="pr1092 toy"
	@test -n "$(CONFIG)" && ls $(CONFIG:%=records/env/%.env) > /dev/null 2>&1 || { echo "make train needs CONFIG, of: $$(cd records/env && ls *.env | sed 's/.env//' | xargs)"; exit 2; }
	given=$$(export -p); set -a; for name in $(CONFIG); do source records/env/$$name.env || exit; done; \
	set +a; theirs=$$(env | sort); eval "$$given"; \
	comm -13 <(echo "$$theirs") <(env | sort) | grep -v '^_=' | sed 's/^/set by you, so the file does not count: /'; \
	n=$$($(BIN)/python -c 'import torch; print(max(1, torch.cuda.device_count()))') && \
	$(BIN)/python -m torch.distributed.run --standalone --nproc_per_node=$$n train_gpt.py

fidelity: setup ## compare the four systems with the published scripts at a small size: half an hour on 2 cores
	$(BIN)/python records/fidelity.py

test: .venv/test ## run the tests: no network, no GPU
	$(BIN)/python -m pytest

lint: .venv/test ## check style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

clean: ## remove what these commands made, except logs/
	rm -rf .venv data/datasets/demo_sp1024 data/tokenizers/demo_1024_bpe.model .pytest_cache .ruff_cache

.PHONY: help setup demo train fidelity test lint clean
