"""Run a script with faults injected into this process; under torchrun: faulty.py FAULTS SCRIPT [flags].

FAULTS is JSON: a list of {"do": what, "rank": only there (default: everywhere), "at": in which micro-step of this process (from 1), "start":
only in which start of a torchrun with restarts}. What each does stands in `act`. Every micro-step is recorded: {output_dir}/used_RANK.jsonl.
"""

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
import pretrain
from data.loaders import EpochSampler
from util import checkpoint, dist


def act(fault: dict, model: torch.nn.Module) -> None:
    """Do what a fault says, at the beginning of a micro-step. nan, inf: spoil its loss, or its gradient on this rank."""
    what = fault["do"]
    if what.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, what))
    elif what == "raise":
        raise RuntimeError("injected: this rank fails")
    elif what == "inf":
        parameter = next(model.parameters())
        parameter.register_hook(
            lambda gradient: gradient * torch.inf if fault.pop("armed", None) else None
        )
        fault["armed"] = True
    elif what == "full disk":  # every file may grow to this size only, as on a disk without room
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault["bytes"], resource.RLIM_INFINITY))
    elif what == "room again":
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def inject(faults: list[dict], out: Path) -> None:
    """Patch the pretraining script so that the faults happen."""
    rank, start = dist.rank(), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    faults = [
        fault
        for fault in faults
        if fault.get("rank", rank) == rank and fault.get("start", start) == start
    ]
    honest, calls = (
        engine_pretrain.micro_step,
        [-2 if int(os.environ.get("WORLD_SIZE", 1)) > 1 else 0],
    )  # two passes to warm up

    def micro_step(model, batch, *rest):
        calls[0] += 1
        if calls[0] <= 0:
            return honest(model, batch, *rest)
        time.sleep(max((fault["seconds"] for fault in faults if fault["do"] == "slow"), default=0))
        now = [fault for fault in faults if fault.get("at") == calls[0]]
        for fault in now:
            act(fault, model)
        if any(fault["do"] == "nan" for fault in now):
            batch = batch | {"noise": batch["noise"]}
            engine_pretrain.normalize = lambda clips, *more: poisoned(clips, *more)
        loss = honest(model, batch, *rest)
        with open(out / f"used_{rank}.jsonl", "a") as file:
            file.write(json.dumps({"index": batch["index"].tolist(), "loss": loss.item()}) + "\n")
        return loss

    normalize = engine_pretrain.normalize

    def poisoned(clips, *more):
        engine_pretrain.normalize = normalize
        return normalize(clips, *more) * torch.nan

    engine_pretrain.micro_step = micro_step
    set_updates = EpochSampler.set_updates
    if any(fault["do"] == "no offset" for fault in faults):
        EpochSampler.set_updates = lambda self, first, last: set_updates(
            self, first - first % self.updates_per_epoch, last
        )
    for fault in faults:
        if fault["do"] == "in validation":
            validation_loss = pretrain.validation_loss

            def measured(model, batches, *rest, fault=fault, validation_loss=validation_loss):
                os.kill(os.getpid(), getattr(signal, fault["signal"]))
                return validation_loss(model, batches, *rest)

            pretrain.validation_loss = measured
        if fault["do"] == "die after save":
            save = checkpoint.save

            def save_and_die(path, state, *more, fault=fault, save=save):
                save(path, state, *more)
                if state["step"] == fault["step"]:
                    os.kill(os.getpid(), signal.SIGKILL)

            checkpoint.save = save_and_die


def main(faults: list[dict], script: str, flags: list[str]) -> None:
    """Run the script as its own command line would."""
    out = Path(flags[flags.index("--output_dir") + 1])
    out.mkdir(parents=True, exist_ok=True)
    inject(faults, out)
    dist.run_script(lambda: import_module(script).main(flags))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]).stem, sys.argv[3:])
