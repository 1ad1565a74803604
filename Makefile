# A thin layer over two commands: every target runs a command that you could type yourself. `make help` lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help install pretrain finetune evaluate doctor tensorboard export plan test test-all lint type bench

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST = $(BIN)/pytest --numprocesses auto --dist loadscope
CONFIGS := experiments/$(EXP)/configs

EXP ?=
TASK ?=
DATA ?=
LAYOUT ?=
SIZE ?=
CKPT ?=
RESUME ?=
ARGS ?=
DEEP ?=
FORMAT ?=
OUT ?=

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' | column -t -s '|'

install: $(STAMP) ## create .venv with the locked dependencies and this project

$(STAMP): requirements.lock pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip sync --quiet --python $(BIN)/python requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $@

# Without DATA a synthetic tree is used, with the sizes of the smoke overlay.
size = $(if $(SIZE),$(SIZE),$(if $(DATA),,smoke))
data = $(if $(DATA),--data.root "$(DATA)") $(if $(LAYOUT),--data.layout $(LAYOUT))
pretrain_config = --config $(CONFIGS)/pretrain.yaml $(if $(size),--config $(CONFIGS)/$(size).yaml)
task_config = --config $(CONFIGS)/finetune_$(TASK).yaml $(if $(size),--config $(CONFIGS)/finetune_$(TASK).$(size).yaml)
need = $(if $(strip $($(1))),,$(error $(1)= is missing, such as make $@ $(2)))
synthesize = $(if $(DATA),,$(BIN)/medmim synthesize $(1))

pretrain: $(STAMP) ## EXP= [DATA= LAYOUT= SIZE= RESUME= ARGS=]: pre-train, on synthetic cases without DATA
	$(call need,EXP,EXP=e_mim)
	@$(if $(RESUME),,$(call synthesize,$(pretrain_config)))
	$(BIN)/lightning fit $(if $(RESUME),--config "$(RESUME)/config.yaml" --ckpt_path "$(RESUME)",$(pretrain_config)) $(data) $(ARGS)

finetune: $(STAMP) ## EXP= TASK= [CKPT= DATA= LAYOUT= SIZE= ARGS=]: train a downstream task, from scratch without CKPT
	$(call need,EXP,EXP=e_mim TASK=brats_seg)
	$(call need,TASK,EXP=e_mim TASK=brats_seg)
	@$(call synthesize,$(task_config))
	$(BIN)/lightning fit $(task_config) $(if $(CKPT),--model.pretrained "$(CKPT)") $(data) $(ARGS)

evaluate: $(STAMP) ## EXP= TASK= CKPT= [DATA= SIZE= ARGS=]: write metrics.json and a per-case CSV
	$(call need,EXP,EXP=e_mim TASK=brats_seg CKPT=runs/...)
	$(call need,TASK,EXP=e_mim TASK=brats_seg CKPT=runs/...)
	$(call need,CKPT,EXP=e_mim TASK=brats_seg CKPT=runs/...)
	@$(call synthesize,$(task_config))
	$(BIN)/lightning test $(task_config) --ckpt_path "$(CKPT)" $(data) $(ARGS)

doctor: $(STAMP) ## EXP= DATA= [LAYOUT= DEEP=1]: report what is wrong with an archive
	$(call need,EXP,EXP=e_mim DATA=/path)
	$(call need,DATA,EXP=e_mim DATA=/path)
	$(BIN)/medmim doctor --config $(CONFIGS)/pretrain.yaml --root "$(DATA)" $(if $(LAYOUT),--layout $(LAYOUT)) $(if $(DEEP),--deep)

tensorboard: $(STAMP) ## show runs/ in TensorBoard
	$(BIN)/tensorboard --logdir runs $(ARGS)

plan: $(STAMP) ## EXP= DATA=|SAMPLES= [MACHINE= GPUS=]: estimate hours and memory before anything is rented
	$(call need,EXP,EXP=e_mim SAMPLES=1000)
	$(BIN)/medmim plan $(pretrain_config) $(if $(SAMPLES),--samples $(SAMPLES),--root "$(DATA)") --machine $(or $(MACHINE),h200x8) --gpus $(or $(GPUS),1,8,64) $(ARGS)

export: $(STAMP) ## EXP= CKPT= FORMAT= OUT=: write the encoder as safetensors, config and card
	$(call need,EXP,EXP=e_mim CKPT=runs/... FORMAT=monai OUT=export)
	$(call need,CKPT,EXP=e_mim CKPT=runs/... FORMAT=monai OUT=export)
	$(call need,FORMAT,EXP=e_mim CKPT=runs/... FORMAT=monai OUT=export)
	$(call need,OUT,EXP=e_mim CKPT=runs/... FORMAT=monai OUT=export)
	$(BIN)/medmim export --exp $(EXP) --ckpt "$(CKPT)" --format $(FORMAT) --out "$(OUT)"

test: $(STAMP) ## run the fast tests
	$(PYTEST) $(ARGS)

test-all: $(STAMP) ## run all tests: also slow and multi-process ones, and those on real data (MEDMIM_DATA)
	$(PYTEST) -m "" $(ARGS)

lint: $(STAMP) ## run ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(STAMP) ## run mypy
	$(BIN)/mypy

bench: $(STAMP) ## [EXP= ARGS=]: benchmark pairs of our own variants side by side
	$(BIN)/medmim bench $(if $(EXP),--exp $(EXP)) $(ARGS)
