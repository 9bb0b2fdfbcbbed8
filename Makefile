# Everything from a bare clone, with only Python 3.11+, make and git:
#   make demo    environment, install, the story of scripts/demo.py, stop
#   make test    environment, install, lint, types, import contracts, all CPU tests, coverage gate
# TORCH_INDEX=https://download.pytorch.org/whl/cpu make test      takes torch's CPU wheels (much smaller)

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
BENCH = PYTHONPATH=. $(BIN)/python -m bench.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
SEED ?= 1
ARGS ?=
STORM ?=
HEADERS ?=

export PYTHONSAFEPATH := 1
export OMP_NUM_THREADS ?= 1
# Every server that a test starts is five processes, which would compile their modules again
unexport PYTHONDONTWRITEBYTECODE
unexport PYTHONPATH

.DEFAULT_GOAL := test
.PHONY: demo test lint unit coverage browser screenshots soak fuzz mutate bench bench-smoke accuracy train-demo gpu report clean

# --- environment ---

$(BIN)/python:
	@test "$$(uname -s)" = Linux || { echo "serverless-llm runs on Linux only (this is $$(uname -s))" >&2; exit 78; }
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or newer found; name one with PYTHON=..." >&2; exit 78; }
	$(PYTHON) -m venv $(VENV)

# torch first: it is the one big wheel, and the only one that TORCH_INDEX is about; what it needs comes with the rest
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) $(if $(TORCH_INDEX),--no-deps --index-url $(TORCH_INDEX)) torch
	$(PIP) --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --editable '.[dev]'
	@touch $@

$(VENV)/.installed-mutation: $(VENV)/.installed-dev
	$(PIP) --editable '.[mutation]'
	@touch $@

# --- what a visitor runs ---

demo: $(VENV)/.installed
	PYTHONPATH=. $(BIN)/python -m scripts.demo $(ARGS)

test: lint unit coverage

# --- parts ---

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy scripts/*.py
	$(BIN)/lint-imports --no-logo

unit: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

coverage: $(VENV)/.installed-dev
	$(BIN)/python scripts/coverage_gate.py

# The dashboard in the machine's own Chromium (apt-get install chromium, or CHROMIUM=PATH)
browser: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m browser tests/browser $(ARGS)

screenshots: $(VENV)/.installed-dev
	PYTHONPATH=. $(BIN)/python -m scripts.screenshots $(ARGS)

# The faults that last, each test by itself (STORM='-k late' runs one; after a failure STORM=--stepwise goes on there),
# then the storm of kills
soak: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m storm tests/integration tests/unit/engine $(STORM)
	$(BENCH)soak --seed $(SEED) $(ARGS)

# Properties with many examples, then headers against the reference: goes on from bench/results/fuzz.json to 10 million
# (HEADERS='--executions 20000000 --processes 2')
fuzz: $(VENV)/.installed-dev
	HYPOTHESIS_PROFILE=fuzz $(BIN)/python -m pytest tests/properties --hypothesis-seed=$(SEED) $(ARGS)
	$(BENCH)fuzz $(HEADERS)

# Goes on where the last call stopped: a mutant keeps its result for as long as its function stays the same. ARGS: how many
# processes (--max-children 2), or names of mutants to run again ('serverless_llm.placement.*'); AGAIN=1: the survivors,
# after new tests. The data limit ends mutants that collect without end.
mutate: $(VENV)/.installed-mutation
	ulimit -Sd 4194304 && HYPOTHESIS_PROFILE=mutation nice $(BIN)/mutmut run $(ARGS) \
		$(if $(AGAIN),$$($(BIN)/mutmut results | sed -nE 's/: (survived|no tests|suspicious|timeout)$$//p'))
	PYTHONPATH=. $(BIN)/python -m scripts.mutation

accuracy: $(VENV)/.installed-dev
	$(BENCH)accuracy $(ARGS)

bench: $(VENV)/.installed-dev
	$(BENCH)run_all $(ARGS)
	$(BENCH)report

bench-smoke: $(VENV)/.installed-dev
	$(BENCH)run_all --smoke $(ARGS)

report: $(VENV)/.installed-dev
	$(BENCH)report

train-demo: $(VENV)/.installed-dev
	$(BIN)/python -m serverless_llm.demo.train $(ARGS)

# On a machine with CUDA, with the Python that already has torch and triton there
gpu:
	bash scripts/gpu.sh $(ARGS)

clean:
	rm -rf $(VENV) build dist mutants .demo *.egg-info .coverage .coverage.* .mypy_cache .ruff_cache .pytest_cache \
		.hypothesis .import_linter_cache
