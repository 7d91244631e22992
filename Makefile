# make demo and make test are all that a newcomer types; make help lists the rest.
PYTHON := $(shell for p in python3.11 python3.12 python3.10 python3; do \
	if $$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; \
	then echo $$p; break; fi; done)
VENV := .venv
export GOMP_SPINCOUNT ?= 1000
RUN := $(VENV)/bin/python

.PHONY: help setup web demo objectives test test-slow clean

help:
	@echo "make demo        set up, make the built-in data, train two objectives, score, draw (minutes on 2 cores)"
	@echo "make test        set up, run ruff and all but the heavy checks"
	@echo "make test-slow   the heavy proofs"
	@echo "make web         a page in the browser: try models on clips, images and sounds of your own"
	@echo "make objectives  train every objective, seeds 0, 1 and 2 (hours): the tables of docs/, docs/objectives.png"
	@echo "make setup       the virtual environment alone"
	@echo "make clean       remove what demo and objectives made, but for what the pages show"

# --no-compile: modules are compiled when they are first imported, most of them never, which saves over a minute
unexport PYTHONDONTWRITEBYTECODE
$(VENV)/.ready: requirements.txt requirements-dev.txt
	@test -n "$(PYTHON)" || { echo "Python 3.10, 3.11 or 3.12 with its venv module is needed, and none was found"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.txt -r requirements-dev.txt
	@touch $@

setup: $(VENV)/.ready

demo: setup
	$(RUN) -m experiments.objectives --demo

web: setup
	$(RUN) -m web.app

objectives: setup
	$(RUN) -m experiments.objectives --seeds 0 1 2 --over_time --picture docs/objectives.png
	$(RUN) -m experiments.objectives --seeds 0 1 2 --write_docs

test: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(RUN) -m pytest -n 2 --dist loadfile

test-slow: setup
	$(RUN) -m pytest -m slow

clean:
	rm -rf data/synthetic data/synthetic_3 checkpoints/demo_seed_* checkpoints/demo_listen_seed_* \
		checkpoints/demo_objectives.png checkpoints/demo_film.mp4 checkpoints/demo_results checkpoints/objectives
