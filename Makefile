# Everything a fresh machine needs: `make demo` and `make test`. `make help` lists the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BENCH_DIR ?= /var/tmp/posthoc-ema-bench

# Two processes on two cores: spinning threads would wait for each other.
export OMP_WAIT_POLICY = PASSIVE

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint docs docs-serve bench bench-peers clean

help: ## Show this list.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: $(STAMP) ## Train on the embedded digits, reconstruct a sweep, write runs/demo/report.html.
	$(BIN)/python -m reference_model demo --run-dir runs/demo

test: $(STAMP) lint ## Run the linters and the quick tests.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m 'not slow and not gpu'

test-all: $(STAMP) lint ## Run every test, slow ones included.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: $(STAMP) ## Check style and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.docs: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	touch $@

docs: $(VENV)/.docs ## Build the documentation site into site/; broken links are errors.
	$(BIN)/zensical build --clean --strict

docs-serve: $(VENV)/.docs ## Show the documentation site at localhost:8000, rebuilt as pages change.
	$(BIN)/zensical serve

bench-peers: $(STAMP) ## Install other EMA libraries into benchmarks/.peers, for comparison only.
	$(BIN)/python -m benchmarks.peers

# The threads wait as in a training process: passive waiting would cost each update wake-ups.
bench: $(STAMP) ## Run all benchmarks (a quiet machine, three quarters of an hour, 60 GB in BENCH_DIR).
	env -u OMP_WAIT_POLICY $(BIN)/python -m benchmarks.tracker_overhead
	env -u OMP_WAIT_POLICY $(BIN)/python -m benchmarks.reconstruct_throughput --dir $(BENCH_DIR)
	env -u OMP_WAIT_POLICY $(BIN)/python -m benchmarks.snapshot_writing
	env -u OMP_WAIT_POLICY $(BIN)/python -m benchmarks.solve_conditioning
	env -u OMP_WAIT_POLICY $(BIN)/python -m benchmarks.model_speed
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.reconstruct_accuracy --dir $(BENCH_DIR)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.fewer_snapshots --dir $(BENCH_DIR)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.peer_synthesis --dir $(BENCH_DIR)
	$(BIN)/python -m benchmarks.guidance --dir $(BENCH_DIR)/guidance

clean: ## Remove what make created.
	rm -rf $(VENV) build dist site .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
