# make help lists the targets. The targets install the Python packages that they need.
PYTHON ?= python3
BIN := .venv/bin
SEED ?= 0
RECIPES ?= lora_subject
JOBS ?= 1
POCKET ?= outputs/pocket
TEST_JOBS ?= 2
COMPARISON ?= outputs/sweeps/compare_methods

.DEFAULT_GOAL := help
.PHONY: help setup demo results compare quantization scale together real-shapes real-recipes bench gpu-check test test-slow test-browser gpu-stub fuzz signals test-clients docs docs-images settings lint format graph type wheel pocket-assets pocket-train pocket-ship pocket-quality clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  %-16s %s\n", $$1, $$2}'

.venv/.installed: pyproject.toml constraints.txt
	@echo "installing sdtune into .venv (2 to 4 minutes)"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e .
	@touch $@

.venv/.dev: .venv/.installed
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

setup: .venv/.dev ## create .venv with all dependencies of the tests and checks

demo: .venv/.installed ## train a LoRA of a new subject on pocket (minutes on a CPU)
	$(BIN)/sdtune train experiment=lora_subject

results: .venv/.installed ## train and evaluate RECIPES="lora_subject ..." with three seeds each; writes experiments/<recipe>/
	$(BIN)/python -m experiments.pocket.table $(RECIPES) --jobs $(JOBS)

compare: .venv/.installed ## compare the five methods with three seeds each and write the tables; resumable (hours)
	if test -f $(COMPARISON)/multirun.yaml; then $(BIN)/sdtune train -m resume=$(COMPARISON); \
	else $(BIN)/sdtune train -m sweep=compare_methods hydra.sweep.dir=$(COMPARISON); fi
	$(BIN)/python -m experiments.compare_methods.compare $(COMPARISON)
	$(BIN)/sdtune report $(COMPARISON)

quantization: .venv/.dev ## train the demo's LoRA with each quantization of the frozen weights, three seeds each (an hour)
	$(BIN)/sdtune train -m experiment=lora_subject hardware.precision=bf16-mixed seed=0,1,2 backbone.quantize=null,fp8,int8,nf4 hydra.sweep.dir=outputs/sweeps/quantization
	$(BIN)/python -m experiments.quantization.table outputs/sweeps/quantization

scale: .venv/.installed ## start trainings on tables of up to a million images and measure time and memory (half an hour); SCALE="--before CHECKOUT" compares an older checkout
	$(BIN)/python -m experiments.scale.measure $(SCALE)

together: .venv/.installed ## sample two combined LoRAs, and a LoRA with a ControlNet, into experiments/sample; trains what is missing
	for name in lora_subject lora_style controlnet_canny; do \
	  test -f outputs/results/$$name/seed-0/metrics.json || \
	  $(BIN)/sdtune train experiment=$$name hydra.run.dir=outputs/results/$$name/seed-0 || exit 1; done
	for name in subject_in_style map_with_lora; do \
	  rm -rf outputs/results/$$name && \
	  $(BIN)/sdtune sample experiment=sample/$$name hydra.run.dir=outputs/results/$$name && \
	  cp outputs/results/$$name/grid.png experiments/sample/$$name.png || exit 1; done

real-shapes: .venv/.installed ## compare three steps of each method at SD 1.5's size on the CPU with sdtune plan (needs 16 GiB of memory)
	$(BIN)/python -m experiments.real_shapes.measure

real-recipes: .venv/.installed ## run two steps of each sd15_... and sdxl_lora recipe, unchanged, with random weights of full size (an hour)
	$(BIN)/python -m experiments.real_shapes.recipes

.venv-peer/.installed: experiments/benchmark/requirements.txt pyproject.toml
	test -x .venv-peer/bin/python || $(PYTHON) -m venv .venv-peer
	.venv-peer/bin/pip install -q --disable-pip-version-check -r experiments/benchmark/requirements.txt -e '.[sweeps]'
	@touch $@

.venv-kohya/.installed:
	test -x .venv-kohya/bin/python || $(PYTHON) -m venv .venv-kohya
	.venv-kohya/bin/pip install -q --disable-pip-version-check $$(grep '^torch' experiments/benchmark/requirements.txt)
	cd $(KOHYA) && $(CURDIR)/.venv-kohya/bin/pip install -q --disable-pip-version-check -r requirements.txt
	@touch $@

# With PEER, sdtune and diffusers run in the same environment, which has the torchvision that diffusers' scripts need.
# kohya's sd-scripts pin other versions of diffusers and transformers, so they have an environment of their own.
bench: $(if $(PEER),.venv-peer/.installed,.venv/.dev) $(if $(KOHYA),.venv-kohya/.installed) ## time every method and a sweep of eight jobs; PEER=CHECKOUT of diffusers, KOHYA=CHECKOUT of sd-scripts also time their scripts (hours)
	$(if $(PEER),.venv-peer,.venv)/bin/python -m experiments.benchmark.bench $(if $(PEER),--peer $(PEER)) $(if $(KOHYA),--kohya $(KOHYA)) $(BENCH)

gpu-check: .venv/.installed ## measure sdtune on a GPU in ten minutes and write experiments/gpu/README.md; GPU_CHECK="--diffusers CHECKOUT" adds diffusers' script
	$(BIN)/python -m experiments.gpu.check --out outputs/gpu-check --page $(GPU_CHECK)

test: .venv/.dev ## run the tests (less than ten minutes on two cores)
	$(BIN)/python -m pytest -m "not slow and not gpu_stub and not browser" -n $(TEST_JOBS) --dist worksteal

test-slow: .venv/.dev ## run the slow tests: the longest ones, and the other model families
	$(BIN)/python -m pytest -m slow

.venv/.browser: .venv/.dev
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[browser]'
	@touch $@

test-browser: .venv/.browser ## click through the report in Chrome or Chromium (apt-get install chromium); skipped without one
	$(BIN)/python -m pytest -m browser -rs tests/reporting

.venv-gpu-stub/.installed: tests/gpu_stub/requirements.txt pyproject.toml
	test -x .venv-gpu-stub/bin/python || $(PYTHON) -m venv .venv-gpu-stub
	.venv-gpu-stub/bin/pip install -q --disable-pip-version-check -r tests/gpu_stub/requirements.txt -e '.[sweeps,optimizers]'
	@touch $@

gpu-stub: .venv-gpu-stub/.installed ## run the CUDA path on a stub GPU at the shapes of SD 1.5 and SDXL (downloads several GB; an hour)
	OMP_NUM_THREADS=1 .venv-gpu-stub/bin/python -m pytest -m gpu_stub tests/gpu_stub

fuzz: .venv/.dev ## check 1,000 generated configurations, run 100 of them, and read 200 mutations of each kind of file (SEED=0; half an hour)
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/configurations.py --seed $(SEED)
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/files.py --seed $(SEED)

signals: .venv/.dev ## stop and kill trainings at random moments, resume and compare them (SEED=0; half an hour)
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/signals.py --seed $(SEED) --method lora --moments 10
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/signals.py --seed $(SEED)
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/signals.py --seed $(SEED) --kill
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/signals.py --seed $(SEED) --method lora --moments 5 --kill --data all --phase training

.venv-clients/.installed: tests/clients/requirements.txt
	test -x .venv-clients/bin/python || $(PYTHON) -m venv .venv-clients
	.venv-clients/bin/pip install -q --disable-pip-version-check -r tests/clients/requirements.txt
	@touch $@

test-clients: .venv/.dev .venv-clients/.installed ## load every kind of artifact in the current and an older diffusers; writes docs/clients.md
	$(BIN)/python tests/clients/compare.py $(BIN)/python .venv-clients/bin/python

lint: .venv/.dev ## check with ruff, including the formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/.dev ## fix lint errors and formatting with ruff
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

settings: .venv/.dev ## write docs/settings.md from the YAML files and the docstrings
	$(BIN)/python docs/settings_reference.py

.venv/.docs: .venv/.installed
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

docs: .venv/.docs ## build the documentation site into docs/_build; warnings are errors
	$(BIN)/python -m sphinx -E -a -W --keep-going -q -b html -c docs . docs/_build
	@echo "docs/_build/docs/index.html"

docs-images: .venv/.docs .venv/.dev ## train a sweep on pocket and draw docs/images/rank_lr.png (half an hour on two cores; needs Chrome or Chromium)
	$(BIN)/python docs/heat_map.py outputs/docs/rank_lr docs/images/rank_lr.png

graph: ## write the current package graph to ARCHITECTURE.md
	$(PYTHON) docs/package_graph.py

type: .venv/.dev ## check src and experiments with mypy --strict
	$(BIN)/mypy

wheel: .venv/.dev ## build dist/sdtune-*.whl
	$(BIN)/python -m build --wheel

pocket-assets: .venv/.installed ## rebuild pocket's art pack from its two source packages
	mkdir -p $(POCKET)/assets
	cd $(POCKET)/assets && npm pack --silent @lobehub/fluent-emoji-3d@1.1.0 && apt-get download fonts-noto-color-emoji
	cd $(POCKET)/assets && dpkg -x fonts-noto-color-emoji_*.deb noto
	$(BIN)/python -m experiments.pocket.assets $(POCKET)/assets/lobehub-fluent-emoji-3d-1.1.0.tgz \
	  $(POCKET)/assets/noto/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf

pocket-train: .venv/.installed ## train pocket from random weights; resumable (hours)
	$(BIN)/python -m sdtune.pocket.pretraining.vae $(POCKET)
	$(BIN)/python -m sdtune.pocket.pretraining.clip $(POCKET)
	$(BIN)/python -m sdtune.pocket.pretraining.classifier $(POCKET)
	test -d $(POCKET)/pipeline || $(BIN)/python -m sdtune.pocket.pretraining.assemble $(POCKET)
	if test -f $(POCKET)/unet/metrics.json; then echo "$(POCKET)/unet is complete"; \
	elif ls $(POCKET)/unet/checkpoints/step*.ckpt >/dev/null 2>&1; then $(BIN)/sdtune train resume=$(POCKET)/unet; \
	else rm -rf $(POCKET)/unet && \
	$(BIN)/sdtune train experiment=pocket/unet backbone.path=$(POCKET)/pipeline hydra.run.dir=$(POCKET)/unet; fi

pocket-ship: .venv/.installed ## copy the result of pocket-train into the package
	$(BIN)/python -m sdtune.pocket.pretraining.assemble $(POCKET) --unet $(POCKET)/unet/artifact/pocket/unet --ship

pocket-quality: .venv/.installed ## evaluate the included pocket on 512 held-out prompts (SEED=n writes to outputs/ and overwrites nothing)
	$(BIN)/python -m experiments.pocket.quality --seed $(SEED) \
	  --out $(if $(filter 0,$(SEED)),experiments/pocket,outputs/pocket-quality-$(SEED))

clean: ## remove the environment, caches and the built documentation, but not the outputs
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache dist build docs/_build
