#!/usr/bin/env bash
# Measure everything that needs a GPU, most important first, in at most nine minutes.
#   benchmarks/on_gpu.sh             PYTHON=... selects the interpreter
#   benchmarks/on_gpu.sh --curves    another call: time per clip over batch, mask ratio and frames
#   benchmarks/on_gpu.sh --dry-run   both with tiny sizes, on any machine
#   benchmarks/on_gpu.sh --rehearse  both at full size on the null GPU (tests/nullgpu), which this
#                                    builds; values are not compared
# SLOW=... multiplies the time limits (2 in a dry run, 4 in a rehearsal).
# Results are written as they come. A part that fails or takes too long does not stop the others.
set -u
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-python}"
mode="${1:-}"
if [ "$mode" = --rehearse ] && [ -z "${NULLGPU_GIB:-}" ]; then
    export PYTHON PYTHONPATH="$PWD/tests/nullgpu"
    exec "$PYTHON" tests/nullgpu/build.py "$(mktemp -d)" \
        -c "import os; os.execv('benchmarks/on_gpu.sh', ['on_gpu.sh', '--rehearse'])"
fi
preset=vit-h14
frames=300
small=""
short=""
check=""
image=""
runner=""
rounds=15
slow=1
out=benchmarks/results
model="--model mae_vit_base_patch16 --batch_size_per_gpu 8"
case "$mode" in
    --dry-run)
        preset=micro
        frames=40
        rounds=5
        slow="${SLOW:-2}"
        small=--small
        short="--no-compile --max_batch 2"
        image="--img_size 64 --model vit_micro_patch16"
        out=$(mktemp -d)
        model="--model mae_vit_micro_patch16 --img_size 32 --short_side 64 --batch_size_per_gpu 2
            --decoder_embed_dim 32 --decoder_depth 1 --decoder_num_heads 2"
        ;;
    --rehearse)
        check=--no-check
        runner=tests/nullgpu/unchecked.py
        slow="${SLOW:-4}"
        out=$(mktemp -d)
        ;;
esac
log="$out/on_gpu$mode.log"
: > "$log"
failed=0

part() {  # SECONDS COMMAND...: run a command with a time limit, and log its output
    echo "== ${*:2}" | tee -a "$log"
    local start=$SECONDS
    timeout $(($1 * slow)) "${@:2}" 2>&1 | tee -a "$log"
    local code="${PIPESTATUS[0]}"
    if [ "$code" != 0 ]; then
        echo "== FAILED ($code): ${*:2}" | tee -a "$log"
        failed=1
    fi
    echo "== $((SECONDS - start)) of $(($1 * slow)) s" | tee -a "$log"
}

curves() {
    part 500 "$PYTHON" benchmarks/train_step.py --preset "$preset" --curves --rounds 5 $short \
        --out "$out"
}

if [ "$mode" = --curves ]; then
    curves
    exit $failed
fi
part 280 "$PYTHON" benchmarks/train_step.py --preset "$preset" --rounds $rounds $check \
    --limit $((110 * slow)) --out "$out"
part 45 "$PYTHON" benchmarks/attention.py $small $check --rounds 20 --out "$out"
part 70 "$PYTHON" -m pytest -q -m gpu tests/test_gpu.py
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
    part 95 "$PYTHON" $runner pretrain.py --data_dirs "$run" --output_dir "$run" $model \
        --repeat_aug 4 --max_steps 100 --recon_every 0 --checkpoint_period 100
else
    echo "== pretrain.py not measured: it needs av, tensorboard, pandas" | tee -a "$log"
fi
part 40 "$PYTHON" benchmarks/static_clip.py --rounds 5 --batch 1 $image --out "$out"
rm -rf "$run"
if [ "$mode" = --dry-run ] || [ "$mode" = --rehearse ]; then
    curves
fi
echo "log: $log"
exit $failed
