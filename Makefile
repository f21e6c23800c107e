# The two commands of the README: `make demo` and `make test`. Both need nothing but Python (3.11 or later) and make.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST_FLAGS ?= -n 2

.PHONY: demo test slow reproduce figures lint types setup clean

# Fetches real weights (once; they stay in the cache) and shows which layers and positions carry the task.
demo: $(STAMP)
	$(BIN)/mechinterp models fetch smollm2-135m-instruct
	$(BIN)/mechinterp patch configs/patch-ioi.yaml

test: $(STAMP)
	$(BIN)/mechinterp models fetch smollm2-135m-instruct
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_FLAGS)

slow: $(STAMP)
	$(BIN)/mechinterp models fetch smollm2-135m-instruct
	$(BIN)/python -m pytest -m slow

# Repeats the committed runs and fails when a number moved. All in one process: to import torch and transformers takes
# longer than a run.
REPRODUCE := import sys; from mechinterp_cli.cli.main import main; \
	repeat = lambda run: main(["verify", run]) or main(["reproduce", run, "--out", "runs/reproduced"]); \
	sys.exit(next((code for code in map(repeat, sys.argv[1:]) if code), 0))
reproduce: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -c '$(REPRODUCE)' runs/reference/*/

# Draws the pictures in docs/figures from runs of the configs in runs/gallery, and runs those that have none.
figures: $(STAMP)
	$(BIN)/mechinterp models fetch smollm2-135m-instruct
	$(BIN)/python -m benchmarks.gallery

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

setup: $(STAMP)

# torch goes first, in a step of its own: then pip takes the CPU build where one is at hand and later steps keep it.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11" >&2; \
		  echo "fix: run make PYTHON=python3.11 (or any later one)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet torch==2.13.0 -c constraints.txt
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV)
