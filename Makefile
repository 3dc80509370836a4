PYTHON ?= python3
VENV ?= .venv
PY = $(VENV)/bin/python

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(VENV)/.stamp: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet -r requirements-dev.txt
	touch $@

demo: $(VENV)/.stamp  ## pretrain a tiny model on samples/ and draw reconstructions into demo/
	$(PY) pretrain.py --data_dirs samples/videos/train --output_dir demo --datafile_dir demo --save_prefix pretrained \
		--model mae_vit_tiny_patch16 --patch_size 8 --img_size 64 --num_frames 8 --pred_t_dim 8 --decoder_embed_dim 96 --decoder_depth 2 \
		--decoder_num_heads 3 --short_side 96 --batch_size_per_gpu 8 --repeat_aug 2 --max_steps 300 --warmup_epochs 4 --lr 2e-3 \
		--weight_decay 0.05 --mask_ratio 0.75 --clip_grad 1 --recon_every 1000 --log_every 20

test: $(VENV)/.stamp  ## run the tests (CPU)
	$(PY) -m pytest -q

lint: $(VENV)/.stamp  ## check the style
	$(PY) -m ruff check .

bench: $(VENV)/.stamp  ## time a training step
	$(PY) benchmarks/train_step.py

.venv-oldest/.stamp: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --upgrade pip
	.venv-oldest/bin/python -m pip install --quiet -r requirements-dev.txt 'torch==2.11.*' 'torchvision==0.26.*'
	touch $@

test-oldest: .venv-oldest/.stamp  ## run the tests on the oldest supported PyTorch
	.venv-oldest/bin/python -m pytest -q

.PHONY: help demo test lint bench test-oldest
