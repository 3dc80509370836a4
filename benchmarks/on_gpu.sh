#!/usr/bin/env bash
# Measure everything that needs a GPU, most important first, in at most nine minutes.
#   benchmarks/on_gpu.sh             PYTHON=... selects the interpreter
#   benchmarks/on_gpu.sh --curves    another call: time per clip over batch, mask ratio and frames
#   benchmarks/on_gpu.sh --dry-run   both with tiny sizes, on any machine
# Each part writes its results when it ends.
set -u
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-python}"
preset=vit-h14
frames=300
small=""
short=""
image=""
out=benchmarks/results
model="--model mae_vit_base_patch16 --batch_size_per_gpu 8"
if [ "${1:-}" = --dry-run ]; then
    preset=tiny
    frames=40
    small=--small
    short="--no-compile --max_batch 2"
    image="--img_size 64"
    out=$(mktemp -d)
    model="--model mae_vit_micro_patch16 --img_size 32 --short_side 64 --batch_size_per_gpu 2"
fi
log="$out/on_gpu${1:-}.log"
: > "$log"
failed=0

part() {  # SECONDS COMMAND...: run a command with a time limit, and log its output
    echo "== ${*:2}" | tee -a "$log"
    timeout "$1" "${@:2}" 2>&1 | tee -a "$log"
    if [ "${PIPESTATUS[0]}" != 0 ]; then
        echo "== FAILED: ${*:2}" | tee -a "$log"
        failed=1
    fi
}

if [ "${1:-}" = --curves ] || [ "${1:-}" = --dry-run ]; then
    part 500 "$PYTHON" benchmarks/train_step.py --preset "$preset" --curves --rounds 5 $short \
        --out "$out"
    [ "${1:-}" = --dry-run ] || exit $failed
fi
part 90 "$PYTHON" -m pytest -q -m gpu tests/test_gpu.py
part 60 "$PYTHON" benchmarks/attention.py $small --rounds 20 --out "$out"
part 210 "$PYTHON" benchmarks/train_step.py --preset "$preset" --rounds 15 --out "$out"
run=$(mktemp -d)
if "$PYTHON" -c "import av, tensorboard, pandas"; then
    "$PYTHON" -c "
import sys
from pathlib import Path

sys.path.insert(0, 'tests')
from make_videos import write_video

for index in range(16):
    write_video(Path('$run', f'{index}.mp4'), frames=$frames, size=(340, 256), gop=250)
"
    part 120 "$PYTHON" pretrain.py --data_dirs "$run" --output_dir "$run" $model --repeat_aug 4 \
        --max_steps 100 --recon_every 0
else
    echo "== pretrain.py not measured: it needs av, tensorboard, pandas" | tee -a "$log"
fi
part 60 "$PYTHON" benchmarks/static_clip.py --rounds 5 --batch 1 $image --out "$out"
rm -rf "$run"
echo "log: $log"
exit $failed
