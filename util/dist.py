"""Where this process runs: device, rank, process group. Driven by torchrun's or SLURM's environment; one process without either.

`print0` is the only way this project prints. `UserError` is the only way it says that the input is at fault:
one line that names the thing, the value and the cure, then exit code 2.
"""

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from util import stop

OWN_PACKAGES = ("util", "data")
_terminal = {"progress": False}  # whether its last line is a progress line
PEAK_TFLOPS = {
    "H200": 989,
    "H100": 989,
    "A100": 312,
}  # dense bf16 or fp16, from the datasheets of the SXM boards


class UserError(Exception):
    """Bad input. The message is one line: what is wrong, with its value, and what to do about it.

    this_rank_only: other ranks do not raise it, so this one has to say it whichever rank it is.
    """

    def __init__(self, message: str, this_rank_only: bool = False):
        super().__init__(message)
        self.this_rank_only = this_rank_only


class Place(NamedTuple):
    """Where this process stands: its device, its rank among `world_size` processes, its rank on this machine."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


def _environment(name: str, default: int) -> int:
    """This environment variable as an integer."""
    return int(os.environ[name]) if os.environ.get(name, "").isdigit() else default


def _under_srun() -> bool:
    """Is this one of several tasks of `srun`, without torchrun? (A batch script's own shell is in a job but in no step.)"""
    in_step = "SLURM_STEP_ID" in os.environ or "SLURM_JOB_ID" not in os.environ
    return (
        "RANK" not in os.environ
        and "SLURM_PROCID" in os.environ
        and in_step
        and _environment("SLURM_NTASKS", 1) > 1
    )


def rank() -> int:
    """This process's rank, readable before and without a process group."""
    return _environment("SLURM_PROCID" if _under_srun() else "RANK", 0)


def world_size() -> int:
    """How many processes take part."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_world_size() -> int:
    """How many processes of this run share this machine."""
    if _under_srun():
        tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE") or os.environ.get(
            "SLURM_TASKS_PER_NODE", "1"
        )
        return int(
            tasks.partition("(")[0].partition(",")[0]
        )  # "4(x2),3": four on each of two nodes, three on a third
    return _environment("LOCAL_WORLD_SIZE", 1)


def usable_cores() -> int:
    """How many cores this process may use; macOS cannot say, and has them all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def print0(*values: object, sep: str = " ") -> None:
    """Print on rank 0 only, at once."""
    if rank() == 0:
        end_progress()
        print(*values, sep=sep, flush=True)


def print_here(*values: object) -> None:
    """Print on whichever rank this is: for what concerns only one of them."""
    end_progress()
    print(*values, file=sys.stderr, flush=True)


def show_progress(line: str) -> None:
    """Show how far the work is, on rank 0: a terminal's line replaces the one before, a file gets each."""
    if rank() != 0:
        return
    if sys.stdout.isatty():
        print(f"\r\033[K{line}", end="", flush=True)
        _terminal["progress"] = True
    else:
        print(line, flush=True)


def end_progress() -> None:
    """End a terminal's progress line, if there is one, so that what follows begins a line of its own."""
    if _terminal["progress"]:
        print(flush=True)
        _terminal["progress"] = False


def _first_host(nodelist: str) -> str:
    """First host of a SLURM node list: "gpu[07-09,12],x1" -> "gpu07", "login1" -> "login1"."""
    head, bracket, tail = nodelist.partition("[")
    if not bracket or "," in head:
        return head.split(",")[0]
    digits = ""
    for letter in tail:
        if not letter.isdigit():
            break
        digits += letter
    return head + digits


def _adopt_srun() -> None:
    """Give a bare `srun` task the variables that torchrun would have set. MASTER_ADDR/MASTER_PORT of the user win."""
    os.environ["LOCAL_WORLD_SIZE"] = str(local_world_size())
    os.environ["WORLD_SIZE"] = os.environ["SLURM_NTASKS"]
    os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
    os.environ.setdefault(
        "MASTER_ADDR", _first_host(os.environ.get("SLURM_STEP_NODELIST", "127.0.0.1"))
    )
    os.environ.setdefault("MASTER_PORT", str(20000 + _environment("SLURM_JOB_ID", 0) % 10000))
    os.environ["RANK"] = os.environ[
        "SLURM_PROCID"
    ]  # last: from here on this is no longer "under srun"


def setup(device: str | None, deterministic: bool = False) -> Place:
    """Join the process group that the launcher describes and pick this process's device.

    device: "cuda", "cpu", or None for cuda where there is a GPU. deterministic: only kernels that repeat bit by bit.
    Raises UserError for "cuda" without a GPU, or for more processes on a machine than it has GPUs.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cpu":
            print0("device: cpu (no CUDA device found; --device cpu says so without this line)")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"--device {device}: PyTorch {torch.__version__} sees no CUDA device here; use --device cpu, or check nvidia-smi"
        )
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(deterministic)
    stop.follow_launcher()
    srun = _under_srun()
    if srun:
        _adopt_srun()
    local_rank, world_size = _environment("LOCAL_RANK", 0), _environment("WORLD_SIZE", 1)
    place = torch.device(device)
    if place.type == "cuda":
        visible = torch.cuda.device_count()
        own_gpu_only = srun and visible == 1  # srun --gpus-per-task 1
        index = place.index if place.index is not None else 0 if own_gpu_only else local_rank
        if index >= visible:
            raise UserError(
                f"local rank {local_rank} has no GPU: {visible} visible; start at most {visible} processes on this machine",
                True,
            )
        place = torch.device("cuda", index)
        torch.cuda.set_device(place)
    if world_size > 1:
        dist.init_process_group(
            "nccl" if place.type == "cuda" else "gloo",
            device_id=place if place.type == "cuda" else None,
            timeout=timedelta(minutes=10),
        )
    return Place(place, rank(), world_size, local_rank, local_world_size())


def peak_flops(device: torch.device) -> float | None:
    """What this device could do per second by its datasheet, or None where that is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next(
        (peak * 1e12 for part, peak in PEAK_TFLOPS.items() if part in name and "PCIe" not in name),
        None,
    )


def wrap(model: torch.nn.Module, place: Place, static_graph: bool) -> torch.nn.Module:
    """DistributedDataParallel around the model, or the model itself for one process.

    static_graph is for runs without accumulation: DDP asserts on a first update that accumulates.
    """
    if place.world_size == 1:
        return model
    torch._dynamo.config.optimize_ddp = False  # it would cut the compiled blocks every 25 MB
    devices = [place.device] if place.device.type == "cuda" else None
    return torch.nn.parallel.DistributedDataParallel(
        model, devices, gradient_as_bucket_view=True, static_graph=static_graph
    )


def warm_up(model: torch.nn.Module, backward: Callable[[], object]) -> None:
    """Let DDP settle before the first update of a process: it arranges its buckets anew after its first passes (two with static_graph) and then sums
    in another order. So a run that was started again adds up, from its first update on, as one that was not. backward: any pass, whose gradients are
    thrown away."""
    if dist.is_initialized():
        for _ in range(2):
            backward()
            model.zero_grad(set_to_none=True)


def cleanup() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Sum of `values` over all ranks, on every rank; `values` itself is left alone."""
    total = values.clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total


def gather_objects(item: object) -> list:
    """One picklable object of each rank, in rank order, on every rank."""
    if not dist.is_initialized():
        return [item]
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, item)
    return gathered


def on_rank0(make):
    """Call `make()` on rank 0 and hand its result, or its UserError, to every rank."""
    if not dist.is_initialized():
        return make()
    outcome = [None, None]
    if rank() == 0:
        try:
            outcome[0] = make()
        except UserError as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


def run_script(main) -> None:
    """Run a script's `main()`: a UserError or a missing package becomes one line on stderr and exit code 2, Ctrl-C exit code 130."""
    try:
        main()
    except UserError as error:
        if rank() == 0 or error.this_rank_only:
            end_progress()
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in OWN_PACKAGES:
            raise
        print(
            f"error: the package {error.name} is not installed: pip install -r requirements.txt",
            file=sys.stderr,
            flush=True,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        end_progress()
        cleanup()
