"""Devices and processes: the process group, this process's rank and device, collectives, printing.

The launcher's environment (torchrun's or SLURM's variables) describes the processes; without
either there is one process. All printing goes through this module. `UserError` is raised for every
user error: one line on stderr, then exit code 2.
"""

import errno
import functools
import os
import re
import resource
import select
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import NamedTuple, NoReturn, TextIO, TypeVar

import torch
import torch.distributed as dist

from util import preemption
from util.failures import Failure, FailureWatch, call_with_timeout, end_process

Item = TypeVar("Item")  # any picklable object

PATH_ERRORS = (  # what the system reports for a path that a user has given
    errno.EACCES,
    errno.EDQUOT,
    errno.EEXIST,
    errno.EFBIG,
    errno.EIO,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
    errno.ESTALE,
)
NO_FILES_ERRORS = (errno.EMFILE, errno.ENFILE)
FULL_DISK_ERRORS = (errno.EDQUOT, errno.EFBIG, errno.ENOSPC)
DEVICE = "stmae/device"  # key of rank 0's kind of device in the store
INTERRUPTED = 128 + signal.SIGINT  # exit code after Ctrl-C
OWN_PACKAGES = ("util", "data", "tools")
GROUP_TIMEOUT = timedelta(minutes=10)
LATE_TIMEOUT = timedelta(seconds=10)  # to reach the others after an error before the group exists
MAX_DEFAULT_WORKERS = 16  # loader processes of a process
PEAK_TFLOPS = {  # dense bf16 or fp16, from the datasheets of the SXM boards
    "H200": 989,
    "H100": 989,
    "A100": 312,
}
_progress_line_open = False  # the terminal's last line is a progress line
_failure_watch: FailureWatch | None = None  # None in a run of one process


class UserError(Exception):
    """Bad input. The message is one line: what is wrong, with its value, and how to fix it.

    print_on_any_rank: only this rank raises the error, so it prints the message even if it is
    not rank 0.
    """

    def __init__(self, message: str, print_on_any_rank: bool = False):
        super().__init__(message)
        self.print_on_any_rank = print_on_any_rank


class DistEnv(NamedTuple):
    """This process's device, rank among `world_size` processes, and rank on this machine."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


# ---- The launcher's environment ----


def _int_from_env(name: str, default: int) -> int:
    """Return this environment variable as an integer, or the default where it is not one."""
    value = os.environ.get(name, "")
    if value.isdigit():
        return int(value)
    return default


def _is_srun_task() -> bool:
    """Return whether `srun` started this process as one of several tasks, without torchrun."""
    # The shell of a batch script is in a job, but in no step
    in_step = "SLURM_STEP_ID" in os.environ or "SLURM_JOB_ID" not in os.environ
    has_slurm_rank = "RANK" not in os.environ and "SLURM_PROCID" in os.environ
    return has_slurm_rank and in_step and _int_from_env("SLURM_NTASKS", 1) > 1


def rank() -> int:
    """Return this process's rank, also before the process group exists and without one."""
    if _is_srun_task():
        return _int_from_env("SLURM_PROCID", 0)
    return _int_from_env("RANK", 0)


def world_size() -> int:
    """Return the number of processes of this run."""
    if dist.is_initialized():
        return dist.get_world_size()
    return 1


def local_world_size() -> int:
    """Return the number of processes of this run on this machine."""
    if not _is_srun_task():
        return _int_from_env("LOCAL_WORLD_SIZE", 1)
    job_tasks = os.environ.get("SLURM_TASKS_PER_NODE", "1")
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE") or job_tasks
    # "4(x2),3" means 4 tasks on each of two nodes and 3 on another one
    return int(tasks.partition("(")[0].partition(",")[0])


def available_cpus() -> int:
    """Return the number of CPUs that this process may use; on macOS, which has no affinity, all."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_workers() -> int:
    """Return the number of loader processes of this process: its share of the CPUs."""
    return max(1, min(MAX_DEFAULT_WORKERS, available_cpus() // local_world_size()))


def _first_host(nodelist: str) -> str:
    """Return the first host of a SLURM node list: "gpu[07-09,12],x1" -> "gpu07"."""
    head, bracket, tail = nodelist.partition("[")
    if not bracket or "," in head:
        return head.split(",")[0]
    digits = ""
    for letter in tail:
        if not letter.isdigit():
            break
        digits += letter
    return head + digits


def _set_torchrun_variables() -> None:
    """Set torchrun's variables from srun's; MASTER_ADDR and MASTER_PORT of the user are kept."""
    first_host = _first_host(os.environ.get("SLURM_STEP_NODELIST", "127.0.0.1"))
    port = 20000 + _int_from_env("SLURM_JOB_ID", 0) % 10000
    os.environ["LOCAL_WORLD_SIZE"] = str(local_world_size())
    os.environ["WORLD_SIZE"] = os.environ["SLURM_NTASKS"]
    os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
    os.environ.setdefault("MASTER_ADDR", first_host)
    os.environ.setdefault("MASTER_PORT", str(port))
    os.environ["RANK"] = os.environ["SLURM_PROCID"]  # last: _is_srun_task is False from here on


# ---- Printing ----


def _print_line(stream: TextIO, *values: object, sep: str = " ") -> None:
    """Print a line at once, below a progress line that is open."""
    end_progress()
    text = sep.join(map(str, values))
    text = "\n".join(map(escaped, text.split("\n")))
    encoding = getattr(stream, "encoding", None) or "utf-8"  # a stream in memory has none
    text = text.encode(encoding, "backslashreplace").decode(encoding)
    _write(stream, f"{text}\n")


def _write(stream: TextIO, text: str) -> None:
    """Write to stdout or stderr at once. A full disk costs what is printed, not the run.

    Raises BrokenPipeError if stdout has no reader.
    """
    try:
        print(text, end="", file=stream, flush=True)
    except BrokenPipeError:
        if stream is sys.stdout:
            raise
    except OSError:
        return


def escaped(text: str) -> str:
    """Return a text in one line: tabs, line ends, other controls and surrogates as escapes."""
    controls = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")
    return controls.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def print0(*values: object, sep: str = " ") -> None:
    """Print on rank 0 only."""
    if rank() == 0:
        _print_line(sys.stdout, *values, sep=sep)


def print_rank(*values: object) -> None:
    """Print to stderr on the calling rank, for events that concern only this rank."""
    _print_line(sys.stderr, *values)


def show_progress(line: str) -> None:
    """Show progress on rank 0: overwrite the progress line of a terminal, add a line to a file."""
    global _progress_line_open
    if rank() != 0:
        return
    if not sys.stdout.isatty():
        _write(sys.stdout, f"{line}\n")
        return
    _write(sys.stdout, f"\r\033[K{line}")
    _progress_line_open = True


def end_progress() -> None:
    """End a terminal's progress line, if one is open, so that the next output starts a line."""
    global _progress_line_open
    if _progress_line_open:
        _write(sys.stdout, "\n")
        _progress_line_open = False


# ---- Setup ----


def setup(device: str | None, deterministic: bool = False) -> DistEnv:
    """Join the process group that the launcher describes and choose this process's device.

    device: "cuda", "cpu", or None for cuda if there is a GPU. deterministic: use only kernels with
    bit-identical results. Raises UserError for "cuda" without a GPU, and for more processes on a
    machine than it has GPUs.
    """
    chosen = _choose_device(device)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        # PyTorch would fill each new tensor with NaN, by a kernel each. That only makes reads of
        # uninitialized memory reproducible, and none of our code reads any.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(deterministic)
    preemption.start_watchdogs(_end_now)
    started_by_srun = _is_srun_task()
    if started_by_srun:
        _set_torchrun_variables()
    local_rank = _int_from_env("LOCAL_RANK", 0)
    processes = _int_from_env("WORLD_SIZE", 1)
    if chosen.type == "cuda":
        chosen = _select_gpu(chosen, local_rank, started_by_srun)
    if processes > 1:
        _init_process_group(chosen)
    return DistEnv(chosen, rank(), processes, local_rank, local_world_size())


def _choose_device(name: str | None) -> torch.device:
    """Return the device of this name, by default cuda if there is a GPU. Raises UserError."""
    has_gpu = torch.cuda.is_available()
    if name is None and has_gpu:
        return torch.device("cuda")
    if name is None:
        print0("device: cpu (no CUDA device found; pass --device cpu to hide this line)")
        return torch.device("cpu")
    device = torch.device(name)
    if device.type == "cuda" and not has_gpu:
        raise UserError(
            f"--device {name}: PyTorch {torch.__version__} finds no CUDA device. "
            f"Use --device cpu, or check nvidia-smi."
        )
    return device


def _select_gpu(device: torch.device, local_rank: int, started_by_srun: bool) -> torch.device:
    """Return this process's GPU, and make it current. Raises UserError if there are too few."""
    visible = torch.cuda.device_count()
    index = local_rank
    if started_by_srun and visible == 1:  # srun --gpus-per-task 1
        index = 0
    if device.index is not None:
        index = device.index
    if index >= visible:
        raise UserError(
            f"local rank {local_rank} has no GPU ({visible} visible). "
            f"Start at most {visible} processes on this machine.",
            print_on_any_rank=True,
        )
    gpu = torch.device("cuda", index)
    torch.cuda.set_device(gpu)
    return gpu


def _init_process_group(device: torch.device) -> None:
    """Join the process group: NCCL for GPUs, gloo for CPUs. Raises UserError."""
    try:
        store = _join_store(GROUP_TIMEOUT)
    except (ValueError, RuntimeError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(
            f"the {os.environ['WORLD_SIZE']} processes do not meet at {address} "
            f"({_first_line(error)}). Start all of them within {GROUP_TIMEOUT.seconds // 60} "
            "minutes, with the same MASTER_ADDR (host of rank 0) and MASTER_PORT (free there).",
            print_on_any_rank=True,
        ) from error
    _compare_devices(store, device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        store=store,
        rank=rank(),
        world_size=_int_from_env("WORLD_SIZE", 1),
        timeout=GROUP_TIMEOUT,
        device_id=device if backend == "nccl" else None,
    )


def _join_store(timeout: timedelta) -> dist.Store:
    """Meet the other processes at the launcher's address; from now on one's failure ends all.

    Raises UserError if torchrun has ended.
    """
    global _failure_watch
    launcher_has_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    if launcher_has_store:
        _require_launcher(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    server, own_rank, processes = next(dist.rendezvous("env://", timeout=timeout))
    store = dist.PrefixStore("default_pg", server)
    _failure_watch = FailureWatch(
        store,
        own_rank,
        processes,
        store_in_launcher=launcher_has_store,
        report=_report_other_failure,
    )
    return store


def _compare_devices(store: dist.Store, device: torch.device) -> None:
    """Raise UserError unless this process has the kind of device of rank 0: "cuda" or "cpu".

    They could not form a group: it would wait for its time-out.
    """
    if rank() == 0:
        store.set(DEVICE, device.type)
        return
    expected = store.get(DEVICE).decode()
    if device.type != expected:
        raise UserError(
            f"rank {rank()} on {socket.gethostname()} runs on {device.type}, rank 0 on {expected}: "
            "pass --device cpu to all, or check nvidia-smi there",
            print_on_any_rank=True,
        )


def _require_launcher(host: str, port: int) -> None:
    """Raise UserError if nobody listens where torchrun has its store.

    It was killed before this process watched it (util/preemption.py), which would wait for its
    store until the time-out.
    """
    try:
        socket.create_connection((host, port), timeout=10).close()
    except ConnectionRefusedError as error:
        raise UserError(
            f"torchrun, which has started this process, has ended (its port {port} on {host} is "
            "closed). Start it again.",
            print_on_any_rank=True,
        ) from error
    except OSError:
        return  # the name or the network: meeting the others fails with the reason


def cleanup() -> None:
    """Leave the process group, if there is one."""
    global _failure_watch
    if _failure_watch is not None:
        _failure_watch.leave()
        _failure_watch = None
    if dist.is_initialized():
        dist.destroy_process_group()


def peak_flops(device: torch.device) -> float | None:
    """Return the device's peak FLOP/s by its datasheet, or None if it is not in PEAK_TFLOPS."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if "PCIe" in name:  # slower than the SXM boards of the table
        return None
    for board, tflops in PEAK_TFLOPS.items():
        if board in name:
            return tflops * 1e12
    return None


# ---- DistributedDataParallel ----


def wrap_ddp(model: torch.nn.Module, env: DistEnv, static_graph: bool) -> torch.nn.Module:
    """Wrap the model in DistributedDataParallel; return the model itself for one process.

    static_graph: only for runs without gradient accumulation. With it, DDP fails an assertion
    if the first update accumulates.
    """
    if env.world_size == 1:
        return model
    torch._dynamo.config.optimize_ddp = False  # it would split the compiled blocks every 25 MB
    device_ids = None
    if env.device.type == "cuda":
        device_ids = [env.device]
    return torch.nn.parallel.DistributedDataParallel(
        model, device_ids, gradient_as_bucket_view=True, static_graph=static_graph
    )


def settle_ddp_buckets(model: torch.nn.Module, backward: Callable[[], object]) -> None:
    """Run two throw-away backward passes, before the first update of a process.

    DDP rebuilds its buckets after the first passes (two with static_graph), which changes the
    summation order; after this, resumed and uninterrupted runs add up alike. backward: runs any
    forward and backward pass.
    """
    if not dist.is_initialized():
        return
    for _ in range(2):
        backward()
        model.zero_grad(set_to_none=True)


# ---- Collectives (call on every rank) ----


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Return the sum of `values` over all ranks, on every rank; `values` is not changed."""
    total = values.clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total


def all_gather_object(item: Item) -> list[Item]:
    """Return the picklable objects of all ranks, in rank order, on every rank."""
    if not dist.is_initialized():
        return [item]
    gathered = [item] * dist.get_world_size()  # the next line replaces all of them
    dist.all_gather_object(gathered, item)
    return gathered


def on_rank0(function: Callable[[], Item]) -> Item:
    """Call `function()` on rank 0; return its result, or raise its UserError, on every rank.

    With several ranks an OSError about a path is a UserError too, so that none waits for rank 0.
    """
    if not dist.is_initialized():
        return function()
    outcome: list = [None, None]  # result, message of the error
    if rank() == 0:
        try:
            outcome[0] = function()
        except UserError as error:
            outcome[1] = str(error)
        except OSError as error:
            if not is_path_error(error):
                raise
            outcome[1] = path_problem(error)
    dist.broadcast_object_list(outcome, src=0)
    result, error_message = outcome
    if error_message is not None:
        raise UserError(error_message)
    return result


# ---- Running a script ----


def run_script(main: Callable[[], object]) -> None:
    """Run a script's `main()` and exit with a code.

    A UserError, a missing package, a path that cannot be used and the limit of open files become
    one line on stderr and exit code 2, Ctrl-C exit code 130. If the reader of stdout has ended, as
    `head` does, the script ends with the shell's code for that, 141, and without a message. Any
    failure ends all processes of the run; only the first one prints its message or traceback.
    """
    try:
        main()
    except (Exception, KeyboardInterrupt) as error:
        code, line = _exit_of(error)
        report = functools.partial(_print_failure, error, code, line)
        if not _is_alone():
            only_here = not isinstance(error, UserError) or error.print_on_any_rank
            _end_all_processes(line or _first_line(error), code, report, only_here)
        if code == 1:
            raise
        report()
        sys.exit(code)
    finally:
        end_progress()
        cleanup()
        _flush_or_discard(sys.stdout)


def _flush_or_discard(stream: TextIO) -> None:
    """Discard what cannot be written, for example to a full disk: the interpreter would fail."""
    try:
        stream.flush()
    except OSError:
        discard_output(stream)


def _is_alone() -> bool:
    """Return whether this is the only process of the run."""
    return _int_from_env("WORLD_SIZE", 1) == 1 and not _is_srun_task()


def _print_failure(error: BaseException, code: int, line: str) -> None:
    """Print why this process fails: a line, or the traceback of its error."""
    end_progress()
    if line:
        print_rank(f"error: {escaped(line)}{_location()}")
    elif code == 1:
        traceback.print_exception(error)
    elif code == INTERRUPTED and not _is_alone():
        print_rank(f"interrupted by Ctrl-C{_location()}")


def _exit_of(error: Exception | KeyboardInterrupt) -> tuple[int, str]:
    """Return the exit code for an error and its line, "" if there is none.

    Code 1 means an error of the program, to be shown with its traceback.
    """
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, ""
    if isinstance(error, UserError):
        return 2, str(error)
    if isinstance(error, BrokenPipeError) and _stdout_is_broken():
        return 128 + signal.SIGPIPE, ""
    if isinstance(error, ModuleNotFoundError):
        package = error.name or ""
        if package.partition(".")[0] not in OWN_PACKAGES:
            return (
                2,
                f"the package {package} is not installed. Run: pip install -r requirements.txt",
            )
    if isinstance(error, OSError) and error.errno in NO_FILES_ERRORS:
        return 2, open_files_problem(error)
    if isinstance(error, OSError) and is_path_error(error):
        return 2, path_problem(error)
    return 1, ""


def _end_all_processes(
    reason: str, code: int, report: Callable[[], object], at_once: bool
) -> NoReturn:
    """Announce that this process fails, which ends the others, and end it.

    report: prints the reason; not called if another process has failed before. at_once: only this
    process fails. Otherwise rank 0 may fail alike, and goes first. Safe in any thread.
    """
    first = Failure(rank(), "", code, reason, 0.0)
    if _failure_watch is not None or _join_late():
        assert _failure_watch is not None  # since the processes have met
        first = _failure_watch.announce(reason, code, at_once)
    if first.rank != rank():
        report = functools.partial(_report_other_failure, first)
    call_with_timeout(report)  # nobody may read what is printed
    if _failure_watch is not None:
        _failure_watch.leave()
    end_process(first.code)


def _join_late() -> bool:
    """Meet the other processes after an error that came before. Return whether that worked."""
    if _is_alone():
        return False
    try:
        if _is_srun_task():
            _set_torchrun_variables()
        _join_store(LATE_TIMEOUT)
    except (UserError, KeyError, ValueError, RuntimeError):  # no address, or nobody there
        return False
    return True


def _end_now(reason: str, code: int) -> NoReturn:
    """End all processes with a line, from another thread than the main one."""
    line = f"error: {reason}{_location()}"
    _end_all_processes(reason, code, functools.partial(print_rank, line), at_once=True)


def _report_other_failure(failure: Failure) -> None:
    """Print on one process of each machine that another process's failure ends it."""
    if _int_from_env("LOCAL_RANK", 0) == 0:
        print_rank(f"ended, because rank {failure.rank} on {failure.host} has failed")


def _location() -> str:
    """Return where this process runs, for the end of a message; "" on rank 0."""
    if rank() == 0:
        return ""
    return f" (rank {rank()} on {socket.gethostname()})"


def _first_line(error: BaseException) -> str:
    """Return an error's type and the first line of its message."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def is_path_error(error: OSError) -> bool:
    """Return whether an error concerns a path that a user has given."""
    return error.errno in PATH_ERRORS and error.filename is not None


def path_problem(error: OSError) -> str:
    """Return what is wrong with the path of an error, in one line, and the cure."""
    cure = "Check the path and its permissions, or give another one."
    if error.errno in FULL_DISK_ERRORS:
        cure = "Make room, or give another path."
    return f"{os.fsdecode(error.filename)} cannot be used ({error.strerror}). {cure}"


def open_files_problem(error: OSError) -> str:
    """Return why no file can be opened, in one line, and the cure. error: of NO_FILES_ERRORS."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (
        f"no more files can be opened ({error.strerror}; ulimit -n is {limit}): raise the limit or "
        "lower --num_workers"
    )


def _stdout_is_broken() -> bool:
    """Return whether stdout has no reader. If so, what is printed from here on is discarded."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    events = [event for _, event in poll.poll(0)]
    if not any(event & (select.POLLERR | select.POLLHUP) for event in events):
        return False
    discard_output(sys.stdout)
    return True


def discard_output(stream: TextIO) -> None:
    """Discard what is printed to a stream from here on: the interpreter flushes it at its end."""
    discarded = os.open(os.devnull, os.O_WRONLY)
    os.dup2(discarded, stream.fileno())
