# Everything that can be done with a checkout; `make` alone lists it.
.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format bench bench-setup vllm-setup llama-cpp-setup chaos docs lock clean
SHELL := /bin/bash

# The first Python of this machine that is new enough; name another with PYTHON=...
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && exit; done; echo python3)
MADE := .venv/.made
BIN := .venv/bin
# So many tests run at once: most of them wait for something, so that two leave half the time of two cores.
# AT_ONCE=0 shows what a test prints.
AT_ONCE ?= 3
# A test that fails gets one more try, as real processes on a busy machine may be late; what failed first is printed whole.
AGAIN ?= 1
SOURCES := broker sdk workers gateway tests scripts compose

help: ## this list
	@echo "modelbus: any large model, on any host, behind one durable bus"; echo
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22
	@echo; echo "The first of them to run sets up .venv (Python 3.11+ and pip are all it needs)."

setup: $(MADE) ## make .venv with everything in it; the second time it only checks

$(MADE): pyproject.toml constraints/core.txt constraints/openai2.txt scripts/setup.sh
	@scripts/setup.sh $(PYTHON)

demo: $(MADE) ## start a bus and a real language model, ask it a question through HTTP, stop everything
	@$(BIN)/python scripts/demo.py

test: $(MADE) ## all tests, with real servers and processes; one file: make test ARGS=tests/broker/test_x.py
	@$(BIN)/python -m pytest -n $(AT_ONCE) --dist loadfile --no-loadscope-reorder --reruns $(AGAIN) $(ARGS)

lint: $(MADE) ## ruff, mypy --strict and the direction of imports
	@$(BIN)/ruff check $(SOURCES)
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(MADE) ## rewrite the sources in the project's format
	@$(BIN)/ruff check --fix-only --quiet $(SOURCES); $(BIN)/ruff format $(SOURCES)

bench: $(MADE) ## measure against a bare server, ratios in a table; some rows: make bench ARGS="chat streams --seconds 2"
	@$(BIN)/python -m tests.bench.run $(ARGS)

chaos: $(MADE) ## kill workers, gateways and bus servers under load, count what came back: make chaos ARGS="--requests 10000 --seed 1"
	@$(BIN)/python -m tests.system.chaos.run $(ARGS)

bench-setup: $(MADE) ## make .venv-litellm, .venv-llama-server and .venv-lancedb, which rows are compared with; add an embedding model
	@[[ -x .venv-litellm/bin/python ]] || $(BIN)/uv venv --quiet --python $(BIN)/python .venv-litellm
	$(BIN)/uv pip install --python .venv-litellm/bin/python --constraint constraints/litellm.txt 'litellm[proxy]'
	@[[ -x .venv-lancedb/bin/python ]] || $(BIN)/uv venv --quiet --python $(BIN)/python .venv-lancedb
	$(BIN)/uv pip install --python .venv-lancedb/bin/python --constraint constraints/lancedb.txt lancedb psutil
	$(BIN)/uv pip install --python $(BIN)/python --constraint constraints/core.txt --editable '.[bench]'
	@scripts/setup-llama-cpp.sh server

vllm-setup: $(MADE) .venv-vllm/.made ## make .venv-vllm, in which the vllm engine is tested

.venv-vllm/.made: pyproject.toml constraints/vllm.txt scripts/setup-vllm.sh
	@scripts/setup-vllm.sh

llama-cpp-setup: $(MADE) .venv/.made-llama-cpp ## add llama-cpp-python to .venv, for the tests of the llama_cpp engine: it is compiled

.venv/.made-llama-cpp: constraints/core.txt scripts/setup-llama-cpp.sh scripts/llama-cpp.cmake
	@scripts/setup-llama-cpp.sh

docs: $(MADE) ## write the generated parts of docs/ again (the command line's help)
	@$(BIN)/python scripts/docs.py

lock: $(MADE) ## write constraints/ from the environments as they are now
	@$(BIN)/python scripts/lock.py

clean: ## remove environments, caches and build output
	rm -rf .venv .venv-openai2 .venv-litellm .venv-llama-server .venv-lancedb .venv-vllm .cache dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
