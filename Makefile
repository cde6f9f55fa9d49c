# Every target does its own set-up, and is quick when that is done.
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all lint bench soak oldest
python := .venv/bin/python
# A process of tests for each core that this one may use. A file's tests stay in one of them, in
# their order, so more than a few have nothing to do. nproc would take OMP_NUM_THREADS for cores.
WORKERS ?= $(shell n=$$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc); echo $$((n < 8 ? n : 8)))
pytest = $(python) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1: /p' Makefile | awk -F ': ' '{printf "make %-8s %s\n", $$1, $$2}'

setup:  ## system packages, .venv and requirements, as far as missing
	@scripts/setup.sh

demo:  ## pretrain on Fashion-MNIST and evaluate, 5 to 15 minutes on 2 cores; FRESH=1 trains anew
	@REQUIREMENTS=requirements.txt scripts/setup.sh
	$(python) -m ssl_xcit demo $(if $(filter 1,$(FRESH)),--fresh)

test: lint  ## lint, then the tests, 12 minutes on 2 cores; WORKERS=1 for one process
	$(pytest)

test-all: lint  ## lint, then all tests, those too that take minutes each
	$(pytest) -m "" --durations=30

lint: setup  ## ruff, rules and format
	$(python) -m ruff check
	$(python) -m ruff format --check

bench: setup  ## every benchmark, each prints its table
	@for script in benchmarks/*.py; do echo "== $$script"; $(python) $$script || exit 1; done

soak: setup  ## the tests of reliability at full count, then 30 minutes of kills
	SOAK=1 $(python) -m pytest -m "" tests/test_reliability.py tests/test_soak.py

oldest:  ## all tests with the oldest promised PyTorch, in a second environment
	WORKERS=$(WORKERS) scripts/oldest.sh
