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
	OMP_NUM_THREADS=1 $(PY) pretrain.py --num_workers 1 --data_dirs samples/videos/train --output_dir demo --datafile_dir demo --save_prefix pretrained \
		--model mae_vit_micro_patch16 --patch_size 8 --img_size 64 --num_frames 8 --pred_t_dim 8 --decoder_embed_dim 64 --decoder_depth 1 \
		--decoder_num_heads 4 --short_side 96 --batch_size_per_gpu 4 --repeat_aug 2 --sampling_rate 2 --max_steps 2900 --warmup_epochs 12 \
		--lr 6e-3 --mask_ratio 0.75 --clip_grad 1 --recon_every 1000 --checkpoint_period 1000 --log_every 100

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
