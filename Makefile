# Everything from a fresh machine with Python >= 3.11 and make; nothing is installed outside of $(VENV).

VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
CANDIDATES := $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11 python)
# What is installed again when it changes. The tests and the demo meet the installed package, never this folder.
SOURCES := pyproject.toml LICENSE $(wildcard README.md) $(shell find worker waker -name '*.py')
# For the command that a target runs, like: make demo ARGS='--jobs 200 --machines 5'
ARGS ?=
# How much longer than `make test` the soak is.
SOAK_STARTS ?= 500
SOAK_ROUNDS ?= 3000
SOAK_SEED ?= 1
# For each operation of the Machines API; `make test` takes a few.
FUZZ_EXAMPLES ?= 300

.DEFAULT_GOAL := help
.PHONY: help venv install demo test test-queues fuzz lint bench soak readme clean

help: ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' Makefile | while IFS='	' read -r target what; do printf '  make %-11s %s\n' "$$target" "$$what"; done

venv: $(VENV)/.made ## make the environment, in .venv unless VENV=… is given

install: $(VENV)/.dev ## install the package and all that development needs

demo: $(VENV)/.demo ## the whole loop: 60 jobs, three machines that wake, drain and stop
	@$(BIN)/waker demo $(ARGS)

test: $(VENV)/.dev ## run the tests
	$(BIN)/pytest $(ARGS)

test-queues: $(VENV)/.dev ## every queue library against real servers, in full (make test has the short form)
	@command -v rabbitmqctl >/dev/null || ! command -v apt-get >/dev/null || [ "$$(id -u)" != 0 ] || \
		{ apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends rabbitmq-server; }
	QUEUE_CONTRACT=full $(BIN)/pytest tests/queues --timeout=600 $(ARGS)

fuzz: $(VENV)/.dev ## schemathesis over the emulator's Machines API, MACHINES_OPENAPI=the platform's OpenAPI file
	@test -n "$(MACHINES_OPENAPI)" || { echo "make fuzz MACHINES_OPENAPI=/path/to/openapi.json: the platform's file is needed" >&2; exit 2; }
	MACHINES_OPENAPI=$(MACHINES_OPENAPI) FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) \
		$(BIN)/pytest tests/test_emulator_api_schemathesis.py --timeout=0 $(ARGS)

lint: $(VENV)/.dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.dev $(VENV)/.bench ## measure what must be reached, beside what it is compared with
	$(BIN)/python benchmarks/run.py $(ARGS)

soak: $(VENV)/.dev ## the race at the end of a drain, thousands of times
	SOAK_STARTS=$(SOAK_STARTS) SOAK_ROUNDS=$(SOAK_ROUNDS) SOAK_SEED=$(SOAK_SEED) \
		$(BIN)/pytest tests/test_loop.py --timeout=0 $(ARGS)

readme: $(VENV)/.dev ## write the tables of README.md anew from the code
	$(BIN)/python tests/test_readme.py --write $(ARGS)

clean: ## remove the environment and what tools left
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache dist build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The build backend is in the environment too, so that installing again after a change needs no network.
$(VENV)/.made:
	@found=; bare=; \
	for python in $(CANDIDATES); do \
		$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
		if $$python -c 'import ensurepip, venv' 2>/dev/null; then found=$$python; break; fi; \
		bare=$${bare:-$$python}; \
	done; \
	if [ -z "$$found" ] && [ -n "$$bare" ]; then \
		echo "$$bare cannot make environments: on Debian and Ubuntu, apt-get install python3-venv" >&2; exit 1; \
	elif [ -z "$$found" ]; then \
		echo "Python 3.11 or newer is needed, and none of these is it: $(CANDIDATES)." >&2; \
		echo "Install one, or say where it is: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 1; \
	fi; \
	echo "making $(VENV) with $$($$found --version)"; \
	$$found -m venv --clear $(VENV)
	@$(PIP) install 'hatchling>=1.25'
	@touch $@

$(VENV)/.demo $(VENV)/.dev $(VENV)/.bench: $(VENV)/.%: $(VENV)/.made $(SOURCES)
	@echo "installing the package, for $*"
	@$(PIP) install --no-build-isolation '.[$*]'
	@touch $@
