"""Damage checkpoints at random and read them with every program; none may fail or be fooled.

    nice python tests/corrupt_checkpoints.py [--mutants 1000] [--seed 0]

writes the counts into benchmarks/results/corrupt_checkpoints.json, after every mutant. Most mutants
have checksums that were computed after the damage, as a broken program would. Good outcomes of a
program are: the file is refused in one line; the run resumes from the file before it; nothing that
is used has changed; or the mutant is a valid file with other contents (another number of the right
kind, or without an entry that files of earlier versions lack), which no reader can tell from a good
one.
"""

import argparse
import faulthandler
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import sys
import tempfile
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np
import torch
from make_videos import write_folder
from runs import output_flags, pretrain_command, video_command
from tiny import same

import finetune
import pretrain
from tools import convert_checkpoint, inspect_checkpoint
from util.checkpoint import load
from util.dist import UserError, print0, run_script

RESULTS = ROOT / "benchmarks" / "results" / "corrupt_checkpoints.json"
CPU_SECONDS = 10  # that a program may take
SECONDS = 600  # likewise, on a machine that other programs keep busy
PRELOADED = ["corrupt_checkpoints", "torch._dynamo", "matplotlib.pyplot", "torch.utils.tensorboard"]
STEPS = "--batch_size_per_gpu 4 --epochs 2 --checkpoint_every_steps 1 --keep 5".split()
FLAGS = {
    "pretraining": [*STEPS, "--ema", "0.9"],
    "finetuning": [*STEPS, "--ema", "0.9"],
    "linear probe": [*STEPS, "--probe", "linear"],
    "attentive probe": [*STEPS, "--probe", "attentive"],
}
# Files of earlier versions, and of runs without --ema, lack them.
OPTIONAL = {"tally", "global_batch", "steps_per_epoch", "data", "ema", "best_acc1", "unreadable"}
OF_RUNS = {"optimizer", "scaler", "epoch", "step", "samples_consumed", "args"}  # only resume reads
GOOD = ("refused", "fell back", "unchanged", "valid with other contents")
HOSTILE = (
    None,
    True,
    -1,
    0,
    10**30,
    float("nan"),
    float("inf"),
    -0.5,
    "",
    "text\n\x1b[31m",
    b"bytes",
    [],
    {},
    (1, 2),
    [["x"]],
    {1: {2: 3}},
    torch.zeros(2),
    torch.zeros(0),
    torch.ones(3, dtype=torch.int64),
)


class Source(NamedTuple):
    """A run whose checkpoints are damaged."""

    kind: str  # of FLAGS
    folder: Path  # its manifests
    newest: bytes  # the file after update 3
    previous: bytes  # the file after update 2
    videos: str


class Mutant(NamedTuple):
    """A damaged checkpoint."""

    how: str
    source: Source
    content: bytes


# Damage


def flip_bits(source: Source, draw: np.random.Generator) -> bytes:
    """Flip up to eight bits of the file."""
    content = bytearray(source.newest)
    for offset in draw.integers(0, len(content), draw.integers(1, 9)):
        content[offset] ^= 1 << draw.integers(8)
    return bytes(content)


def truncate(source: Source, draw: np.random.Generator) -> bytes:
    """Remove the end of the file, or a piece of it."""
    begin, end = sorted(draw.integers(0, len(source.newest), 2))
    if draw.random() < 0.5:
        end = len(source.newest)
    return source.newest[:begin] + source.newest[end:]


def rewritten(content: bytes, change: Callable[[dict[str, bytes]], None]) -> bytes:
    """Return a zip archive with changed records and right checksums."""
    with tempfile.TemporaryFile() as old, tempfile.TemporaryFile() as new:
        old.write(content)
        with zipfile.ZipFile(old) as archive:
            records = {name: archive.read(name) for name in archive.namelist()}
        change(records)
        with zipfile.ZipFile(new, "w") as archive:
            for name, record in records.items():
                archive.writestr(name, record)
        new.seek(0)
        return new.read()


def swap_records(source: Source, draw: np.random.Generator) -> bytes:
    """Exchange two records of different lengths, or drop one."""

    def change(records: dict[str, bytes]) -> None:
        names = [str(name) for name in draw.permutation(list(records))]
        one = names[0]
        other = next(name for name in names if len(records[name]) != len(records[one]))
        records[one], records[other] = records[other], records[one]
        if draw.random() < 0.3:
            del records[one]

    return rewritten(source.newest, change)


def change_pickle(source: Source, draw: np.random.Generator) -> bytes:
    """Change bytes of the pickle."""

    def change(records: dict[str, bytes]) -> None:
        name = next(name for name in records if name.endswith("data.pkl"))
        content = bytearray(records[name])
        for offset in draw.integers(0, len(content), draw.integers(1, 4)):
            content[offset] = draw.integers(256)
        records[name] = bytes(content)

    return rewritten(source.newest, change)


def saved(source: Source, change: Callable[[dict], None]) -> bytes:
    """Return the file with changed contents, saved by torch."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(source.newest)
        file.flush()
        state = torch.load(file.name, weights_only=True)
        change(state)
        torch.save(state, file.name)
        return Path(file.name).read_bytes()


def any_place(state: dict, draw: np.random.Generator) -> tuple[dict | list, object]:
    """Return a random container in a checkpoint, and the key of one of its entries."""
    container: dict | list = state
    while True:
        keys = list(container) if isinstance(container, dict) else list(range(len(container)))
        key = keys[draw.integers(len(keys))]
        inner = container[key]
        if not isinstance(inner, (dict, list)) or not inner or draw.random() < 0.2:
            return container, key
        container = inner


def change_value(source: Source, draw: np.random.Generator) -> bytes:
    """Give an entry a hostile value."""

    def change(state: dict) -> None:
        container, key = any_place(state, draw)
        container[key] = HOSTILE[draw.integers(len(HOSTILE))]

    return saved(source, change)


def drop_entry(source: Source, draw: np.random.Generator) -> bytes:
    """Remove an entry."""

    def change(state: dict) -> None:
        container, key = any_place(state, draw)
        del container[key]

    return saved(source, change)


def nest(source: Source, draw: np.random.Generator) -> bytes:
    """Let an entry hold itself, or a deep or wide nest of lists."""

    def change(state: dict) -> None:
        container, key = any_place(state, draw)
        nested: list = [1] * 10
        for _ in range(100):
            nested = [nested] * int(draw.integers(1, 11))
        container[key] = (container, nested)[draw.integers(2)]

    return saved(source, change)


def reshape(source: Source, draw: np.random.Generator) -> bytes:
    """Change the shape, kind or memory of a tensor of the optimizer, the model or the EMA."""
    changes: tuple[Callable, ...] = (
        lambda tensor: tensor.flatten()[:1].clone().reshape([1] * tensor.ndim),
        lambda tensor: tensor[None],
        lambda tensor: tensor.flatten(),
        lambda tensor: tensor.long(),
        lambda tensor: tensor.to(torch.complex64),
        lambda tensor: tensor.to_sparse() if tensor.ndim else tensor.bool(),
        lambda tensor: torch.zeros(1).expand(2**40),
        lambda tensor: tensor.new_ones(()).expand(tensor.shape or 2),
    )

    def change(state: dict) -> None:
        parts = [state["model"], state.get("ema", {}), *state["optimizer"]["state"].values()]
        parts += [*state["optimizer"]["state"].values()]
        part = next(parts[i] for i in draw.permutation(len(parts)) if parts[i])
        names = list(part)
        name = names[draw.integers(len(names))]
        part[name] = changes[draw.integers(len(changes))](part[name])

    return saved(source, change)


DAMAGE = {
    "bits flipped, checksums stale": flip_bits,
    "truncated": truncate,
    "records exchanged or dropped": swap_records,
    "bytes of the pickle changed": change_pickle,
    "an entry of another kind or range": change_value,
    "an entry dropped": drop_entry,
    "nested without end": nest,
    "a tensor of another shape or kind": reshape,
}


# Programs


def command_of(source: Source, out: Path) -> list[str]:
    """Return the command line of a source's run, in another folder."""
    if source.kind == "pretraining":
        return pretrain_command(source.videos, out, *FLAGS[source.kind])
    return finetune_command(source.kind, source.videos, out)


def finetune_command(kind: str, videos: str, out: Path) -> list[str]:
    """Return the command line of finetuning or of a probe, which has no --lr."""
    command = video_command(videos, out, *FLAGS[kind])
    if kind.endswith("probe"):
        place = command.index("--lr")
        del command[place : place + 2]
    return command


def resume(source: Source, mutant: Path) -> object:
    """Resume the run; return what its last checkpoint holds."""
    script = pretrain if source.kind == "pretraining" else finetune
    script.main(command_of(source, mutant.parent))
    return without_flags(load(mutant))


def evaluate(source: Source, mutant: Path) -> object:
    """Evaluate the file, or start pretraining from it; return the scores or the weights."""
    out = mutant.parent / "other"
    if source.kind == "pretraining":
        flags = [*"--batch_size_per_gpu 4 --max_steps 1 --init_from".split(), str(mutant)]
        pretrain.main(pretrain_command(source.videos, out, *flags))
        return load(out / "run.pth")["model"]
    flags = "--device cpu --num_workers 0 --decoder pyav --save_prefix run --eval".split()
    data = ["--val_dir", source.videos, "--short_side", "48", "--resume", str(mutant)]
    finetune.main([*flags, *data, *output_flags(out)])
    return {path.name: path.read_text() for path in out.glob("*.json") if "args" not in path.name}


def inspect(source: Source, mutant: Path) -> object:
    """Print the file's contents, whatever they are."""
    inspect_checkpoint.main([str(mutant)])
    return None


def convert(source: Source, mutant: Path) -> object:
    """Convert the file; return what the new one holds."""
    target = mutant.with_name("converted.pth")
    convert_checkpoint.main([str(mutant), str(target), "--to", "native"])
    return without_flags(load(target))


PROGRAMS = {"inspect": inspect, "convert": convert, "evaluate": evaluate, "resume": resume}


def without_flags(state: dict) -> dict:
    """Return a checkpoint without the flags, which name folders, and recorded learning rates."""
    kept = {key: value for key, value in state.items() if key not in ("args", "optimizer")}
    return kept | {"moments": state.get("optimizer", {}).get("state", {})}


def write_run(folder: Path, mutant: Mutant) -> Path:
    """Write a run whose newest checkpoint is damaged; return its path."""
    shutil.copytree(mutant.source.folder, folder)
    (folder / "run.pth").write_bytes(mutant.content)
    (folder / "run_previous1.pth").write_bytes(mutant.source.previous)
    return folder / "run.pth"


# The campaign


def read_by(name: str, mutant: Mutant, folder: Path, reference: Path) -> str:
    """Return the outcome of a program for a mutant. Called in a process of its own.

    reference: the file of what the program makes of the good checkpoint.
    """
    path = write_run(folder, mutant)
    printed = folder / "printed.txt"
    with open(printed, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    result = None
    try:

        def main() -> None:
            nonlocal result
            result = PROGRAMS[name](mutant.source, path)

        run_script(main)
    except SystemExit as stopped:
        return outcome_of_exit(stopped.code, mutant, path, printed.read_text())
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"traceback: {type(error).__name__} in {Path(place.filename).name}: {error}"[:300]
    damaged = path.with_name("run.pth.damaged")
    if same(result, pickle.loads(reference.read_bytes())):
        return "fell back" if damaged.exists() else "unchanged"
    if is_valid_file(mutant, folder, OPTIONAL if name == "resume" else OPTIONAL | OF_RUNS):
        return "valid with other contents"
    return "silent: the result differs"


def outcome_of_exit(code: object, mutant: Mutant, path: Path, printed: str) -> str:
    """Return the outcome of a program that ended with a code."""
    errors = re.findall("^error: .*", printed, re.M)
    if code != 2 or len(errors) != 1 or "Traceback" in printed:
        return f"exit code {code}: {printed[-200:]}"
    kept = [file for file in path.parent.glob("run.pth*") if file.read_bytes() == mutant.content]
    previous = path.with_name("run_previous1.pth")
    if not kept or previous.read_bytes() != mutant.source.previous:
        return "lost: a checkpoint is gone"
    return "refused"


def is_valid_file(mutant: Mutant, folder: Path, optional: set[str]) -> bool:
    """Return whether a mutant differs from the good file in values of equal kinds only.

    optional: the entries that it may lack.
    """
    pair = []
    for content in (mutant.source.newest, mutant.content):
        (folder / "compared.pth").write_bytes(content)
        try:
            pair.append(load(folder / "compared.pth"))
        except UserError:
            return False
    good, other = pair
    lost = good.keys() - other.keys()
    return lost <= optional and all(alike(good[key], other.get(key)) for key in good.keys() - lost)


def alike(one: object, other: object) -> bool:
    """Return whether two values are of equal kinds, with all in them."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and one.is_floating_point() == other.is_floating_point()
    if isinstance(one, dict) and isinstance(other, dict):
        return all(alike(value, other.get(key, value)) for key, value in one.items())
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(alike(a, b) for a, b in zip(one, other, strict=True))
    numbers = (int, float)
    return type(one) is type(other) or (type(one) in numbers and type(other) in numbers)


def read_in_child(name: str, mutant: Mutant, folder: Path, reference: Path, answer: Path) -> None:
    """Write the outcome of a program into a file; be killed if it takes too long."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    stack = open(answer.with_suffix(".stack"), "w")  # noqa: SIM115 (until the process ends)
    faulthandler.register(signal.SIGALRM, file=stack, chain=True)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.alarm(SECONDS)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    torch.set_num_threads(1)
    outcome = read_by(name, mutant, folder, reference)
    answer.write_text(outcome)
    os._exit(0)


def read_safely(name: str, mutant: Mutant, folder: Path, reference: Path) -> str:
    """Return the outcome of a program in a process that may crash or hang."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    answer = folder.with_suffix(".txt")
    arguments = (name, mutant, folder, reference, answer)
    child = context.Process(target=read_in_child, args=arguments)
    child.start()
    child.join()
    shutil.rmtree(folder, ignore_errors=True)
    if child.exitcode == -signal.SIGALRM:
        stack = answer.with_suffix(".stack").read_text()
        return f"hang: over {SECONDS} s, {' '.join(stack.split())[:1000]}"
    if child.exitcode == -signal.SIGPROF:
        return f"hang: over {CPU_SECONDS} s of computing"
    if not answer.exists():
        return f"signal: exit code {child.exitcode}"
    return answer.read_text()


def make_sources(folder: Path) -> list[Source]:
    """Train the runs whose checkpoints are damaged: four updates each."""
    videos = str(write_folder(folder / "videos", 8))
    sources = []
    for kind in FLAGS:
        out = folder / kind.replace(" ", "_")
        if kind == "pretraining":
            pretrain.main(pretrain_command(videos, out, *FLAGS[kind]))
        else:
            start = ["--finetune", str(folder / "pretraining.pth")]
            finetune.main([*finetune_command(kind, videos, out), *start])
        if kind == "pretraining":
            shutil.copy(out / "run.pth", folder / "pretraining.pth")
        files = [out / name for name in ("run_previous2.pth", "run_previous3.pth")]
        newest, previous = (file.read_bytes() for file in files)
        for path in (*out.glob("*.pth"), *out.glob("*.jsonl"), *out.glob("run_log*")):
            path.unlink()
        sources.append(Source(kind, out, newest, previous, videos))
    return sources


def references_of(sources: list[Source], folder: Path) -> dict[tuple[str, str], Path]:
    """Return files of what each program makes of each source's good checkpoint."""
    references = {}
    for source in sources:
        for name, program in PROGRAMS.items():
            path = write_run(folder / "good", Mutant("none", source, source.newest))
            file = folder / f"{source.kind}_{name}.pickle"
            file.write_bytes(pickle.dumps(program(source, path)))
            shutil.rmtree(folder / "good")
            references[source.kind, name] = file
    return references


class Outcome(NamedTuple):
    """What a program made of a mutant."""

    index: int  # of the mutant
    how: str  # of DAMAGE
    program: str  # of PROGRAMS
    outcome: str  # of GOOD, or in words

    def __str__(self) -> str:
        """Return it in words."""
        return f"mutant {self.index}, {self.how}, {self.program}: {self.outcome}"


def campaign(mutants: int, seed: int, folder: Path) -> Iterator[Outcome]:
    """Yield the outcomes of all programs for all mutants."""
    sources = make_sources(folder)
    references = references_of(sources, folder)
    for index in range(mutants):
        draw = np.random.default_rng([seed, index])
        how = list(DAMAGE)[index % len(DAMAGE)]
        source = sources[draw.integers(len(sources))]
        mutant = Mutant(how, source, DAMAGE[how](source, draw))
        for name in PROGRAMS:
            reference = references[source.kind, name]
            outcome = read_safely(name, mutant, folder / f"{index}_{name}", reference)
            yield Outcome(index, f"{how} ({source.kind})", name, outcome)


def count(outcomes: list[Outcome]) -> dict[str, dict[str, int]]:
    """Return the number of outcomes of each kind for each kind of damage."""
    counts: dict[str, Counter] = {}
    for each in outcomes:
        damage = counts.setdefault(each.how.partition(" (")[0], Counter())
        damage[each.outcome.partition(":")[0]] += 1
    return {how: dict(sorted(damage.items())) for how, damage in counts.items()}


def main(argv: list[str] | None = None) -> None:
    """Run the campaign and write its counts, after every mutant."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutants", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        for each in campaign(args.mutants, args.seed, Path(folder)):
            outcomes.append(each)
            bad = [str(other) for other in outcomes if other.outcome not in GOOD]
            if each.outcome not in GOOD:
                print0(bad[-1])
            if each.program == list(PROGRAMS)[-1]:
                contents = {
                    "mutants": each.index + 1,
                    "seed": args.seed,
                    "torch": torch.__version__,
                    "programs": list(PROGRAMS),
                    "outcomes": count(outcomes),
                    "bad": bad,
                }
                RESULTS.write_text(json.dumps(contents, indent=1) + "\n")


if __name__ == "__main__":
    from corrupt_checkpoints import main as imported_main  # its children find the functions there

    imported_main()
