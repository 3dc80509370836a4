"""Run a script with faults injected into this process.

    python tests/faulty.py FAULTS SCRIPT [flags of the script]

FAULTS is JSON, a list of {"do": WHAT, "rank": R, "at": N, "start": S, ...}:

rank   the only rank with this fault (default: all)
at     the micro-step of this process, from 1
start  the only start of a torchrun with restarts (default: all)

WHAT                 effect
SIGTERM, SIGKILL...  send this process a signal, at a micro-step
raise                raise an error, at a micro-step
nan                  make the loss of a micro-step NaN
inf                  make a gradient of a micro-step infinite
full disk, free disk limit files to "bytes" bytes, and remove that limit, at a micro-step
slow                 wait "seconds" before each micro-step
slow read            wait "seconds" before each file is opened
no offset            start each epoch with its first sample, wherever it was interrupted
in validation        send this process "signal" at the begin of a validation
stop within          after a signal, allow "seconds" seconds without progress
die after save       send this process SIGKILL after the checkpoint of update "step"
die amid save        send it SIGKILL when half of that checkpoint is in the temporary file
save slowly          wait "seconds" before each checkpoint is written

Every micro-step is recorded in {output_dir}/used_RANK.jsonl.
"""

import io
import json
import os
import resource
import signal
import sys
import time
from importlib import import_module
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import torch

import engine_pretrain
import models_vit
import pretrain
from data import open_videos
from data.samplers import EpochSampler
from util import checkpoint, dist, preemption

DDP_SETTLING_PASSES = 2  # before the first micro-step, with several ranks


def send_signal(name: str) -> None:
    """Send this process a signal."""
    os.kill(os.getpid(), signal.Signals[name])


def limit_file_size(size: int) -> None:
    """Let files grow to `size` bytes only: then writing fails, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def make_gradient_infinite(model: torch.nn.Module) -> None:
    """Multiply the next gradient of the first parameter by infinity."""

    def spoil(gradient):
        handle.remove()
        return gradient * torch.inf

    handle = next(model.parameters()).register_hook(spoil)


def make_clips_nan() -> None:
    """Make the next normalized clips NaN."""
    normalize = models_vit.normalize

    def normalize_to_nan(clips, *pixel_stats):
        models_vit.normalize = normalize
        return normalize(clips, *pixel_stats) * torch.nan

    models_vit.normalize = normalize_to_nan


def inject_now(fault: dict, model: torch.nn.Module) -> None:
    """Inject a fault at the begin of a micro-step."""
    what = fault["do"]
    if what.startswith("SIG"):
        send_signal(what)
    elif what == "raise":
        raise RuntimeError("injected: this rank fails")
    elif what == "nan":
        make_clips_nan()
    elif what == "inf":
        make_gradient_infinite(model)
    elif what == "full disk":
        limit_file_size(fault["bytes"])
    elif what == "free disk":
        limit_file_size(resource.RLIM_INFINITY)


def patch_micro_step(faults: list[dict], out: Path) -> None:
    """Make micro-steps inject their faults and record what they used."""
    original = engine_pretrain.micro_step
    record = out / f"used_{dist.rank()}.jsonl"
    pause = sum(fault["seconds"] for fault in faults if fault["do"] == "slow")
    calls = 0
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        calls = -DDP_SETTLING_PASSES

    def micro_step(model, batch, *rest):
        nonlocal calls
        calls += 1
        if calls <= 0:
            return original(model, batch, *rest)
        time.sleep(pause)
        for fault in faults:
            if fault.get("at") == calls:
                inject_now(fault, model)
        loss = original(model, batch, *rest)
        used = {"index": batch["index"].tolist(), "loss": loss.item()}
        with open(record, "a") as file:
            file.write(json.dumps(used) + "\n")
        return loss

    engine_pretrain.micro_step = micro_step


def patch_sampler() -> None:
    """Make each pass begin with the first sample of its epoch."""
    set_updates = EpochSampler.set_updates

    def set_updates_without_offset(self, first, end):
        set_updates(self, first - first % self.updates_per_epoch, end)

    EpochSampler.set_updates = set_updates_without_offset


def patch_reading(seconds: float) -> None:
    """Make the opening of each file wait."""
    open_video = open_videos.open_video

    def open_slowly(*arguments):
        time.sleep(seconds)
        return open_video(*arguments)

    open_videos.open_video = open_slowly


def patch_validation(signal_name: str) -> None:
    """Make each validation begin with a signal to this process."""
    original = pretrain.validation_loss

    def validation_loss(*arguments):
        send_signal(signal_name)
        return original(*arguments)

    pretrain.validation_loss = validation_loss


def patch_save(step: int) -> None:
    """Make this process die after the checkpoint of update `step`."""
    original = checkpoint.save

    def save(path, state, *rest):
        original(path, state, *rest)
        if state["step"] == step:
            send_signal("SIGKILL")

    checkpoint.save = save


def patch_torch_save(step: int) -> None:
    """Make this process die when it has written half of the checkpoint of update `step`."""
    original = torch.save

    def save(state, file):
        if state["step"] == step:
            whole = io.BytesIO()
            original(state, whole)
            file.write(whole.getvalue()[: whole.tell() // 2])
            file.flush()
            send_signal("SIGKILL")
        original(state, file)

    torch.save = save


def patch_disk(seconds: float) -> None:
    """Make each checkpoint wait before it is written."""
    original = checkpoint.save

    def save(*arguments):
        time.sleep(seconds)
        original(*arguments)

    checkpoint.save = save


def inject(faults: list[dict], out: Path) -> None:
    """Patch the pretraining script so that this process has its share of the faults."""
    rank = dist.rank()
    start = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    own_faults = []
    for fault in faults:
        if fault.get("rank", rank) == rank and fault.get("start", start) == start:
            own_faults.append(fault)
    patch_micro_step(own_faults, out)
    for fault in own_faults:
        if fault["do"] == "no offset":
            patch_sampler()
        elif fault["do"] == "slow read":
            patch_reading(fault["seconds"])
        elif fault["do"] == "in validation":
            patch_validation(fault["signal"])
        elif fault["do"] == "stop within":
            preemption.STOP_SECONDS = fault["seconds"]
            preemption.STOP_UPDATES = 0
        elif fault["do"] == "die after save":
            patch_save(fault["step"])
        elif fault["do"] == "die amid save":
            patch_torch_save(fault["step"])
        elif fault["do"] == "save slowly":
            patch_disk(fault["seconds"])


def main(faults: list[dict], script: str, flags: list[str]) -> None:
    """Run the script as its own command line would."""
    out = Path(flags[flags.index("--output_dir") + 1])
    out.mkdir(parents=True, exist_ok=True)
    inject(faults, out)
    dist.run_script(lambda: import_module(script).main(flags))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]).stem, sys.argv[3:])
