# A thin layer over two commands: every target runs a command that you could type yourself. `make help` lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help install init pretrain finetune evaluate predict doctor tensorboard export test test-all lint type bench torture

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
LABELS ?=
TARGET ?=
KILLS ?=
SIZE ?=
CKPT ?=
RESUME ?=
ARGS ?=
DEEP ?=
FORMAT ?=
OUT ?=
KILLS ?=

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
# Own labels: of an own archive, there are no synthetic ones.
own = $(filter classification regression segmentation,$(TASK))
target = $(if $(LABELS),--data.target.file "$(LABELS)") $(if $(TARGET),--data.target.name "$(TARGET)")
data = $(if $(DATA),--data.root "$(DATA)") $(if $(LAYOUT),--data.layout $(LAYOUT))
pretrain_config = --config $(CONFIGS)/pretrain.yaml $(if $(size),--config $(CONFIGS)/$(size).yaml)
task_config = --config $(CONFIGS)/finetune_$(TASK).yaml $(if $(size),--config $(CONFIGS)/finetune_$(TASK).$(size).yaml)
need = $(if $(strip $($(1))),,$(error $(1)= is missing, such as make $@ $(2)))
synthesize = $(if $(DATA),,$(BIN)/medmim synthesize $(1))

pretrain: $(STAMP) ## EXP= [DATA= LAYOUT= SIZE= RESUME= ARGS=]: pre-train, on synthetic cases without DATA
	$(call need,EXP,EXP=e_mim)
	@$(if $(RESUME),,$(call synthesize,$(pretrain_config)))
	$(BIN)/lightning fit $(if $(RESUME),--config "$(RESUME)/config.yaml" --ckpt_path "$(RESUME)",$(pretrain_config)) $(data) $(ARGS)

finetune: $(STAMP) ## EXP= TASK= [CKPT= DATA= LABELS= TARGET= LAYOUT= SIZE= ARGS=]: train a downstream task, from scratch without CKPT
	$(call need,EXP,EXP=e_mim TASK=brats_seg)
	$(call need,TASK,EXP=e_mim TASK=brats_seg)
	$(if $(own),$(call need,DATA,EXP=e_mim TASK=$(TASK) DATA=/archive))
	@$(call synthesize,$(task_config))
	$(BIN)/lightning fit $(task_config) $(if $(CKPT),--model.pretrained "$(CKPT)") $(data) $(target) $(ARGS)

evaluate: $(STAMP) ## CKPT= [DATA= LABELS=], or EXP= TASK= CKPT= [DATA= SIZE= ARGS=]: write metrics.json and a per-case CSV
	$(call need,CKPT,CKPT=runs/...)
ifeq ($(strip $(TASK)),)
	$(BIN)/medmim evaluate --ckpt "$(CKPT)" $(if $(DATA),--data "$(DATA)") $(if $(LABELS),--labels "$(LABELS)") $(foreach word,$(ARGS),--set=$(word))
else
	$(call need,EXP,EXP=e_mim TASK=brats_seg CKPT=runs/...)
	@$(call synthesize,$(task_config))
	$(BIN)/lightning test $(task_config) --ckpt_path "$(CKPT)" $(data) $(target) $(ARGS)
endif

predict: $(STAMP) ## CKPT= DATA= OUT= [ARGS=]: masks or probabilities of an archive or of files, and pictures
	$(call need,CKPT,CKPT=runs/... DATA=/archive OUT=predictions)
	$(call need,DATA,CKPT=runs/... DATA=/archive OUT=predictions)
	$(call need,OUT,CKPT=runs/... DATA=/archive OUT=predictions)
	$(BIN)/medmim predict --ckpt "$(CKPT)" --data "$(DATA)" --out "$(OUT)" $(foreach word,$(ARGS),--set=$(word))

init: $(STAMP) ## DATA= [EXP= ARGS=]: look at an archive and write archives/NAME.yaml, which DATA= takes
	$(call need,DATA,DATA=/path)
	$(BIN)/medmim init "$(DATA)" $(if $(EXP),--exp $(EXP)) $(ARGS)

doctor: $(STAMP) ## EXP= DATA= [TASK= SIZE= LAYOUT= ARGS= DEEP=1]: report what is wrong with an archive
	$(call need,EXP,EXP=e_mim DATA=/path)
	$(call need,DATA,EXP=e_mim DATA=/path)
	$(BIN)/medmim doctor $(if $(TASK),$(task_config),$(pretrain_config)) --root "$(DATA)" $(if $(LAYOUT),--layout $(LAYOUT)) $(if $(DEEP),--deep) $(ARGS)

tensorboard: $(STAMP) ## show runs/ in TensorBoard
	$(BIN)/tensorboard --logdir runs $(ARGS)

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

torture: $(STAMP) ## [EXP= KILLS= ARGS=]: kill and resume runs in many ways; they must end as whole ones do
	$(BIN)/medmim torture $(if $(EXP),--exp $(EXP)) $(if $(KILLS),--kills $(KILLS)) $(ARGS)
