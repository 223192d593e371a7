# make demo | make test | make check: each sets up everything it needs, says what it does and how long that takes.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export TOKENIZERS_PARALLELISM := false

.PHONY: help demo test fast check docs bench clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    set up, then cut a trained mixture of experts from 32 to 16 experts and measure what it cost"
	@echo "make test    set up, then run all tests"
	@echo "make fast    the tests that take under five seconds each"
	@echo "make check   ruff, mypy --strict and the import rules"
	@echo "make docs    rewrite docs/cli.md and docs/recipes.md from the code"
	@echo "make bench   the figures of docs/bench.md (hours, 30 GiB of disk, a quiet machine; REFERENCE=DIR: with llama.cpp)"

$(VENV)/.ready: pyproject.toml constraints.txt
	@echo "== setting up $(VENV): one to four minutes the first time, mostly the download of torch"
	@start=$$(date +%s); \
	$(PYTHON) -m venv $(VENV) && \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch && \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]' && \
	touch $@ && echo "== ready after $$(( $$(date +%s) - start )) s"

demo: $(VENV)/.ready
	@echo "== gemcut demo: four to seven minutes on two cores; the report lands in runs/demo-moe/report/index.html"
	@start=$$(date +%s); $(BIN)/gemcut demo && echo "== demo done after $$(( $$(date +%s) - start )) s"

test: $(VENV)/.ready
	@echo "== all tests: ten to twenty minutes on two cores (make fast: the quick ones)"
	$(BIN)/python -m pytest --durations=10

fast: $(VENV)/.ready
	$(BIN)/python -m pytest -m "not slow"

check: $(VENV)/.ready
	@echo "== ruff, mypy --strict, import rules: about one minute"
	$(BIN)/ruff check src tests bench demo docs
	$(BIN)/ruff format --check src tests bench demo docs
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/architecture

docs: $(VENV)/.ready
	$(BIN)/python docs/build.py

bench: $(VENV)/.ready
	$(BIN)/python bench/run.py $(if $(REFERENCE),--reference $(REFERENCE))

clean:
	rm -rf $(VENV) runs build dist .pytest_cache .mypy_cache .ruff_cache
