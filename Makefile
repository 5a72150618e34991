# stylelora: `make study` trains, measures and publishes; `make test` proves it. Every target makes what it needs.
# Settings: PYTHON=python3.12  VENV=.venv  PROFILE=study|full  JOBS=2 (runs at a time; 1 beside a GPU)  DEVICE=auto (of the pretraining)
#           TESTS=2 (processes that test; each is one thread and about 2 GB)  WITH="size=128 …" (of the pretraining)

PYTHON  ?= python3
VENV    ?= .venv
PROFILE ?= study
JOBS    ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo 1 || echo 2)
TESTS   ?= 2
DEVICE  ?= auto
BIN     := $(abspath $(VENV))/bin
READY   := $(VENV)/.installed
STEP    := bash tools/step.sh
LIBRARY := $(sort $(wildcard nbs/[0-9]*.ipynb nbs/[0-9]*/*.ipynb))
PRETRAIN := $(sort $(wildcard nbs/pretrain/*.ipynb))

export PATH := $(BIN):$(PATH)
export JUPYTER_PREFER_ENV_PATH := 1
export MPLBACKEND ?= agg
export TOKENIZERS_PARALLELISM := false

.PHONY: help install study smoke report pretrain test lint format test-notebooks test-python browser export nbs bench clean
.DEFAULT_GOAL := help

help:
	@echo "make study     train the style LoRAs, sample, measure, build the site (about 20 minutes on two cores)"
	@echo "make test      install, export check, notebook tests, pytest, the site in a browser"
	@echo "make smoke     the study at toy scale: does everything run? (a few minutes)"
	@echo "make report    build the site from the results that are there, into _site/"
	@echo "make pretrain  make the embedded base model again from the artwork (hours on a CPU; resumes)"
	@echo "make format    one format for notebooks, tests and tools (ruff)"
	@echo "make export    notebooks in nbs/ to the package stylelora/"
	@echo "make nbs       run the library notebooks in place and store their outputs"
	@echo "make bench     time sampling and training against diffusers and peft"
	@echo "make clean     remove what was built; keeps $(VENV), results and adapters"

# ---- the environment, once -------------------------------------------------------------------------------------

$(READY): settings.ini setup.py constraints.txt
	@$(STEP) "make $(VENV) and install stylelora with its dependencies (once; some GB on the first time)" \
	  bash tools/install.sh "$(PYTHON)" "$(VENV)"
	@touch $@

install: $(READY)

# ---- the study -------------------------------------------------------------------------------------------------

study: $(READY)
	@$(STEP) "study ($(PROFILE)): train, sample, measure, and build the site" \
	  stylelora study --profile $(PROFILE) --jobs $(JOBS)

smoke: $(READY)
	@$(STEP) "smoke: the whole study at toy scale" stylelora study --profile smoke

report: $(READY)
	@$(STEP) "report: build the site into _site/" stylelora report

pretrain: $(READY)
	@for nb in $(PRETRAIN); do \
	  $(STEP) "pretrain: $$nb" "$(BIN)/python" tools/pretrain.py $$nb device=$(DEVICE) $(WITH) || exit 1; done

# ---- the proof -------------------------------------------------------------------------------------------------

test test-notebooks test-python: export HF_HUB_OFFLINE := 1
test test-notebooks test-python: export OMP_NUM_THREADS := 1
test: $(READY) browser lint
	@$(STEP) "test: is stylelora/ what the notebooks export?" "$(BIN)/python" -m pytest -q tests/test_sync.py
	@$(MAKE) --no-print-directory test-notebooks
	@$(MAKE) --no-print-directory test-python

lint: $(READY)
	@$(STEP) "test: lint and format" "$(BIN)/ruff" check -q
	@$(STEP) "test: one format" "$(BIN)/ruff" format -q --check

# The library notebooks test themselves here. The experiment, pretraining and demo notebooks have parameters and take
# longer: pytest runs those through papermill at toy scale, so that each is executed once and not twice.
test-notebooks: $(READY)
	@$(STEP) "test: every cell of the library notebooks" \
	  nbdev_test --path nbs --skip_folder_re '^(pretrain|experiments|demo|[_.].*)$$' --n_workers $(TESTS)

test-python: $(READY)
	@$(STEP) "test: pytest (package, style, parity, smoke study, the site in a browser)" \
	  "$(BIN)/python" -m pytest -q -rs -n $(TESTS) --dist loadfile tests --ignore=tests/test_sync.py

# Chromium and pandoc for the tests of the site: Debian's, where this user may install them. Elsewhere the tests that need
# them skip and say so.
browser:
	@{ command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null 2>&1 && \
	  command -v pandoc >/dev/null 2>&1 || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then \
	    $(STEP) "install Chromium and pandoc for the tests of the site (once)" bash tools/browser.sh || \
	      echo "Chromium and pandoc could not be installed: the tests that need them will skip"; \
	  else echo "no Chromium or no pandoc here, and no right to install them: the tests that need them will skip"; fi; }

# ---- working on it ---------------------------------------------------------------------------------------------

format: $(READY)
	@$(STEP) "format: notebooks, tests, tools" "$(BIN)/ruff" format -q
	@$(STEP) "lint" "$(BIN)/ruff" check -q --fix

export: $(READY)
	@$(STEP) "export: notebooks to stylelora/" nbdev_export
	@$(STEP) "export: clean the notebooks' metadata" nbdev_clean

nbs: $(READY)
	@for nb in $(LIBRARY); do $(STEP) "run $$nb" "$(BIN)/python" tools/nbtext.py run $$nb || exit 1; done

# Against the installed diffusers and peft, in turns. It is no test.
bench: $(READY)
	@$(STEP) "bench: stylelora against diffusers and peft" "$(BIN)/python" tools/bench.py

clean:
	@$(STEP) "clean: remove built files (the environment $(VENV), results and adapters stay)" \
	  rm -rf _site _build build dist *.egg-info .pytest_cache .ruff_cache reports/runs/_*
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
