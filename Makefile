# Every target does its own set-up, and is quick when that is done.
.DEFAULT_GOAL := help
.PHONY: help setup demo test lint bench soak oldest
python := .venv/bin/python

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1: /p' Makefile | awk -F ': ' '{printf "make %-8s %s\n", $$1, $$2}'

setup:  ## system packages, .venv and requirements, as far as missing
	@scripts/setup.sh

demo: setup  ## pretrain on Fashion-MNIST and evaluate, 10 minutes on 2 cores; FRESH=1 trains anew
	$(python) -m ssl_xcit.demo $(if $(filter 1,$(FRESH)),--fresh)

test: lint  ## lint, then all tests; what CI runs
	$(python) -m pytest

lint: setup  ## ruff, rules and format
	$(python) -m ruff check
	$(python) -m ruff format --check

bench: setup  ## every benchmark, each prints its table
	@for script in benchmarks/*.py; do echo "== $$script"; $(python) $$script || exit 1; done

soak: setup  ## the tests of reliability at full count, then 30 minutes of kills
	SOAK=1 $(python) -m pytest tests/test_reliability.py tests/test_soak.py

oldest:  ## the tests with the oldest promised PyTorch, in a second environment
	scripts/oldest.sh
