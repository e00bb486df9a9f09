# Every target sets up what it needs; nothing has to be activated or installed first but Python, make, git and a C++ compiler.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
# The environment is whole when this file is there: its name holds the lock's checksum and this folder.
LOCK_KEY := $(shell (cat requirements.lock; echo "$(CURDIR)") | cksum | cut -d' ' -f1)
PKG_KEY := $(shell cksum < pyproject.toml | cut -d' ' -f1)
LOCKED := $(VENV)/.locked-$(LOCK_KEY)
PACKAGE := $(VENV)/.package-$(PKG_KEY)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore
export PRE_COMMIT_HOME := $(CURDIR)/$(VENV)/pre-commit
export PYTHONUNBUFFERED := 1
# Commands see the environment's programs first; the rules that build it see the machine's.
RUN := PATH="$(BIN):$$PATH"
# Tests: no hub, no accounts, one thread per process, and everything they write below one temporary folder. Compiled modules are kept, because tests
# start hundreds of processes.
TESTING := PYTHONDONTWRITEBYTECODE= HF_HUB_OFFLINE=1 WANDB_MODE=$${WANDB_MODE:-offline} OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
ROOTED := if [ -z "$${TEST_ROOT:-}" ]; then export TEST_ROOT="$$(mktemp -d)"; ROOT_MADE="$$TEST_ROOT"; trap 'rm -rf "$$TEST_ROOT"' EXIT; fi; \
	export POST_TRAINING_RUNS_DIR="$$TEST_ROOT/runs" POST_TRAINING_ARTIFACTS_DIR="$$TEST_ROOT/artifacts"
WORKERS ?= 2
PYTEST ?=
say = printf '\n== %s\n' "$(1)"

.PHONY: help env readers demo annotate pipeline test test-slow hooks notebooks slow-notebooks lab bench readme docs site-env clean

help: ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(LOCKED) $(PACKAGE) ## the environment in .venv, from requirements.lock (the other targets make it too)

# An interrupted installation leaves no such file, so the next `make` begins again with an empty folder.
$(LOCKED):
	@PYTHON="$(PYTHON)" bash container/install.sh $(VENV); touch $@

$(PACKAGE): $(LOCKED)
	@$(BIN)/python -m pip install --no-input --no-deps --no-build-isolation -e . < /dev/null >> $(VENV)/install.log 2>&1 || \
	{ tail -n 15 $(VENV)/install.log >&2; exit 1; }; rm -f $(VENV)/.package-*; touch $@

readers: env ## environments of other programs that open exports, from the locks in container/readers (READER="vllm": only these)
	@bash container/readers/install.sh "$${POST_TRAINING_READERS_DIR:-$(CURDIR)/.venv-readers}" $(READER)

demo: env ## fine-tune the tiny model on the demo data and evaluate it before and after (FORCE=1: once more)
	@# one thread: a model this small gains nothing from a second one, and loses tenfold where the machine is busy
	@$(RUN) OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} post-training train_sft job_subdir=demo $(if $(FORCE),--force)

annotate: demo ## preference data with the demo's model: filter, sample, score, reward, pair
	@$(RUN) OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} post-training plan annotate

pipeline: env ## the whole road on the tiny model: fine-tuning, annotation, QRPO and DPO, a report on unseen prompts
	@$(RUN) OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} post-training plan pipeline
	@out=$${POST_TRAINING_RUNS_DIR:-runs}/reports; mkdir -p "$$out"; $(RUN) papermill --no-progress-bar --cwd nbs/explore nbs/explore/pipeline.ipynb "$$out/pipeline.ipynb"; echo "report $$out/pipeline.ipynb"

test: env ## import contracts, hooks, notebooks, pytest
	@$(call say,import contracts); $(RUN) lint-imports --no-logo
	@$(MAKE) hooks
	@$(ROOTED); \
	$(MAKE) notebooks; \
	$(call say,pytest); $(RUN) $(TESTING) pytest -m "not slow" -n $(WORKERS) --dist worksteal $(PYTEST)

# The Slurm tests wait most of their time, for queues and limits: the others run beside them, and give way to them.
test-slow: env ## slow cells and slow tests: kills and resumes, two-process engines
	@$(ROOTED); code=0; slurm_log="$$(mktemp)"; \
	$(RUN) $(TESTING) pytest -m "slow and slurm" $(PYTEST) > "$$slurm_log" 2>&1 & slurm=$$!; \
	trap 'kill $$slurm 2> /dev/null || :; rm -rf "$$slurm_log" $${ROOT_MADE:-}' EXIT; \
	nice -n 5 $(MAKE) slow-notebooks || code=1; \
	$(call say,pytest: slow tests); $(RUN) $(TESTING) nice -n 5 pytest -m "slow and not slurm" -n $(WORKERS) --dist worksteal $(PYTEST) || [ $$? = 5 ] || code=1; \
	$(call say,pytest: slow tests on a Slurm); wait $$slurm || [ $$? = 5 ] || code=1; cat "$$slurm_log"; exit $$code

hooks: env ## the pre-commit hooks over all files
	@$(call say,hooks); $(RUN) pre-commit run --all-files

# nbdev_test in a process for each notebook, so that none sees what another has set.
NBDEV_TEST = $(RUN) $(TESTING) python tests/run_notebooks.py --workers $(WORKERS) $(1)

# Recipes run by their commands, in tests/test_terminal.py.
notebooks: env ## run the notebooks without their slow cells; the benchmarks are slow ones
	@$(call say,notebooks); $(ROOTED); find nbs -name '*.ipynb' -not -path '*/.*' -not -path 'nbs/90_bench/*' -not -path 'nbs/benchmarks/*' -not -path 'nbs/recipes/*' | sort | $(call NBDEV_TEST)

slow-notebooks: env ## run the notebooks that have slow cells, with them, and the benchmarks
	@$(call say,notebooks with slow cells); $(ROOTED); (grep -rlE --include='*.ipynb' --exclude-dir=.ipynb_checkpoints '"#\| *slow' nbs; ls nbs/90_bench/*.ipynb nbs/benchmarks/*.ipynb) | sort -u | $(call NBDEV_TEST,--flags=slow)

lab: env ## JupyterLab on the notebooks
	@$(RUN) jupyter lab --notebook-dir=. $(LAB) nbs/index.ipynb

bench: env ## the benchmarks against common alternatives, into runs/bench, and a table of targets (BENCH="masks sft": only these)
	@$(RUN) python -m post_training.bench.records $(BENCH)

readme: env ## README.md from nbs/index.ipynb, nbs/README.md from the notebooks' titles
	@$(RUN) jupyter nbconvert --log-level ERROR --to markdown --stdout nbs/index.ipynb | sed 's#](\.\./#](#g' > README.md
	@$(RUN) python nbs/notebook_map.py > nbs/README.md

# Sphinx has an environment of its own: nothing else needs its packages.
SITE := .venv-site
SITE_LOCKED := $(SITE)/.locked-$(shell cksum < container/site.lock | cut -d' ' -f1)
$(SITE_LOCKED): | env
	@$(call say,environment of the site in $(SITE)); rm -rf $(SITE); $(BIN)/python -m venv $(SITE)
	@$(SITE)/bin/python -m pip install -q --no-input --no-deps -r container/site.lock < /dev/null > $(SITE)/install.log 2>&1 || \
	{ tail -n 15 $(SITE)/install.log >&2; exit 1; }; touch $@

site-env: $(SITE_LOCKED) ## the environment of the site, which `make docs` and its test use

docs: $(SITE_LOCKED) ## a site of all notebooks as they are kept, in _docs/html (nothing is executed)
	@$(call say,pages); rm -rf _docs; $(RUN) python nbs/site/pages.py _docs/source
	@$(SITE)/bin/sphinx-build -W --keep-going -j $(WORKERS) -b html _docs/source _docs/html; echo "open _docs/html/index.html"

clean: ## remove the environment and caches; runs/ and artifacts/ stay
	rm -rf $(VENV) .venv-readers .venv-site _docs build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -not -path './artifacts/*' -prune -exec rm -rf {} +
