# make help lists what there is. demo and test set everything up by themselves.
PYTHON ?= python3
BIN := .venv/bin
SEED ?= 0
RECIPES ?= lora_subject
JOBS ?= 1
POCKET ?= outputs/pocket
TEST_JOBS ?= 2
COMPARISON ?= outputs/sweeps/compare_methods

.DEFAULT_GOAL := help
.PHONY: help setup demo results compare together real-shapes real-recipes bench test test-slow test-clients lint format graph type wheel pocket-assets pocket-train pocket-ship pocket-quality clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  %-16s %s\n", $$1, $$2}'

.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e .
	@touch $@

.venv/.dev: .venv/.installed
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

setup: .venv/.dev ## make .venv with everything that tests and checks need

demo: .venv/.installed ## teach pocket a subject it has never seen (a LoRA, minutes on a CPU)
	$(BIN)/sdtune train experiment=lora_subject

results: .venv/.installed ## measure RECIPES="lora_subject ..." with three seeds each, and write experiments/<recipe>/
	$(BIN)/python -m experiments.pocket.table $(RECIPES) --jobs $(JOBS)

compare: .venv/.installed ## the five methods, three seeds each, and their tables; goes on where it stopped (hours)
	if test -f $(COMPARISON)/multirun.yaml; then $(BIN)/sdtune train -m resume=$(COMPARISON); \
	else $(BIN)/sdtune train -m sweep=compare_methods hydra.sweep.dir=$(COMPARISON); fi
	$(BIN)/python -m experiments.compare_methods.compare $(COMPARISON)
	$(BIN)/sdtune report $(COMPARISON)

together: .venv/.installed ## two LoRAs at once, and a LoRA under a ControlNet: train what is missing, sample into experiments/sample
	for name in lora_subject lora_style controlnet_canny; do \
	  test -f outputs/results/$$name/seed-0/metrics.json || \
	  $(BIN)/sdtune train experiment=$$name hydra.run.dir=outputs/results/$$name/seed-0 || exit 1; done
	for name in subject_in_style map_with_lora; do \
	  rm -rf outputs/results/$$name && \
	  $(BIN)/sdtune sample experiment=sample/$$name hydra.run.dir=outputs/results/$$name && \
	  cp outputs/results/$$name/grid.png experiments/sample/$$name.png || exit 1; done

real-shapes: .venv/.installed ## a step of each method at SD 1.5's shapes on the CPU, against sdtune plan (16 GiB of memory)
	$(BIN)/python -m experiments.real_shapes.measure

real-recipes: .venv/.installed ## two steps of each sd15_... and sdxl_lora recipe as it stands, random weights at true shapes (an hour)
	$(BIN)/python -m experiments.real_shapes.recipes

.venv-peer/.installed: experiments/benchmark/requirements.txt pyproject.toml
	test -x .venv-peer/bin/python || $(PYTHON) -m venv .venv-peer
	.venv-peer/bin/pip install -q --disable-pip-version-check -r experiments/benchmark/requirements.txt -e '.[sweeps]'
	@touch $@

# With a peer both run in one environment, which has the torchvision that its scripts want.
bench: $(if $(PEER),.venv-peer/.installed,.venv/.dev) ## time every method and a sweep of eight; PEER=CHECKOUT of diffusers times its scripts too (hours)
	$(if $(PEER),.venv-peer,.venv)/bin/python -m experiments.benchmark.bench $(if $(PEER),--peer $(PEER)) $(BENCH)

test: .venv/.dev ## the tests, under ten minutes on two cores
	$(BIN)/python -m pytest -m "not slow" -n $(TEST_JOBS) --dist worksteal

test-slow: .venv/.dev ## the tests that take more than half a minute each
	$(BIN)/python -m pytest -m slow

.venv-clients/.installed: tests/clients/requirements.txt
	test -x .venv-clients/bin/python || $(PYTHON) -m venv .venv-clients
	.venv-clients/bin/pip install -q --disable-pip-version-check -r tests/clients/requirements.txt
	@touch $@

test-clients: .venv/.dev .venv-clients/.installed ## every artifact in diffusers of today and of an older release; writes docs/clients.md
	$(BIN)/python tests/clients/compare.py $(BIN)/python .venv-clients/bin/python

lint: .venv/.dev ## ruff's checks and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/.dev ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

graph: ## write today's packages into ARCHITECTURE.md
	$(PYTHON) docs/package_graph.py

type: .venv/.dev ## mypy, strict, on src and experiments
	$(BIN)/mypy

wheel: .venv/.dev ## build dist/sdtune-*.whl
	$(BIN)/python -m build --wheel

pocket-assets: .venv/.installed ## rebuild the art pack from its two source packages
	mkdir -p $(POCKET)/assets
	cd $(POCKET)/assets && npm pack --silent @lobehub/fluent-emoji-3d@1.1.0 && apt-get download fonts-noto-color-emoji
	cd $(POCKET)/assets && dpkg -x fonts-noto-color-emoji_*.deb noto
	$(BIN)/python -m experiments.pocket.assets $(POCKET)/assets/lobehub-fluent-emoji-3d-1.1.0.tgz \
	  $(POCKET)/assets/noto/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf

pocket-train: .venv/.installed ## train pocket from nothing: hours; saves as it goes, and goes on when called again
	$(BIN)/python -m sdtune.pocket.pretraining.vae $(POCKET)
	$(BIN)/python -m sdtune.pocket.pretraining.clip $(POCKET)
	$(BIN)/python -m sdtune.pocket.pretraining.classifier $(POCKET)
	test -d $(POCKET)/pipeline || $(BIN)/python -m sdtune.pocket.pretraining.assemble $(POCKET)
	if test -f $(POCKET)/unet/metrics.json; then echo "$(POCKET)/unet is complete"; \
	elif ls $(POCKET)/unet/checkpoints/step*.ckpt >/dev/null 2>&1; then $(BIN)/sdtune train resume=$(POCKET)/unet; \
	else rm -rf $(POCKET)/unet && \
	$(BIN)/sdtune train experiment=pocket/unet backbone.path=$(POCKET)/pipeline hydra.run.dir=$(POCKET)/unet; fi

pocket-ship: .venv/.installed ## put what pocket-train made into the package
	$(BIN)/python -m sdtune.pocket.pretraining.assemble $(POCKET) --unet $(POCKET)/unet/artifact/pocket/unet --ship

pocket-quality: .venv/.installed ## measure the shipped pocket on 512 held-out prompts (SEED=n: into outputs/, nothing overwritten)
	$(BIN)/python -m experiments.pocket.quality --seed $(SEED) \
	  --out $(if $(filter 0,$(SEED)),experiments/pocket,outputs/pocket-quality-$(SEED))

clean: ## remove the environment and caches, not the outputs
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache dist build
