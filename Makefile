# demo: the main job end to end on embedded data; test: everything; test-fast: what needs no training processes;
# bench: the models and the data plane side by side with others, more than twenty minutes
PYTHON ?= python3
BIN := .venv/bin
LAUNCH := $(BIN)/accelerate launch --quiet --num_cpu_threads_per_process $(shell nproc 2>/dev/null || echo 2) --config_file accelerate_configs/cpu.yaml

.PHONY: demo test test-fast lint bench clean

.venv/installed: requirements.txt setup.cfg
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps -e .
	touch $@

.venv/installed-test: .venv/installed requirements-test.txt
	$(BIN)/python -m pip install --quiet -r requirements-test.txt
	touch $@

demo: .venv/installed
	$(LAUNCH) run_pretrain.py --config recipes/demo/pretrain_glyphs.yaml
	$(LAUNCH) run_finetune.py --config recipes/demo/finetune_digits.yaml --model_name_or_path runs/demo/pretrain_glyphs
	$(LAUNCH) run_finetune.py --config recipes/demo/finetune_digits.yaml --preset vit-demo-patch8-32 --output_dir runs/demo/scratch_digits
	@echo
	@$(BIN)/vit-hf report runs/demo/pretrain_glyphs runs/demo/finetune_digits runs/demo/scratch_digits
	@echo "folders:         runs/demo/{pretrain_glyphs,finetune_digits,scratch_digits}, each a Hub model folder"
	@echo "next:            $(BIN)/vit-hf evaluate runs/demo/finetune_digits --dataset_name digits"

# on two workers; a file's tests stay on one, for they share launches; in the order of the names, so that the launches come
# first and no worker waits at the end for the other's
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: .venv/installed-test
	$(TEST)

test-fast: .venv/installed-test
	$(TEST) -m "not slow"

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/installed
	$(BIN)/python benchmarks/models.py
	$(BIN)/python benchmarks/data.py
	$(BIN)/vit-hf bench vit-demo-patch8-32 vit-small-patch4-32 resnet-18-cifar --seconds 10

clean:
	rm -rf .venv runs build *.egg-info
