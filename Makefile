# make demo       install into .venv, then edit the bundled model with three methods and show what it cost
# make demo-real  fetch a small real language model (98 MB), edit ten facts with four methods, and draw the picture
# make test       install into .venv, then ruff, pyright and every test that is not slow
# make tests      the tests of `make test` alone
# make test-slow  the tests that are slow
# make lint       ruff and pyright alone
# make coverage   the same tests, and the share of lines of every room that they run; without processes of their own
# make promises   every promise of docs/promises.md at its full number (hours); TRIALS=100: 100 trials of each
# make mutants    mistakes put into the numerics, one at a time: do the tests notice each? (half an hour)
# make docs       build the site into site/; stops at any warning
# make wheel      build the wheel and the source archive into dist/
# make clean      remove what was built and what the runs have written; .venv stays

PYTHON ?= python3
TRIALS ?= full
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Else both workers and every process that a test begins compile the sources again. `make clean` removes what is kept.
unexport PYTHONDONTWRITEBYTECODE
# Nothing here needs the network once it is installed.
export HF_HUB_OFFLINE ?= 1

.PHONY: help demo demo-real test tests test-slow lint coverage promises mutants docs wheel clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

demo: $(INSTALLED)
	$(BIN)/errata bench -m editor=rome,r_rome,c_rome dataset=world_first n_edits=20 out=runs/demo

# Four contexts, few texts and short answers keep it under ten minutes on two quiet cores.
demo-real: $(INSTALLED)
	$(BIN)/errata fetch smollm2
	$(BIN)/errata bench -m editor=rome,memit,grace,ft_m model=smollm2 dataset=counterfact \
	  dataset.path=benchmarks/datasets/real_facts.json n_edits=10 generation.tokens=6 generation.fluency_tokens=0 \
	  model.editors.rome.mom2_n_samples=500 model.editors.memit.mom2_n_samples=500 \
	  'model.editors.rome.context_template_length_params=[[5,2],[10,2]]' \
	  'model.editors.memit.context_template_length_params=[[5,2],[10,2]]' \
	  collapse.text=factbook collapse.n_texts=2 out=runs/demo-real

# pyright works on one core, so it runs beside the tests. What it finds may stand far above the tests' last line.
test: $(INSTALLED)
	@$(MAKE) --no-print-directory -j 2 lint tests || { \
	  echo "make test failed: make lint and make tests show by themselves which half it was." >&2; exit 1; }

tests: $(INSTALLED)
	$(BIN)/pytest -m "not slow" -n 2 --dist worksteal -q

test-slow: $(INSTALLED)
	$(BIN)/pytest -m slow -q

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

coverage: $(INSTALLED)
	mkdir -p build
	COVERAGE_FILE=build/.coverage $(BIN)/pytest -m "not slow" -n 2 --dist worksteal -q --cov=editors --cov=evaluate --cov=benchmarks \
	  --cov=src/errata --cov-report=json:build/coverage.json
	$(BIN)/python tests/support/coverage_by_room.py build/coverage.json

promises: $(INSTALLED)
	ERRATA_TRIALS=$(TRIALS) $(BIN)/pytest -q -n 2

mutants: $(INSTALLED)
	$(BIN)/python tests/support/mutants.py

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

wheel: $(INSTALLED)
	$(BIN)/python -m build --outdir dist

clean:
	rm -rf build dist site src/errata.egg-info .pytest_cache .ruff_cache .hypothesis runs multirun outputs edits
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "errata needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch first and by its exact version, so that no later range decides which build of it is fetched.
$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -qq -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -qq -c constraints.txt -e '.[dev]'
	@touch $@
