# Every command of the project. `make` lists them.
PYTHON ?= python3
BIN := .venv/bin
CONFIG ?=
SHELL := /bin/bash

# The shell would take the carriage returns of Windows' line ends into the values, and a byte order mark for a command.
# $(call unix_text,NAMES) ends with a message where a file of settings has them.
define unix_text
@for file in $(1:%=records/env/%.env); do \
if grep -q -e $$'\r' -e $$'^\xef\xbb\xbf' $$file; then \
echo "$$file has the line ends of Windows (CR LF) or a byte order mark, which a shell cannot read. This removes them:"; \
echo "    sed -i.bak \$$'1s/^\xef\xbb\xbf//; s/\r\$$//' $$file"; exit 2; fi; done
endef

help: ## list these commands
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 17

setup: .venv/run ## make .venv with what training needs

.venv/run: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/tools: .venv/run records/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r records/requirements.txt
	@touch $@

.venv/data: .venv/run data/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r data/requirements.txt
	@touch $@

.venv/test: .venv/tools .venv/data tests/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	@touch $@

demo: setup ## train, export, score and adapt a small model on this machine: about 3 minutes on 2 cores
	$(call unix_text,demo)
	$(BIN)/python data/demo.py
	$(if $(RESUME),,rm -rf logs/demo)
	set -a && source records/env/demo.env && set +a && RUN_ID=demo $(BIN)/python train_gpt.py
	$(BIN)/python data/demo.py check logs/demo

data: .venv/data ## fetch the published export: make data VARIANT=sp1024 TRAIN_SHARDS=80
	$(BIN)/python data/download.py $(if $(VARIANT),--variant $(VARIANT)) $(if $(TRAIN_SHARDS),--train-shards $(TRAIN_SHARDS))

# DATA is one folder, of whose name neither make nor a shell reads a character: it goes through the environment.
verify-data: export DATA_FOLDER := $(value DATA)
verify-data: .venv/run ## look at every shard of a folder: make verify-data DATA=data/datasets/mine_sp4096
	$(BIN)/python data/verify.py $(if $(value DATA),"$$DATA_FOLDER")

train: setup ## train one of the systems in records/env/ on all GPUs here: make train CONFIG=pr1092, or CONFIG="pr1092 toy"
	@test -n "$(CONFIG)" && ls $(CONFIG:%=records/env/%.env) > /dev/null 2>&1 || { echo "CONFIG=$(CONFIG): make train needs CONFIG, of: $$(cd records/env && ls *.env | sed 's/.env//' | xargs)"; exit 2; }
	$(call unix_text,$(CONFIG))
	@given=$$(export -p); set -a; for name in $(CONFIG); do source records/env/$$name.env || exit; done; \
	set +a; theirs=$$(env | sort); eval "$$given"; \
	comm -13 <(echo "$$theirs") <(env | sort) | grep -v '^_=' | sed 's/^/set by you, so the file does not count: /'; \
	n=$$($(BIN)/python -c 'import torch; print(max(1, torch.cuda.device_count()))') && \
	if [ $$n = 1 ]; then $(BIN)/python train_gpt.py; \
	else $(BIN)/python -m torch.distributed.run --standalone --nproc_per_node=$$n train_gpt.py; fi

fidelity: .venv/tools ## compare the four systems with the published scripts at a small size: half an hour on 2 cores
	$(BIN)/python records/fidelity.py

# RUN goes to the shell as it is, which takes a folder with a space in it in quotes: RUN="logs/a 'logs/b c'".
audit: setup ## prove that a finished run kept the rules: make audit RUN=logs/demo, or RUN="'logs/with space' logs/demo"
	$(if $(RUN),,@echo "make audit needs RUN, folders of finished runs: make audit RUN=logs/demo"; exit 2)
	$(BIN)/python records/audit.py $(RUN)

report: .venv/tools ## draw runs, one page that needs no network: make report RUN="logs/a logs/b 'logs/with space'"
	$(if $(RUN),,@echo "make report needs RUN, folders of runs: make report RUN=logs/demo"; exit 2)
	$(BIN)/python records/report.py $(RUN)

watch: .venv/tools ## the same page while they run, at http://127.0.0.1:8765: make watch RUN=logs/demo PORT=8765
	$(if $(RUN),,@echo "make watch needs RUN, folders of runs that go on or will begin: make watch RUN=logs/demo"; exit 2)
	$(BIN)/python records/report.py $(RUN) --watch $(if $(PORT),--port $(PORT))

# PROMPT is text, of which neither make nor a shell reads a character: it goes through the environment.
export PROMPT_TEXT := $(value PROMPT)
sample: .venv/tools ## let a finished model write, and draw where it is good and bad: make sample RUN=logs/demo PROMPT="The list"
	$(if $(RUN),,@echo "make sample needs RUN, the folder of a finished run: make sample RUN=logs/demo"; exit 2)
	$(BIN)/python records/sample.py $(RUN) $(if $(value PROMPT),--prompt "$$PROMPT_TEXT") --html

estimate: setup ## parameters, bytes, memory, seconds of a run before it is paid for: make estimate CONFIG=pr1092
	@test -z "$(CONFIG)" || ls $(CONFIG:%=records/env/%.env) > /dev/null 2>&1 || { echo "CONFIG=$(CONFIG): not of: $$(cd records/env && ls *.env | sed 's/.env//' | xargs)"; exit 2; }
	$(call unix_text,$(CONFIG))
	@set -a; for name in $(CONFIG); do source records/env/$$name.env || exit; done; ESTIMATE=1 $(BIN)/python train_gpt.py

architecture: setup ## draw records/architecture.svg anew from the defaults of train_gpt.py
	$(BIN)/python records/architecture.py

DEMO_RUNS := logs/demo-seed1 logs/demo-seed2 logs/demo-seed3
submission-demo: .venv/tools ## three seeds of the demonstration, audited, packaged, checked and drawn: about 9 minutes on 2 cores
	$(call unix_text,$(or $(CONFIG),demo))
	$(BIN)/python data/demo.py
	rm -rf $(DEMO_RUNS) logs/submission-demo
	set -a && source records/env/$(or $(CONFIG),demo).env && for seed in 1 2 3; do \
	SEED=$$seed RUN_ID=demo-seed$$seed AUDIT=1 $(BIN)/python train_gpt.py || exit; done
	$(BIN)/python records/submit.py $(DEMO_RUNS) --name Demonstration --github-id nobody --out logs/submission-demo
	$(BIN)/python records/check.py logs/submission-demo/track_*/*
	$(BIN)/python records/report.py $(DEMO_RUNS) --out logs/submission-demo/report

bench: .venv/run ## time a step and its parts, scoring, export, start-up on this machine: make bench CONFIG=pr1092 VS=MLP_KERNEL=plain
	@test -z "$(CONFIG)" || ls $(CONFIG:%=records/env/%.env) > /dev/null 2>&1 || { echo "CONFIG=$(CONFIG): not of: $$(cd records/env && ls *.env | sed 's/.env//' | xargs)"; exit 2; }
	$(call unix_text,$(CONFIG))
	@set -a; for name in $(CONFIG); do source records/env/$$name.env || exit; done; \
	$(BIN)/python tests/bench.py $(if $(VS),--vs $(VS)) $(if $(STAGES),--stages $(STAGES))

bench-data: .venv/test ## measure encoding, opening of shards and shuffled loading here: make bench-data DOCS="a.jsonl 'b c.jsonl'"
	$(BIN)/python tests/bench_data.py $(DOCS)

# A process a core, four at most: each takes half a gigabyte of memory.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

test: .venv/test ## run all tests: no network, no GPU
	$(PYTEST) -m "not faults and not fuzz"

faults: .venv/test ## kill runs and data tools at random, cut off hosts, and compare what comes out: about 20 minutes on 2 cores
	$(BIN)/python -m pytest -rP $(FAULTS) tests/test_faults.py tests/test_data_kills.py

fuzz: .venv/test ## attack every reader with 100,000 hostile files: make fuzz, or make fuzz INPUTS=20000 SEED=5
	FUZZ_INPUTS=$(INPUTS) FUZZ_SEED=$(SEED) $(BIN)/python -m pytest -m fuzz tests/test_hostile_files.py tests/test_8_rans.py

test-fast: .venv/test ## run the tests of train_gpt.py's sections, without the slow ones: under a minute on two quiet cores
	$(PYTEST) -m "not slow and not faults and not fuzz" tests/test_[0-9]*.py

lint: .venv/test ## check style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

clean: ## remove what these commands made, except logs/
	rm -rf .venv data/datasets/demo_sp1024 data/tokenizers/demo_1024_bpe.model .pytest_cache .ruff_cache

.PHONY: help setup demo data verify-data train fidelity audit report watch sample estimate architecture submission-demo bench bench-data test test-fast faults fuzz lint clean
