# `make help` says what there is. PYTHON names an interpreter, ARGS are added to the command.
# Without PYTHON the one that made .venv is kept, else the first that fits is taken.

FITS := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
WHICH := import sys; print(sys.version, sys.base_prefix)
NONE = no Python from 3.11 to 3.13 with venv and ensurepip (on Debian the package python3-venv) \
  works as any of: $(CANDIDATES); name one: make PYTHON=/path/to/python3
# Tried by running each: a command of that name may be there and fail.
CANDIDATES := $(or $(PYTHON),$(if $(wildcard .venv/made),.venv/bin/python) python3.13 python3.12 python3.11 python3)
FOUND := $(shell for p in $(CANDIDATES); do "$$p" -c '$(FITS)' 2>/dev/null && echo "$$p" && break; done)
VERSION := $(if $(FOUND),$(shell "$(FOUND)" -c 'import sys; print("%d.%d" % sys.version_info[:2])'))
CONSTRAINTS := $(if $(VERSION),constraints-$(VERSION).txt)
SAME := $(if $(FOUND),$(shell test "$$(.venv/bin/python -c '$(WHICH)' 2>/dev/null)" = \
  "$$("$(FOUND)" -c '$(WHICH)')" && echo yes))

.PHONY: help run test slow faults constraints FORCE
.DELETE_ON_ERROR:

help:
	@echo 'make run          install into .venv and run configs/paraphrase.py (ARGS="--config.seed=1")'
	@echo 'make test         install with the dev extra; lint, types, tests (ARGS="-k sampler")'
	@echo 'make slow         only the tests that take long'
	@echo 'make faults       break a run in every way it must survive; a table (ARGS="--only=checkpoint")'
	@echo 'make constraints  write constraints-X.Y.txt anew, for one Python (PYTHON=python3.13)'

run: .venv/installed
	.venv/bin/python -m xpo_jax.main --config=configs/paraphrase.py $(ARGS)

test: .venv/installed-dev
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m mypy
	.venv/bin/python -m pytest -n 2 --dist loadfile $(ARGS)

slow: .venv/installed-dev
	.venv/bin/python -m pytest -m slow $(ARGS)

faults: .venv/installed
	.venv/bin/python -m tools.faults $(ARGS)

# The stamps are written last, so that an install that was interrupted is done again.
.venv/installed: .venv/made pyproject.toml $(CONSTRAINTS)
	.venv/bin/python -m pip install --quiet --editable . --constraint $(CONSTRAINTS)
	@touch $@

.venv/installed-dev: .venv/made pyproject.toml $(CONSTRAINTS)
	.venv/bin/python -m pip install --quiet --editable '.[dev]' --constraint $(CONSTRAINTS)
	@touch $@ .venv/installed

.venv/made: $(if $(SAME),,FORCE)
	@test -n "$(FOUND)" || { echo "$(NONE)" >&2; exit 1; }
	rm -rf .venv
	"$(FOUND)" -m venv .venv
	@touch $@

# In a fresh environment, so that nothing that was tried out by hand gets in.
constraints:
	@test -n "$(FOUND)" || { echo "$(NONE)" >&2; exit 1; }
	rm -rf build/constraints
	"$(FOUND)" -m venv build/constraints
	build/constraints/bin/python -m pip install --quiet --editable '.[dev]'
	{ echo '# The versions that are tested with Python $(VERSION): the package and its dev extra, with all they need.'; \
	  echo '# Made by `make constraints PYTHON=python$(VERSION)`; the ranges stand in pyproject.toml.'; \
	  build/constraints/bin/python -m pip freeze --exclude-editable | grep -viE '^(pip|setuptools|wheel)=='; \
	} > build/constraints.txt
	mv build/constraints.txt $(CONSTRAINTS)
	rm -rf build/constraints
