# make train | screen | test | env | lint | clean
#   STACK=xeon (default: torch 2.8 + IPEX, in .venv) or native (torch 2.13, in .venv-native)
#   TORCH_INDEX_URL=<PyTorch's own CPU index>   optional: a much smaller download
STACK ?= xeon
VENV := $(if $(filter native,$(STACK)),.venv-native,.venv)
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && echo $$p && break; done)
PINS := requirements/common.txt requirements/$(STACK).txt
# What an environment was made from stands in its stamps' names: other pins or another index make a new one, another setup.cfg installs the
# package anew.
PINNED := $(VENV)/.pins-$(shell { cat $(PINS); echo "$(TORCH_INDEX_URL)"; } | cksum | cut -d' ' -f1)
INSTALLED := $(VENV)/.package-$(shell cat $(PINS) setup.cfg pyproject.toml | cksum | cut -d' ' -f1)
# PyPI's torch is pinned with ===; PyTorch's own index carries the same version with a local label, which only == matches.
INDEX := $(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL))
PLATES ?= plates/demo
TESTS ?= tests
HCSDL ?= $(VENV)/bin/hcsdl
# Of `make screen`: its folder, which bbbc021_* plates, the folds of compounds, and settings given to every training and every embedding.
SCREEN ?= runs/screen
SIZE ?= reduced
FOLDS ?= 0 1 2 3
TRAIN ?=
EMBED ?=

.PHONY: env train screen test lint clean
env: $(INSTALLED)

$(PINNED):
	@test -f requirements/$(STACK).txt || { echo "STACK must be xeon or native. Got $(STACK) instead."; exit 2; }
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 must be on PATH. Found neither; name one with PYTHON=…"; exit 2; }
	@echo "making $(VENV) from $(PINS): a few minutes, once"
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	cat $(PINS) | grep -v '^-r' | sed 's/===/$(if $(TORCH_INDEX_URL),==,===)/' > $(VENV)/requirements.txt
	$(VENV)/bin/python -m pip install --disable-pip-version-check -q $(INDEX) -r $(VENV)/requirements.txt
	touch $@

$(INSTALLED): $(PINNED)
	$(VENV)/bin/python -m pip install --disable-pip-version-check -q --no-deps --no-build-isolation -e .
	touch $@

train: env
	$(VENV)/bin/hcsdl simulate simulate.preset=demo plates.root=$(PLATES)
	$(VENV)/bin/hcsdl train experiment=demo plates.root=$(PLATES)

# simulate → train → embed → score → report. The network that is scored reads no mechanism's name; one that does stands beside it, marked leaky,
# and networks that never saw the compounds they are asked about. Started again it goes on where it stopped.
run = plates.root=$(SCREEN)/plates experiment=screen $(TRAIN) run_dir=$(SCREEN)
screen: env
	$(HCSDL) simulate simulate=bbbc021_$(SIZE) plates.root=$(SCREEN)/plates
	$(HCSDL) train $(run)/treatment
	$(HCSDL) train $(run)/moa training.target=MoA
	$(HCSDL) embed checkpoint=$(SCREEN)/treatment embed.output=$(SCREEN)/treatment/embeddings/random.parquet embed.weights=random $(EMBED)
	for run in treatment moa; do $(HCSDL) embed checkpoint=$(SCREEN)/$$run embed.output=$(SCREEN)/$$run/embeddings/plates.parquet $(EMBED) || exit; done
	for fold in $(FOLDS); do $(HCSDL) train $(run)/fold$$fold training.target=MoA plates.split=compound_folds plates.fold=$$fold training.epochs=5 && \
		$(HCSDL) embed checkpoint=$(SCREEN)/fold$$fold embed.output=$(SCREEN)/fold$$fold/embeddings/plates.parquet $(EMBED) || exit; done
	$(HCSDL) score 'profiles=[$(SCREEN)/treatment/embeddings/plates.parquet,$(SCREEN)/treatment/embeddings/random.parquet,$(SCREEN)/moa/embeddings/plates.parquet]' \
		'score.names=[treatments,random network,mechanisms]' score.output=$(SCREEN)/scores
	$(HCSDL) score profiles=[$$(ls $(SCREEN)/fold*/embeddings/plates.parquet | paste -sd,)] score.folds=true score.output=$(SCREEN)/scores_folds
	$(HCSDL) report 'run=[$(SCREEN)/treatment,$(SCREEN)/moa]' 'scores=[$(SCREEN)/scores,$(SCREEN)/scores_folds]' report.output=$(SCREEN)/report

test: env
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal $(if $(filter native,$(STACK)),-m "not xeon_only and not slow") $(TESTS)

lint: env
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports

clean:
	rm -rf .venv .venv-native build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
