# make demo   draws made-up data, trains and tests on them (about 3 minutes after the install)
# make test   ruff and pytest
# make bench  the benchmarks of the README
# Each makes the virtual environment that it needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Small model, random weights, made-up images: minutes on a laptop.
DEMO_OBJS := Brain Chest
DEMO_TRAIN := --shot 4 --model_name ViT-tiny-14-56 --pretrain random --img_size 112 --epoch 40
DEMO_PATHS := --data_path demo/data --save_path demo/ckpt

.PHONY: demo test bench clean

$(VENV)/runtime: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -q -r requirements.txt
	touch $@

$(VENV)/dev: $(VENV)/runtime requirements-dev.txt
	$(BIN)/pip install --disable-pip-version-check -q -r requirements-dev.txt
	touch $@

demo: $(VENV)/runtime
	$(BIN)/python -m dataset.phantom --out demo/data --obj $(DEMO_OBJS)
	for obj in $(DEMO_OBJS); do \
	  WANDB_MODE=offline $(BIN)/python train.py --obj $$obj $(DEMO_TRAIN) $(DEMO_PATHS) --run_dir demo/runs || exit; \
	  $(BIN)/python test.py --obj $$obj $(DEMO_PATHS) --report demo/report/$$obj --figures demo/pictures || exit; \
	done
	$(BIN)/python predict.py --ckpt demo/ckpt/Brain.pth demo/data/Brain_AD/test/Ungood/img --out demo/predictions
	@echo "look at demo/report/Brain/index.html, demo/pictures, demo/predictions (made-up images, random weights: no medicine)"

test: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n auto

bench: $(VENV)/dev
	$(BIN)/python -m benchmarks.auc
	$(BIN)/python -m benchmarks.scale
	$(BIN)/python -m benchmarks.grid
	$(BIN)/python -m benchmarks.backbone
	$(BIN)/python -m benchmarks.train

clean:
	rm -rf $(VENV) demo .cache
