# llmbook's front door. `make help` lists the targets; each sets up what it needs and starts at once the second time.
PYTHON ?= python3
BIN := .venv/bin
NAME ?= first
PROFILE ?= laptop
export TOKENIZERS_PARALLELISM := false
export HF_HUB_DISABLE_TELEMETRY := 1
export MLFLOW_DISABLE_TELEMETRY := true
export DO_NOT_TRACK := 1

.DEFAULT_GOAL := help
.PHONY: help run test lab docs serve bench clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

run: .venv/.run  ## make a language model from the documentation on this machine: text to served model (PROFILE=smoke|laptop|evening|gpu)
	$(BIN)/llmbook run --profile $(PROFILE) --name $(NAME)

serve: .venv/.run  ## serve the model of `make run` with its chat page
	$(BIN)/llmbook serve --name $(NAME)

test: .venv/.dev  ## everything that must hold: notebooks, tests, style, site
	$(BIN)/python tests/gate.py

lab: .venv/.dev  ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab nbs

docs: .venv/.dev  ## build the documentation site into _docs (no Quarto needed)
	$(BIN)/python site/build.py

bench: .venv/.dev  ## run every benchmark, one after the other (long)
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

clean:  ## remove what was built, keep the runs
	rm -rf .venv _docs _proc build *.egg-info .pytest_cache .ruff_cache

.venv/.pip: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "llmbook needs Python 3.11 or newer; use make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt torch
	@touch $@

.venv/.run: .venv/.pip pyproject.toml
	$(BIN)/pip install --quiet -c constraints.txt -e '.[run]'
	@touch $@

.venv/.dev: .venv/.run
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@
