"""Find, lock and check the checkpoint that a run resumes from or evaluates."""

import fcntl
import os
import re
import time
from io import TextIOWrapper
from pathlib import Path

from util import checkpoint
from util.checkpoint import CorruptCheckpoint
from util.dist import UserError, print0
from util.files import RunFiles
from util.hub import is_hub_path

START_FLAGS = ("finetune", "init_from", "resume")  # they name a run's first checkpoint
RESTART_COUNTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
MAX_KEPT = 100  # previous checkpoints that are looked for
_locks: dict[Path, TextIOWrapper] = {}  # open lock files of this process


def lock_run(files: RunFiles, patience: float = 60) -> None:
    """Lock the run until this process ends, so that no other process writes its files.

    patience: seconds to wait for another process to release the lock. Raises UserError if it does
    not. Do nothing on file systems without locks.
    """
    if files.lock in _locks:
        return
    deadline = time.monotonic() + patience
    lock_file = open(files.lock, "a")  # noqa: SIM115 (stays open until the process ends)
    while not _try_lock(lock_file):
        if time.monotonic() > deadline:
            raise UserError(
                f"another process writes {files.checkpoint} (it holds {files.lock}). "
                "End that process or use another --save_prefix."
            )
        time.sleep(0.2)
    _locks[files.lock] = lock_file


def _try_lock(lock_file: TextIOWrapper) -> bool:
    """Return False if another process holds the lock."""
    try:
        # The lock is per process: forked loader workers do not inherit it.
        fcntl.lockf(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # the file system has no locks
        return True
    return True


def is_restart() -> bool:
    """Return whether torchrun or SLURM has started this command before."""
    return any(os.environ.get(name, "0") != "0" for name in RESTART_COUNTS)


def find_resume(files: RunFiles, resume: str, overwrite: bool) -> Path | None:
    """Return the checkpoint to resume training from, or None to start from scratch.

    resume: "auto" for the run's own newest readable checkpoint, "" for none, or a path (also
    hf:...). A rerun command with a path resumes from the run's own newer checkpoint, and so does a
    restart by torchrun or SLURM with any flag.
    Raises UserError if the path is missing or unreadable, if no checkpoint of the run is readable,
    or if the run exists and would be overwritten without `overwrite`.
    """
    if files.folder.is_dir():
        lock_run(files)
    newest = newest_readable(files.checkpoint)
    if resume == "auto" or (newest and is_restart()):
        return newest
    path = Path(resume) if resume else None
    if newest and not overwrite:
        if path and (path == files.checkpoint or _flag_of(newest, "resume") == resume):
            return newest
        raise UserError(
            f"{files.checkpoint} exists and --resume {resume or repr('')} would overwrite that "
            "run. Use another --save_prefix, or --overwrite."
        )
    if path:
        checkpoint.check_resumable(path)  # raises if it is missing or unreadable
    return path


def run_started_from(folder: Path, start: str) -> str | None:
    """Return the prefix of the only run in a folder whose flags name `start` as its beginning.

    start: a path as it was passed to --finetune, --init_from or --resume. Return None if there is
    no such run, or more than one.
    """
    found = []
    for prefix in run_prefixes(folder):
        path = RunFiles(folder, prefix).checkpoint
        if path.is_file() and start in [_flag_of(path, name) for name in START_FLAGS]:
            found.append(prefix)
    return found[0] if len(found) == 1 else None


def _flag_of(path: Path, name: str) -> str | None:
    """Return a flag of the run that saved a checkpoint, None if it has no such flag."""
    try:
        saved_args = checkpoint.load(path, check=False, lazily=True).get("args")
    except UserError:
        return None
    if not isinstance(saved_args, dict):
        return None
    return saved_args.get(name)


def newest_readable(path: Path) -> Path | None:
    """Return the newest readable checkpoint of a run, or None if the run has no checkpoint.

    path: of the run's newest checkpoint. Corrupt checkpoints newer than the one
    returned are renamed. Raises UserError if there are checkpoints and all of them are corrupt.
    """
    earlier = [checkpoint.previous(path, index) for index in range(1, MAX_KEPT)]
    candidates = [candidate for candidate in (path, *earlier) if candidate.exists()]
    corrupt = []
    for candidate in candidates:
        try:
            checkpoint.check_resumable(candidate)
        except CorruptCheckpoint as error:
            corrupt.append((candidate, error))
            continue
        for bad_path, reason in corrupt:
            renamed = checkpoint.rename_aside(bad_path, ".damaged")
            print0(f"warning: {reason}; renamed to {renamed.name}, resuming from {candidate}")
        return candidate
    if corrupt:
        newest_error = corrupt[0][1]
        raise UserError(
            f"{newest_error}; no earlier checkpoint is readable either. "
            "Start a new run with another --save_prefix."
        )
    return None


def find_eval_checkpoint(files: RunFiles, resume: str) -> Path:
    """Return the checkpoint that --eval reads.

    resume: a path, or "auto" for the run's best checkpoint, else its newest. Raises UserError if
    there is none.
    """
    if not resume:
        raise UserError("--eval reads the checkpoint of --resume, which is ''. Pass one.")
    candidates = [Path(resume)]
    if resume == "auto":
        candidates = [files.best, files.checkpoint]
    for path in candidates:
        if path.exists() or is_hub_path(path):
            return path
    tried = " or ".join(str(path) for path in candidates)
    raise UserError(f"--eval found no checkpoint at {tried}. Pass one to --resume.")


def run_prefixes(folder: Path) -> list[str]:
    """Return the prefixes of the runs whose checkpoints are in a folder, sorted."""
    stems = [path.stem for path in folder.glob("*.pth")]
    return sorted({re.sub(r"(_best|_previous\d+)$", "", stem) for stem in stems})


def only_run(folder: Path, default: str) -> str:
    """Return the prefix of the run in a folder: `default` if it is one, else the only one.

    Raises UserError if there are several others.
    """
    prefixes = run_prefixes(folder)
    if default in prefixes or not prefixes:
        return default
    if len(prefixes) > 1:
        raise UserError(
            f"{folder} has several runs ({', '.join(prefixes[:5])}). Choose one by --save_prefix."
        )
    return prefixes[0]


def recorded_classes(path: Path) -> list[str]:
    """Return the class names in a finetuning run's checkpoint.

    Raises UserError if the file is not a finetuning checkpoint.
    """
    state = checkpoint.load(path, check=False, lazily=True)
    checkpoint.require_parts(path, state, ("model", "config"))
    classes = state["config"].get("classes")
    if not isinstance(classes, list):
        raise UserError(
            f"{path} is not a finetuning checkpoint (no class names). "
            "Pass one to --resume, or pass pretrained weights to --finetune."
        )
    return classes


def check_same_run(path: Path, state: dict, current: dict, force: bool) -> None:
    """Print the flags that changed since a checkpoint; refuse changes of model, data or batch.

    state: the checkpoint read from `path`. current: "config", "args", "data" (the fingerprint of
    the training set) and "global_batch" of this run. force: print instead of refusing
    (--force_resume). Raises UserError for a refused change and for a file that is not a run's
    checkpoint.
    """
    checkpoint.require_parts(path, state, checkpoint.RUN_PARTS)
    if not force:
        checkpoint.check_config(path, state, current["config"])
    _print_changed_flags(state["args"], current["args"])
    saved_data = state.get("data", current["data"])
    saved_batch = state.get("global_batch", current["global_batch"])
    changes = []
    fixes = []
    if saved_batch != current["global_batch"]:
        changes.append(f"global batch {saved_batch} -> {current['global_batch']}")
        fixes.append("--batch_size_per_gpu x --accum_iter x processes")
    if saved_data["sha256"] != current["data"]["sha256"]:
        samples = f"{saved_data['samples']} -> {current['data']['samples']} samples"
        changes.append(f"training set of {samples}, or the same samples in another order")
        if "train_data_path" in current["args"]:  # images are listed at every start
            fixes.append("--train_data_path, --shots, --frac_retained and --seed")
        else:
            fixes.append("the manifest in --datafile_dir")
    weighting = saved_data.get("weighting", "none")
    current_weighting = current["data"].get("weighting", "none")
    if weighting != current_weighting:
        changes.append(f"weighting of the samples: {weighting} -> {current_weighting}")
        fixes.append("the weighting")
    if changes and not force:
        raise UserError(
            f"{path} was saved by another run ({', '.join(changes)}). "
            f"Restore {' and '.join(fixes)}, or pass --force_resume."
        )
    for change in changes:
        print0(f"changed since the checkpoint, by --force_resume: {change}")


def _print_changed_flags(saved: dict, current: dict) -> None:
    """Print the flags whose value differs from the checkpoint's; new flags are not changes."""
    for name, old in saved.items():
        if name not in current:
            continue
        new = current[name]
        if isinstance(old, str) and isinstance(new, list):  # it took one value in earlier versions
            old = [old] if old else []
        if isinstance(old, tuple):
            old = list(old)
        if isinstance(new, tuple):
            new = list(new)
        if old != new:
            print0(f"flag changed since the checkpoint: --{name} {old} -> {new}")
