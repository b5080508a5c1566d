# Two commands: `make reproduce` and `make test`. Each sets up everything it needs inside this folder, then does its job.
PYTHON ?= python3
PRESET ?= laptop
SEEDS ?= 42
TABLES ?= main
DATA ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
DOCS := $(VENV)/docs-ready

# Caches of the tools we call stay in this folder too.
export XDG_CACHE_HOME := $(CURDIR)/$(VENV)/cache
export MPLCONFIGDIR := $(CURDIR)/$(VENV)/cache/matplotlib
export IPYTHONDIR := $(CURDIR)/$(VENV)/cache/ipython
export JUPYTER_CONFIG_DIR := $(CURDIR)/$(VENV)/cache/jupyter
export JUPYTER_DATA_DIR := $(CURDIR)/$(VENV)/cache/jupyter/data
export JUPYTER_RUNTIME_DIR := $(CURDIR)/$(VENV)/cache/jupyter/runtime
export HF_HOME := $(CURDIR)/$(VENV)/cache/huggingface
export PIP_NO_CACHE_DIR := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help reproduce test test-fast export docs lab clean clean-runs

help:
	@echo 'make reproduce              pre-train in both stages on synthetic data, evaluate, and make the report (results/)'
	@echo 'make reproduce DATA=FOLDER  the same on a clone of covid-chestxray-dataset found in FOLDER'
	@echo 'make reproduce TABLES=all   every table and figure; PRESET=tiny for a quick look, SEEDS=42,43,44 for more than one'
	@echo 'make test                   every page, the test suite, the export and README checks'
	@echo 'make export                 nbdev_export, nbdev_clean and README.md from nbs/index.ipynb'
	@echo 'make docs                   the documentation, to be opened at _docs/index.html'
	@echo 'make lab                    JupyterLab on nbs/'
	@echo 'make clean                  delete the environment and what was built; runs and results stay'
	@echo 'make clean-runs             delete runs, results and decoded images: everything that was computed'

$(READY): settings.ini setup.py constraints.txt
	@echo 'Installing the pinned packages into $(VENV) (once; a few minutes)'
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11, 5) and "cmcgns needs Python 3.11.5 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	@mkdir -p "$(IPYTHONDIR)" "$(JUPYTER_CONFIG_DIR)" "$(MPLCONFIGDIR)"
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $(READY)

reproduce: $(READY)
	$(BIN)/cmcgns reproduce --tables $(TABLES) --preset $(PRESET) --seeds $(SEEDS) $(if $(DATA),--data-root '$(DATA)')

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n 2 --dist loadgroup

test-fast: $(READY)
	$(BIN)/python -m pytest tests -m 'not slow'

export: $(READY)
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python tests/readme.py

$(DOCS): $(READY)
	@echo 'Installing what the documentation needs into $(VENV) (once)'
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	@touch $(DOCS)

docs: $(DOCS)
	OMP_NUM_THREADS=1 $(BIN)/python docs/build.py _docs

lab: $(READY)
	$(BIN)/jupyter lab nbs $(if $(filter 0,$(shell id -u)),--allow-root)

clean:
	rm -rf $(VENV) build dist _docs *.egg-info

clean-runs:
	rm -rf runs results cache
