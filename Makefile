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

demo: $(VENV)/.stamp  ## pretrain a tiny model on samples/, then finetune it on videos and images; all files go to demo/
	OMP_NUM_THREADS=1 $(PY) pretrain.py --num_workers 1 --data_dirs samples/videos/train --output_dir demo --datafile_dir demo --save_prefix pretrained \
		--model mae_vit_micro_patch16 --patch_size 8 --img_size 64 --num_frames 8 --pred_t_dim 8 --decoder_embed_dim 64 --decoder_depth 1 \
		--decoder_num_heads 4 --short_side 96 --batch_size_per_gpu 4 --repeat_aug 2 --sampling_rate 2 --max_steps 2900 --warmup_epochs 12 \
		--lr 6e-3 --mask_ratio 0.75 --jitter_scales_relative 0.3 0.6 --clip_grad 1 --recon_every 1000 --checkpoint_period 1000 --log_every 100 \
		--val_dirs samples/videos/val --probe_dir samples/videos --val_every 100
	OMP_NUM_THREADS=1 $(PY) pretrain.py --visualize demo/pretrained.pth --data_dirs samples/videos/val --output_dir demo --overwrite
	OMP_NUM_THREADS=1 $(PY) finetune.py --num_workers 1 --train_dir samples/videos/train --val_dir samples/videos/val --output_dir demo \
		--datafile_dir demo --save_prefix videos --finetune demo/pretrained.pth --num_classes 3 --model vit_micro_patch16 --patch_size 8 \
		--img_size 64 --num_frames 8 --sampling_rate 2 --short_side 96 --batch_size_per_gpu 6 --epochs 8 --warmup_epochs 1 --lr 2e-3 \
		--dropout 0 --log_every 100
	OMP_NUM_THREADS=1 $(PY) finetune_on_image.py --num_workers 1 --train_data_path samples/images/train --val_data_path samples/images/val \
		--output_dir demo --save_prefix images --finetune demo/pretrained.pth --num_classes 10 --model vit_micro_patch16 --patch_size 8 \
		--img_size 64 --num_frames 8 --static_clip folded --batch_size_per_gpu 8 --epochs 50 --warmup_epochs 5 --lr 2e-3 --layer_decay 0.75 \
		--smoothing 0.1 --dropout 0 --drop_path_rate 0 --no-flip --checkpoint_period 50 --log_every 100

test: $(VENV)/.stamp  ## run the quick tests (CPU)
	$(PY) -m pytest -q -m "not slow"

test-all: $(VENV)/.stamp  ## run all tests (CPU), those of minutes too
	$(PY) -m pytest -q

lint: $(VENV)/.stamp  ## check the style
	$(PY) -m ruff check .

bench: $(VENV)/.stamp  ## measure; tables go to benchmarks/results/
	$(PY) benchmarks/train_step.py
	$(PY) benchmarks/static_clip.py --batch 1

.venv-oldest/.stamp: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --upgrade pip
	.venv-oldest/bin/python -m pip install --quiet -r requirements-dev.txt 'torch==2.11.*' 'torchvision==0.26.*'
	touch $@

test-oldest: .venv-oldest/.stamp  ## run the tests on the oldest supported PyTorch
	.venv-oldest/bin/python -m pytest -q

.PHONY: help demo test test-all lint bench test-oldest
