# Everything here works on a fresh machine with Python 3.10 or later, venv and make: `make demo`, `make test`.
#
#   ARGS        more arguments for the command behind a target:   make test ARGS="-k codec -x"
#   SQLALCHEMY  the other line, with the oldest other packages:    make test SQLALCHEMY=2.0
#   PYTHON      the interpreter that environments are made from:   make test PYTHON=python3.13

PYTHON ?= python3
SQLALCHEMY ?=
ARGS ?=

WORKERS ?= 2

ifeq ($(SQLALCHEMY),)
VENV := .venv
PIN :=
else ifeq ($(SQLALCHEMY),2.0)
VENV := .venv-sa20
PIN := "sqlalchemy<2.1" "msgspec<0.20" "redis<5.4" "hiredis<3.3"
else
$(error SQLALCHEMY=$(SQLALCHEMY) is not a line with an environment: leave it out for the newest, or say 2.0)
endif

PY := $(VENV)/bin/python
HERE := $(CURDIR)
PIP := $(PY) -m pip --quiet --disable-pip-version-check
SERVERS := $(PY) -m tests.servers
LINT := build/lint

.PHONY: help demo test lint bench torture denormalize-concurrency sqlalchemy-suite clean
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | awk -F '\t' '{ printf "  make %-24s %s\n", $$1, $$2 }'
	@sed -n 's/^#   \([A-Z].*\)/  \1/p' Makefile

# The package alone; then what tests, checks and benchmarks need on top of it.
$(VENV)/.package: pyproject.toml
	@echo "[make] $(VENV): installing the package"
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PIP) install --upgrade "pip>=25.1"
	@$(PIP) install --editable ".[all]" $(PIN)
	@touch $@

$(VENV)/.development: $(VENV)/.package
	@echo "[make] $(VENV): installing what tests, checks and benchmarks need"
	@$(PIP) install --editable ".[all]" --group dev $(PIN)
	@touch $@

demo: $(VENV)/.package ## the tour: real queries against SQLite, with and without the cache (QUERYCACHE_URL=redis://…)
	@$(PY) examples/quickstart.py $(ARGS)

test: $(VENV)/.development ## all tests, against private servers that it starts
	@$(SERVERS) --no-fsync -- $(PY) -m pytest -n $(WORKERS) $(ARGS)

lint: $(VENV)/.development ## ruff, packaging, and on the installed wheel: mypy --strict and import-linter
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	@rm -rf $(LINT)
	$(PY) -m build --outdir $(LINT)/dist . > /dev/null
	$(PY) -m twine check --strict $(LINT)/dist/*
	@$(PIP) install --no-deps --target $(LINT)/site $(LINT)/dist/*.whl
	cd $(LINT)/site && $(HERE)/$(PY) -m mypy --strict --config-file $(HERE)/pyproject.toml --cache-dir $(HERE)/.mypy_cache -p querycache
	cd $(LINT)/site && $(HERE)/$(VENV)/bin/lint-imports --config $(HERE)/pyproject.toml --cache-dir $(HERE)/.import_linter_cache

bench: $(VENV)/.development ## the tables and plots of the README, against servers that commit to disk
	@$(SERVERS) -- $(PY) -m benchmarks $(ARGS)

torture: $(VENV)/.development ## ten minutes of writers, readers and faults under the history checker, and two million reads
	@$(SERVERS) --no-fsync -- $(PY) -m tests.torture $(ARGS)

denormalize-concurrency: $(VENV)/.development ## 200,000 operations of eight processes on denormalized columns, on two databases
	@$(SERVERS) --no-fsync -- $(PY) -m tests.denormalize.concurrency $(ARGS)

sqlalchemy-suite: $(VENV)/.development ## SQLAlchemy's own ORM tests, each SELECT through freeze and replay; ARGS=--core for those of Core, engines watched
	@$(PY) -m tests.sqlalchemy_suite $(ARGS)

clean: ## remove the environments and everything built
	rm -rf .venv .venv-sa20 build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
