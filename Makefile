# make demo      trains and tests on real ultrasound images with a real image tower (3 minutes on two CPU cores)
# make demo-offline   the same on made-up images with a random tower, which needs no weights
# make test      ruff, mypy and pytest
# make bench     the benchmarks of docs/speed.md (half an hour on two CPU cores)
# make real      CLIP's weights and two real data sets from the internet, then training, test and report
# make docs      writes docs/flags.md anew
# Each makes the virtual environment that it needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# A part of BUSI (data/sample), DINOv2 as the image tower, a small random text tower.
DEMO_DATA := --obj BreastBUSI --data_path data/sample
DEMO_TOWER := --model_name ViT-tiny-14-56 --pretrain random --image_tower dinov2-small --img_size 224 --fidelity corrected
DEMO_TOKENS := --cache disk --cache_dir demo/cache --cache_dtype float16
DEMO_EPOCHS := --epoch 4 --eval_every 4 --select last

# Small model, random weights, made-up images: minutes on a laptop.
OFFLINE_OBJS := Brain Chest
OFFLINE_TRAIN := --shot 4 --fidelity corrected --model_name ViT-tiny-14-56 --pretrain random --img_size 112 --epoch 40
OFFLINE_PATHS := --data_path demo/data --save_path demo/ckpt

# Real images. Each step is tested by itself; the whole target needs internet and was never run in development.
REAL_SETS := breastmnist pneumoniamnist
REAL_SHOT := 16

BENCHMARKS := auc train epoch startup

.PHONY: demo demo-real demo-offline test types other-kernels bench real docs clean

$(VENV)/runtime: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -q -r requirements.txt
	touch $@

$(VENV)/dev: $(VENV)/runtime requirements-dev.txt
	$(BIN)/pip install --disable-pip-version-check -q -r requirements-dev.txt
	touch $@

demo: $(VENV)/runtime
	@if test -f CLIP/ckpt/dinov2-small.safetensors || $(BIN)/python -m CLIP.download dinov2-small; then $(MAKE) --no-print-directory demo-real; else \
	  echo "The weights of a real image tower cannot be had here: made-up images and a random tower instead."; \
	  $(MAKE) --no-print-directory demo-offline; fi

demo-real: $(VENV)/runtime
	$(BIN)/python -m dataset.check $(DEMO_DATA)
	WANDB_MODE=disabled $(BIN)/python train.py $(DEMO_DATA) $(DEMO_TOWER) $(DEMO_TOKENS) $(DEMO_EPOCHS) --shot 4 --save_path demo/ckpt --run_dir demo/runs
	$(BIN)/python test.py $(DEMO_DATA) $(DEMO_TOKENS) --save_path demo/ckpt --out_json demo/test.json --report demo/report --figures demo/pictures
	$(BIN)/python predict.py --ckpt demo/ckpt/BreastBUSI.pth data/sample/BreastBUSI_AD/test/Ungood/img --out demo/predictions
	$(BIN)/python -m docs.demo demo $(DEMO_DATA) $(DEMO_TOWER) $(DEMO_TOKENS) --shot 4

demo-offline: $(VENV)/runtime
	$(BIN)/python -m dataset.phantom --out demo/data --obj $(OFFLINE_OBJS)
	for obj in $(OFFLINE_OBJS); do \
	  WANDB_MODE=offline $(BIN)/python train.py --obj $$obj $(OFFLINE_TRAIN) $(OFFLINE_PATHS) --run_dir demo/runs || exit; \
	  $(BIN)/python test.py --obj $$obj $(OFFLINE_PATHS) --report demo/report/$$obj --figures demo/pictures || exit; \
	done
	$(BIN)/python predict.py --ckpt demo/ckpt/Brain.pth demo/data/Brain_AD/test/Ungood/img --out demo/predictions
	@echo "look at demo/report/Brain/index.html, demo/pictures, demo/predictions (made-up images, random weights: no medicine)"

test: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) --no-print-directory -j2 types other-kernels
	$(BIN)/python -m pytest -n auto --dist worksteal

types: $(VENV)/dev
	$(BIN)/mypy

other-kernels: $(VENV)/dev
	MKL_CBWR=COMPATIBLE $(BIN)/python -m pytest -n auto --dist worksteal -m equality $$(grep -rl mark.equality --include=*.py tests)

bench: $(VENV)/dev
	for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks.$$name || exit; done

real: $(VENV)/runtime
	$(BIN)/pip install --disable-pip-version-check -q "medmnist>=3.0"
	$(BIN)/python -m CLIP.download ViT-L-14-336
	for name in $(REAL_SETS); do \
	  $(BIN)/python -m dataset.medmnist $$name --size 224 --out real/data || exit; \
	  $(BIN)/python train.py --obj $$name --data_path real/data --shot $(REAL_SHOT) --save_path real/ckpt --run_dir real/runs || exit; \
	  $(BIN)/python test.py --obj $$name --data_path real/data --save_path real/ckpt --report real/report/$$name || exit; \
	done
	@echo "look at real/report/*/index.html"

docs: $(VENV)/runtime
	$(BIN)/python -m docs.generate

clean:
	rm -rf $(VENV) demo real .cache
