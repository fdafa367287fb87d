# `make demo` makes a video, `make test` runs all checks. Both make their own environment first, once.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
SERVE_STAMP := $(VENV)/installed-serve
DEV_STAMP := $(VENV)/installed-dev
DOCS_VENV ?= .venv-docs
DOCS_STAMP := $(DOCS_VENV)/installed
PORT ?= 8000

.PHONY: help install demo serve pictures docs test lint types tests clean

help:
	@echo "make demo     install, then generate a video and its contact sheet"
	@echo "make serve    install, then serve the demo model: a page and an API at http://127.0.0.1:$(PORT)"
	@echo "make pictures regenerate the pictures of README and docs (docs/images)"
	@echo "make docs     the documentation as a site, in site/"
	@echo "make test     install, then lint, type check and tests"
	@echo "make install  the environment only ($(VENV))"
	@echo "make clean    remove the environments"

install: $(STAMP)

$(STAMP): requirements.txt setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $(STAMP)

$(SERVE_STAMP): $(STAMP) requirements-serve.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements-serve.txt
	touch $(SERVE_STAMP)

$(DEV_STAMP): $(STAMP) $(SERVE_STAMP) requirements-dev.txt requirements-data.txt requirements-colossalai.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements-data.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-colossalai.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps colossalai==0.5.0
	touch $(DEV_STAMP)

demo: $(STAMP)
	$(BIN)/python tools/demo/run.py

serve: $(SERVE_STAMP)
	$(BIN)/python scripts/serve.py configs/diffusion/inference/demo.py --port $(PORT)

pictures: $(DEV_STAMP)
	$(BIN)/python tools/demo/pictures.py --overwrite

$(DOCS_STAMP): requirements-docs.txt
	test -x $(DOCS_VENV)/bin/python || $(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	touch $(DOCS_STAMP)

docs: $(DOCS_STAMP)
	$(DOCS_VENV)/bin/mkdocs build --strict

test: lint types tests

lint: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DEV_STAMP)
	$(BIN)/mypy

tests: $(DEV_STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

clean:
	rm -rf $(VENV) $(DOCS_VENV)
