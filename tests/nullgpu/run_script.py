"""Run scripts of this repository on the null GPU, and count what each update does.

    python tests/nullgpu/run_script.py CASES.json RESULTS.json   # on the null GPU: see build.py

CASES is a list of {"name", "module", "flags", "patches"}: a module of the repository, its command
line, and names of PATCHES. RESULTS has for each name:

error         the last line of the error that ended it, or None
updates       what each update did: see `Recorder`
epoch_ends    what was done between the last update of each epoch and its record
compiled      number of graphs, each recompilation included
sync_lines    where the host has waited for the device, in updates that log nothing

Values are garbage on the null GPU, so the checks that would refuse them are replaced here.
"""

import contextlib
import json
import sys
import warnings
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent.parent)]

import counts
import torch
from torch._dynamo.utils import clear_compilation_metrics, get_compilation_metrics

import engine_finetune
import engine_pretrain
import pretrain
from data.loader import on_device
from models_mae import MaskedAutoencoderViT
from util import checkpoint, checkpointer, dist, preemption, train_loop

STEADY = 3  # the first update that may not wait, allocate or compile
CAPTURED_CALL = 8  # of a micro-step; the calls before warm it up
KINDS: dict[str, Callable[[str], bool]] = {  # name: whether a row of counts is of this kind
    "launches": lambda name: name.startswith(("kernel ", "gemm ")),
    "fills": lambda name: name.startswith("kernel ") and "FillFunctor" in name,
    "syncs": lambda name: name.startswith("sync "),
    "pageable": lambda name: "pageable" in name,
    "allocations": lambda name: name.startswith(("cudaMalloc", "cudaFree", "cudaHost")),
    "captures": lambda name: name == "graph capture",
    "replays": lambda name: name == "graph launch",
    "not captured": lambda name: name == "launch outside the capture",
}


class EnoughUpdates(Exception):
    """Ends a run that need not save."""


def tally() -> dict[str, int]:
    """Return the counts since the last reset by kind, and reset them."""
    rows = counts.rows()
    counts.reset()
    totals = {}
    for kind, includes in KINDS.items():
        totals[kind] = sum(row.calls for row in rows if includes(row.name))
    return totals


class Recorder:
    """Counts for each update of a run.

    An update is recorded with its number (from 1), `tally`, the graphs compiled so far, the peak
    memory since the update before in GiB, and whether the end of an epoch, with a save, came
    between them.
    """

    def __init__(self):
        """Record nothing yet."""
        self.updates: list[dict] = []
        self.epoch_ends: list[dict] = []
        self.sync_lines: list[str] = []
        self.pending_lines: list[str] = []  # of the update in progress
        self.after_save = False

    def add_update(self, state, log_every: int) -> None:
        """Record the update that the loop has just finished."""
        steps = state.schedule.steps_per_epoch
        reduces = state.step % log_every == 0 or state.step % steps == 0 or state.is_last_step()
        record = {"step": state.step, "reduces": reduces, "compiled": compiled_graphs()}
        record["after_save"] = self.after_save
        self.after_save = False
        record["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.updates.append(record | tally())
        if state.step >= STEADY and not reduces:
            self.sync_lines += self.pending_lines
        self.start_update()

    def start_update(self) -> None:
        """Forget what was counted since the last update."""
        self.pending_lines = []
        torch.cuda.reset_peak_memory_stats()
        counts.reset()

    def note_warning(self, message, _category, filename, line, *_more) -> None:
        """Note the line of a warning of torch.cuda.set_sync_debug_mode."""
        if "called a synchronizing" in str(message):
            self.pending_lines.append(f"{Path(filename).name}:{line}")

    def result(self, error: str | None) -> dict:
        """Return what was recorded."""
        return {
            "error": error,
            "updates": self.updates,
            "epoch_ends": self.epoch_ends,
            "sync_lines": self.sync_lines,
            "compiled": compiled_graphs(),
        }


def compiled_graphs() -> int:
    """Return the number of graphs that Dynamo has compiled in this case."""
    # backward passes have entries of their own, if they are not cached
    return len({entry.compile_id for entry in get_compilation_metrics()})


def record_updates(recorder: Recorder, patches: contextlib.ExitStack) -> None:
    """Make the training loop call the recorder."""
    finish_update = train_loop.finish_update
    end_epoch = checkpointer.Checkpointer.end_epoch

    def finish_and_record(checkpointer, clips: int, log_every: int) -> None:
        finish_update(checkpointer, clips, log_every)
        recorder.add_update(checkpointer.state, log_every)

    def record_and_end_epoch(self, *arguments) -> None:
        recorder.epoch_ends.append(tally())
        end_epoch(self, *arguments)
        recorder.after_save = True
        recorder.start_update()

    patches.enter_context(patch.object(train_loop, "finish_update", finish_and_record))
    patches.enter_context(
        patch.object(checkpointer.Checkpointer, "end_epoch", record_and_end_epoch)
    )


def accept_garbage(patches: contextlib.ExitStack) -> None:
    """Replace the checks of values: weights, class numbers, and what checkpoints hold."""
    evaluate = engine_finetune.evaluate

    def evaluate_in_range(*arguments):
        scores = evaluate(*arguments)
        return scores._replace(labels=scores.labels.clamp(0, 1), top=scores.top.clamp(0, 1))

    patches.enter_context(patch.object(checkpointer, "all_finite", lambda _weights: True))
    patches.enter_context(patch.object(engine_finetune, "evaluate", evaluate_in_range))
    patches.enter_context(patch.object(checkpoint, "check_contents", lambda _state: None))


# ---- Patches that a case may ask for ----


def before(
    owner: object, name: str, action: Callable[[], object]
) -> contextlib.AbstractContextManager:
    """Return a patch that calls `action()` before each call of a function."""
    function = getattr(owner, name)

    def act_and_call(*arguments, **keywords):
        action()
        return function(*arguments, **keywords)

    return patch.object(owner, name, act_and_call)


def read_a_value(patches: contextlib.ExitStack) -> None:
    """Read a value of the device in each micro-step."""
    value = torch.zeros(1, device="cuda")
    patches.enter_context(before(engine_pretrain, "backward", value.item))


def build_on_the_cpu(patches: contextlib.ExitStack) -> None:
    """Build a tensor on the CPU and move it, in each forward pass."""
    patches.enter_context(before(MaskedAutoencoderViT, "forward", lambda: torch.ones(8).to("cuda")))


def stop_after(updates: int, patches: contextlib.ExitStack) -> None:
    """End the run after some updates, before it saves anything."""
    finish_update = train_loop.finish_update

    def finish_and_stop(checkpointer, *arguments) -> None:
        finish_update(checkpointer, *arguments)
        if checkpointer.state.step == updates:
            raise EnoughUpdates

    patches.enter_context(patch.object(train_loop, "finish_update", finish_and_stop))


def skip_reading(patches: contextlib.ExitStack) -> None:
    """Pretrain on an empty batch without reading files, with a model built on the GPU.

    The weights are not initialized: trunc_normal_ of torch 2.11 compiles a kernel at run time.
    """
    build_data = pretrain.build_data

    def build_on_gpu(**arguments):
        with torch.device("cuda"):
            return MaskedAutoencoderViT(**arguments)

    def build_empty_data(args, env, model, start):
        data = build_data(args, env, model, start)
        batch = empty_batch(args, model.num_tokens)
        batches = [batch] * (data.updates_per_epoch * args.accum_iter)
        return data._replace(batches=lambda _epoch, _updates_done: on_device(batches, env.device))

    patches.enter_context(patch.object(MaskedAutoencoderViT, "init_weights"))
    patches.enter_context(patch.object(pretrain, "MaskedAutoencoderViT", build_on_gpu))
    patches.enter_context(patch.object(pretrain, "build_data", build_empty_data))


def empty_batch(args, tokens: int) -> dict:
    """Return a batch of pretraining in pinned memory that nothing has written."""
    videos = args.batch_size_per_gpu
    clips = (videos, args.repeat_aug, 3, args.num_frames, args.img_size, args.img_size)
    return {
        "clips": torch.empty(clips, dtype=torch.uint8, pin_memory=True),
        "noise": torch.empty(videos, args.repeat_aug, tokens, pin_memory=True),
        "replaced": torch.empty(videos, dtype=torch.int64, pin_memory=True),
        "paths": [""] * videos,
        "bad": [],
        "damaged": [],
    }


def capture(engine: ModuleType, patches: contextlib.ExitStack) -> None:
    """Capture one micro-step (forward and backward) in a CUDA graph, and replay it."""
    micro_step = engine.micro_step
    calls = 0

    def call_or_capture(*arguments):
        nonlocal calls
        calls += 1
        if calls != CAPTURED_CALL:
            return micro_step(*arguments)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = micro_step(*arguments)
        graph.replay()
        return result

    patches.enter_context(patch.object(engine, "micro_step", call_or_capture))


def pretend_eight_ranks(patches: contextlib.ExitStack) -> None:
    """Be rank 0 of 8 processes whose collectives do nothing (torch's fake process group)."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    wrap_ddp = dist.wrap_ddp

    def join_fake_group(_device) -> None:
        torch.distributed.init_process_group("fake", rank=0, world_size=8, store=FakeStore())

    def wrap_without_all_reduce(*arguments, **keywords):
        wrapped = wrap_ddp(*arguments, **keywords)
        wrapped.register_comm_hook(None, return_bucket)
        return wrapped

    class OneRank(preemption.AnyRank):
        def __init__(self):
            self.group = None  # the fake store cannot make a gloo group

    launcher = {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "8"}
    patches.enter_context(patch.dict("os.environ", launcher))
    patches.enter_context(patch.object(dist, "_init_process_group", join_fake_group))
    patches.enter_context(patch.object(dist, "wrap_ddp", wrap_without_all_reduce))
    patches.enter_context(patch.object(preemption, "AnyRank", OneRank))
    patches.callback(dist.cleanup)


def return_bucket(_state, bucket):
    """Return a bucket of gradients as it is: DDP's hook, since the fake group returns nothing.

    DDP refuses an annotation of the result other than torch.futures.Future[torch.Tensor].
    """
    future: torch.futures.Future = torch.futures.Future(devices=[bucket.buffer().device])
    future.set_result(bucket.buffer())
    return future


PATCHES: dict[str, Callable[[contextlib.ExitStack], None]] = {
    "item": read_a_value,
    "cpu tensor": build_on_the_cpu,
    "six updates": partial(stop_after, 6),
    "twenty updates": partial(stop_after, 20),
    "empty batches": skip_reading,
    "eight ranks": pretend_eight_ranks,
    "capture pretraining": partial(capture, engine_pretrain),
    "capture finetuning": partial(capture, engine_finetune),
}


def run_case(case: dict) -> dict:
    """Run a case, and return its result."""
    recorder = Recorder()
    error = None
    if compiled_graphs() > 0:
        torch._dynamo.reset()
        clear_compilation_metrics()
    with contextlib.ExitStack() as patches:
        record_updates(recorder, patches)
        accept_garbage(patches)
        for name in case["patches"]:
            PATCHES[name](patches)
        patches.enter_context(patch.object(warnings, "showwarning", recorder.note_warning))
        recorder.start_update()
        try:
            import_module(case["module"]).main(case["flags"])
        except EnoughUpdates:
            pass
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}"
            sys.excepthook(type(failure), failure, failure.__traceback__)
    return recorder.result(error)


def main(cases_file: str, results_file: str) -> None:
    """Run all cases and write their results."""
    counts.start()
    warnings.simplefilter("always")
    torch.cuda.set_sync_debug_mode("warn")
    results = {}
    for case in json.loads(Path(cases_file).read_text()):
        results[case["name"]] = run_case(case)
        Path(results_file).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
