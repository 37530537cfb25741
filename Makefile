# One command each: `make demo`, `make test`. The first call builds .venv with the known-good set of constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OUT ?= gpu
# Tests run in so many processes, each with one thread.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile
export TOKENIZERS_PARALLELISM := false
# Idle OpenMP threads sleep: spinning ones make small models 20 times slower when another process wants the core.
export OMP_WAIT_POLICY := passive
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help native native-test demo test test-all test-browser test-service test-matrix test-dropin gpu bench microbench lint format clean

help:
	@echo "make demo         train a small model on generated preferences, show before and after, write a report"
	@echo "make native       the C++ kernels, where there is a compiler; demo, test and bench do this too"
	@echo "make test         lint, types and tests (under 20 minutes on 2 cores)"
	@echo "make test-all     the same with the slow tests"
	@echo "make test-browser the pages of the service in headless Chromium (chromium and chromium-driver must be installed)"
	@echo "make test-service the service under load, killed, and fuzzed (about 15 minutes)"
	@echo "make test-matrix  tests on the oldest and the newest supported versions, in environments of their own"
	@echo "make test-dropin  the patch of TRL's trainers on TRL 0.24 to 1.16, in environments of their own"
	@echo "make gpu          on a GPU, into OUT=gpu, in three calls: PART=1 tests, head benchmark, memory checks; PART=2 training against"
	@echo "                  TRL; PART=3 profiles and tuning. PYTHON=... is used as it is; bash tests/gpu.sh --help says more"
	@echo "make bench        DPO and the LM head against other trainers on this machine, into bench/results/"
	@echo "make microbench   what single calls of the head, the losses, packing and collation take"

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --progress-bar off -c constraints.txt --editable '.[test]'
	@touch $@

native: $(READY)
	@bash kernels/build.sh $(BIN)/python

native-test: $(READY)
	@bash kernels/build.sh $(BIN)/python test

demo: $(READY) native
	$(BIN)/fastalign demo --output demo

test: $(READY) lint native-test
	$(PYTEST) -m "not slow and not gpu and not micro and not browser"

test-all: $(READY) lint native-test
	$(PYTEST) -m "not gpu and not micro and not browser"

test-browser: $(READY)
	$(BIN)/python -m pytest -m browser tests/serve

test-service: $(READY)
	@$(BIN)/python -m pip install --quiet -c constraints.txt schemathesis
	$(BIN)/python -m pytest -m "slow and not browser" tests/serve

test-matrix: $(READY)
	bash tests/matrix.sh

test-dropin: $(READY)
	PYTHON="$(PYTHON)" bash tests/dropin.sh

gpu:
	PYTHON="$(PYTHON)" OUT="$(OUT)" bash tests/gpu.sh $(PART)

bench: $(READY) native
	$(BIN)/python -m bench dpo
	$(BIN)/python -m bench head
	$(BIN)/python -m bench results

microbench: $(READY) native
	$(BIN)/python -m pytest -m micro tests/test_bench_micro.py --benchmark-columns=min,median,iqr,rounds --benchmark-sort=name

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-* build dist demo .pytest_cache .mypy_cache .ruff_cache
