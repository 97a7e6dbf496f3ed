# `make help` lists the targets. PYTHON selects an interpreter; ARGS are passed on to the command.
# Without PYTHON, the interpreter of an existing .venv is used again, otherwise the first candidate that works.

FITS := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
WHICH := import sys; print(sys.version, sys.base_prefix)
NONE = none of these is a Python 3.11 to 3.13 with venv and ensurepip (Debian: install python3-venv): \
  $(CANDIDATES); select one with make PYTHON=/path/to/python3
# Each candidate is run, because a command of that name may exist and still fail.
CANDIDATES := $(or $(PYTHON),$(if $(wildcard .venv/made),.venv/bin/python) python3.13 python3.12 python3.11 python3)
FOUND := $(shell for p in $(CANDIDATES); do "$$p" -c '$(FITS)' 2>/dev/null && echo "$$p" && break; done)
VERSION := $(if $(FOUND),$(shell "$(FOUND)" -c 'import sys; print("%d.%d" % sys.version_info[:2])'))
CONSTRAINTS := $(if $(VERSION),constraints-$(VERSION).txt)
SAME := $(if $(FOUND),$(shell test "$$(.venv/bin/python -c '$(WHICH)' 2>/dev/null)" = \
  "$$("$(FOUND)" -c '$(WHICH)')" && echo yes))

.PHONY: help run real play test slow faults compile constraints FORCE
.DELETE_ON_ERROR:

help:
	@echo 'make run          install into .venv and run configs/paraphrase.py (ARGS="--config.seed=1")'
	@echo 'make play         install with the human extra, and judge yourself on a page in your browser'
	@echo 'make real         train a real model, SmolLM2-135M-Instruct, on the prompts and checks of IFEval'
	@echo 'make test         install with the dev extra, then run lint and tests (ARGS="-k sampler")'
	@echo 'make slow         run only the slow tests'
	@echo 'make faults       inject every fault that a run must survive and print a table (ARGS="--only=checkpoint")'
	@echo 'make compile      install the TPU compiler into build/compile, without a TPU, and compile for one'
	@echo 'make constraints  update constraints-X.Y.txt for one Python version (PYTHON=python3.13)'

run: .venv/installed
	.venv/bin/python -m xpo_jax.main --config=configs/paraphrase.py $(ARGS)

play: .venv/installed-human
	.venv/bin/python -m xpo_jax.main --config=configs/human.py $(ARGS)

# RUN is the run directory: make real RUN=runs/ifeval_1 ARGS=--config.seed=1
RUN := runs/ifeval
real: .venv/installed-real
	model=$$(.venv/bin/python -m tools.ifeval --convert) && \
	.venv/bin/python -m xpo_jax.main --config=configs/ifeval.py --config.model.path=$$model --config.run_dir=$(RUN) \
	  $(ARGS) && \
	.venv/bin/python -m tools.ifeval $$model $(RUN)/export --answers=$(RUN)/ifeval.jsonl

test: .venv/installed-dev
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m tools.run_tests $(ARGS)

# A few modules have most of the slow tests, so the workers share modules here.
slow: .venv/installed-dev
	.venv/bin/python -m tools.run_tests -m slow --dist worksteal $(ARGS)

faults: .venv/installed
	.venv/bin/python -m tools.faults $(ARGS)

# In its own environment: the TPU compiler takes 1.2 GB, and no other target needs it.
compile: build/compile/installed
	TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu build/compile/bin/python -m pytest -m slow -rs tests/test_compile_tpu.py $(ARGS)

build/compile/installed: pyproject.toml $(CONSTRAINTS)
	@test -n "$(FOUND)" || { echo "$(NONE)" >&2; exit 1; }
	rm -rf build/compile
	"$(FOUND)" -m venv build/compile
	build/compile/bin/python -m pip install --quiet --editable '.[dev,tpu]' --constraint $(CONSTRAINTS)
	@touch $@

# The stamps are written last, so that an interrupted installation is repeated.
.venv/installed: .venv/made pyproject.toml $(CONSTRAINTS)
	.venv/bin/python -m pip install --quiet --editable . --constraint $(CONSTRAINTS)
	@touch $@

.venv/installed-human: .venv/made pyproject.toml $(CONSTRAINTS)
	.venv/bin/python -m pip install --quiet --editable '.[human]' --constraint $(CONSTRAINTS)
	@touch $@

.venv/installed-dev: .venv/made pyproject.toml $(CONSTRAINTS)
	.venv/bin/python -m pip install --quiet --editable '.[dev]' --constraint $(CONSTRAINTS)
	@touch $@ .venv/installed

.venv/installed-real: .venv/made pyproject.toml $(CONSTRAINTS)
	.venv/bin/python -m pip install --quiet --editable '.[real]' --constraint $(CONSTRAINTS)
	@touch $@ .venv/installed

.venv/made: $(if $(SAME),,FORCE)
	@test -n "$(FOUND)" || { echo "$(NONE)" >&2; exit 1; }
	rm -rf .venv
	"$(FOUND)" -m venv .venv
	@touch $@

# In a fresh environment, so that no package installed by hand is recorded.
constraints:
	@test -n "$(FOUND)" || { echo "$(NONE)" >&2; exit 1; }
	rm -rf build/constraints
	"$(FOUND)" -m venv build/constraints
	build/constraints/bin/python -m pip install --quiet --editable '.[dev]'
	{ echo '# The versions tested with Python $(VERSION): the package, its dev extra and all their dependencies.'; \
	  echo '# Written by `make constraints PYTHON=python$(VERSION)`; pyproject.toml has the supported ranges.'; \
	  build/constraints/bin/python -m pip freeze --exclude-editable | grep -viE '^(pip|setuptools|wheel)=='; \
	} > build/constraints.txt
	mv build/constraints.txt $(CONSTRAINTS)
	rm -rf build/constraints
