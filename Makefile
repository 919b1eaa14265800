# `make demo` and `make test` do all the set-up they need; `make help` says what else there is.
SHELL := bash
.DEFAULT_GOAL := help

# These are for the command line: PHOTOS=clone lets the demo train on photographs, VENV=folder puts
# d2kd's own environment elsewhere, PYTHON=interpreter uses an environment of yours, as it is, JOBS=4
# runs the tests in four processes.
VENV := .venv
JOBS := 2
PYTHON := $(VENV)/bin/python

# The stamp's name holds what the set-up depends on, so a change of it calls for a new set-up,
# and a mere touch does not. The stamp is no target: make knows no names with spaces.
SETUP_FILES := pyproject.toml setup.py constraints.txt tools/setup_venv.sh \
	d2kd/commands/install_detectron2.py
SETUP_KEY := $(shell { pwd; cat $(SETUP_FILES); } | cksum | cut -d' ' -f1)

.PHONY: help ready setup test demo lint clean distclean

help:
	@echo 'make demo       train a student without and with distillation on digits, in minutes'
	@echo 'make test       check code style and types, and run the tests'
	@echo 'make lint       check code style and types only'
	@echo 'make setup      set up $(VENV) only (the others do it by themselves, once)'
	@echo 'make clean      remove caches; data, trained models and $(VENV) stay'
	@echo 'make distclean  remove caches and .venv'
	@echo
	@echo 'PHOTOS=clone    make demo: on photographs of animals, from a clone of the repository'
	@echo '                that datasets/README.md names'
	@echo 'JOBS=number     make test: in that many processes (2)'
	@echo 'VENV=folder     set up and use that folder instead of .venv'
	@echo 'PYTHON=python   use an environment of your own, as it is, and set nothing up; it needs'
	@echo "                pip install -e '.[dev,eval,export,lite,timm]' && d2kd install-detectron2"

ready:
ifneq ($(origin PYTHON),command line)
	@[ -e '$(VENV)/.set-up-$(SETUP_KEY)' ] || { tools/setup_venv.sh '$(VENV)' && \
	    rm -f '$(VENV)'/.set-up-* && touch '$(VENV)/.set-up-$(SETUP_KEY)'; }
endif

setup: ready
	@echo 'd2kd runs with $(PYTHON)'

lint: ready
	@'$(PYTHON)' -m ruff check --quiet .
	@'$(PYTHON)' -m mypy --no-error-summary

# pytest's closing line is the last one that this prints. Tests of a GPU are processes of their own.
test: lint
	@[ ! -e /dev/nvidia0 ] || D2KD_TEST_GPU=1 '$(PYTHON)' -m pytest tests/cuda
	@'$(PYTHON)' -m pytest -n $(JOBS) --dist loadfile

demo: ready
	@'$(PYTHON)' -m d2kd demo$(if $(PHOTOS), --photos '$(PHOTOS)')

clean:
	@rm -rf .pytest_cache .ruff_cache .mypy_cache build *.egg-info
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean
	@rm -rf .venv
