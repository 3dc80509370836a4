"""Loader workers that are killed or suspended (F05), or lack files (F07) or memory (F18)."""

import errno
import itertools
import multiprocessing
import os
import pickle
import resource
import select
import signal
import subprocess
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from clip_dataset import clip_dataset
from launch import Job, clean_environment, faulty_arguments, script_command
from make_videos import write_folder
from runs import assert_same_run, log_records, pretrain_command
from worker_faults import (
    CHECK_INTERVAL,
    GUARD,
    ONE_PROCESS,
    READ_TIMEOUT,
    assert_only_these_files_differ,
    bad_files,
    end_children,
    indices_of,
    inject_faults,
    is_first_time,
    make_loader,
    time_limit,
)

import pretrain
from data import loader, watchdog, worker_limits
from data.clips import ClipSampling
from data.datasets import ImageDataset, ViewDataset
from data.loader import WorkerSettings, collate, eval_loader
from data.manifest import find_videos
from data.transforms import image_transform, view_transform
from data.watchdog import child_state
from data.worker_batches import PackedBatch
from data.worker_limits import LoaderNeeds, check_limits
from util.dist import UserError

PAUSE = READ_TIMEOUT + 2  # seconds


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a folder of eight videos."""
    return Path(write_folder(tmp_path_factory.mktemp("videos"), 8))


@pytest.fixture(scope="module")
def videos(folder) -> list[str]:
    """Return the paths of eight videos."""
    return find_videos([str(folder)], "--data_dirs")


@pytest.fixture(scope="module")
def undisturbed(videos, tmp_path_factory) -> list[dict]:
    """Return the batches of `make_loader` without faults."""
    return list(make_loader(clip_dataset(videos), tmp_path_factory.mktemp("none") / "none"))


@pytest.fixture
def faulty(monkeypatch, tmp_path):
    """Return a dict {path: fault}, see `inject_faults`."""
    return inject_faults(monkeypatch, tmp_path)


def assert_same_batches(expected, batches) -> None:
    """Assert that batches are equal and have no bad file."""
    assert bad_files(batches) == {}
    for one, other in zip(expected, batches, strict=True):
        for key in ("clips", "noise", "index"):
            assert torch.equal(one[key], other[key])


def wait_until(condition, seconds: float = GUARD) -> None:
    """Wait until a condition is true; fail after some seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ---- Killed and suspended workers ----


def test_f05_a_worker_killed_once_reads_its_file_again(
    undisturbed, videos, tmp_path, faulty, capfd
):
    killed = videos[int(undisturbed[1]["index"][0])]
    faulty[killed] = "KILL once"
    with time_limit(CHECK_INTERVAL + GUARD):
        batches = list(make_loader(clip_dataset(videos), tmp_path / "quarantine.csv"))
    assert_same_batches(undisturbed, batches)
    assert not (tmp_path / "quarantine.csv").exists()
    note = f"note: a loader worker died (SIGKILL) while it read {killed}: the file is read again\n"
    assert capfd.readouterr().err == note


def resume_suspended(stop: threading.Event) -> None:
    """Resume each suspended child process after a pause, until asked to stop."""
    while not stop.wait(0.05):
        for worker in multiprocessing.active_children():
            if child_state(worker.pid) == "suspended":
                time.sleep(PAUSE)
                os.kill(worker.pid, signal.SIGCONT)


def test_f05_a_suspended_worker_loses_no_file(undisturbed, videos, tmp_path, faulty, capfd):
    for batch in undisturbed[:2]:  # both workers
        faulty[videos[int(batch["index"][0])]] = "STOP once"
    stop = threading.Event()
    resuming = threading.Thread(target=resume_suspended, args=(stop,))
    resuming.start()
    try:
        with time_limit(2 * PAUSE + GUARD):
            batches = list(make_loader(clip_dataset(videos), tmp_path / "quarantine.csv"))
    finally:
        stop.set()
        resuming.join()
    assert_same_batches(undisturbed, batches)
    assert not (tmp_path / "quarantine.csv").exists()
    assert capfd.readouterr().err == ""


def test_f05_time_in_which_nothing_runs_does_not_count(monkeypatch):
    timer = watchdog.ReadTimer()
    assert [timer.add(1, 0.5), timer.add(1, 0.5), timer.add(1, 0.25)] == [0, 0.5, 0.75]
    assert timer.add(2, 0.5) == 0

    child = subprocess.Popen(["sleep", "100"])
    watched = watchdog.WorkerWatchdog(1, seconds=4 * watchdog.TICK)
    watched.slots[0] = (child.pid, 1, 1)
    looks = itertools.count(step=1000)  # each look is 1000 seconds after the last one
    monkeypatch.setattr(watchdog.time, "sleep", lambda _: None)
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: next(looks))
    monkeypatch.setattr(watchdog, "kill", lambda _: child.kill() or child.wait())
    watched._watch_workers([child.pid])  # returns when the child has ended
    assert watched.timed_out == {child.pid}
    assert next(looks) == 6000  # the first one, and 0, 2, 4, 6 ticks of the read


def test_f05_idle_workers_that_die_are_started_again(videos, tmp_path, capfd):
    expected = list(make_loader(clip_dataset(videos * 20), tmp_path / "none"))
    data = clip_dataset(videos * 20)
    quarantine = tmp_path / "quarantine.csv"
    batches = make_loader(data, quarantine)
    iterator = iter(batches)
    received = [next(iterator)]
    idle_checks = 0
    while idle_checks < 10:  # until the workers have filled their queues and read nothing for 0.5 s
        time.sleep(0.05)
        idle_checks += 1
        if data.watchdog.slots[:, watchdog.FILE].any():
            idle_checks = 0
    end_children()
    received += iterator
    assert_same_batches(expected, received)
    assert not quarantine.exists()
    printed = set(capfd.readouterr().err.splitlines())
    assert printed == {"note: a loader worker died (SIGKILL): the workers are started again"}


def test_f05_validation_workers_killed_between_passes(videos, tmp_path):
    workers = WorkerSettings(2, False, READ_TIMEOUT, tmp_path / "quarantine.csv")
    start_pass = eval_loader(clip_dataset(videos), 2, workers, ONE_PROCESS)
    expected = list(start_pass())
    living = {worker.pid for worker in multiprocessing.active_children()}
    assert_same_batches(expected, list(start_pass()))
    assert living == {worker.pid for worker in multiprocessing.active_children()}
    end_children()
    with time_limit(CHECK_INTERVAL + GUARD):
        assert_same_batches(expected, list(start_pass()))
    assert not (tmp_path / "quarantine.csv").exists()


def test_f05_workers_that_die_again_and_again_end_the_run(videos, tmp_path, monkeypatch):
    def die(_samples):
        os._exit(3)

    monkeypatch.setattr(loader, "MAX_RESTARTS", 1)
    batches = make_loader(clip_dataset(videos), tmp_path / "quarantine.csv")
    batches.collate_fn = die
    with (
        time_limit(2 * CHECK_INTERVAL + GUARD),
        pytest.raises(UserError, match=r"died 2 times .* \(the last: exit code 3\): lower --num_w"),
    ):
        next(iter(batches))
    assert not multiprocessing.active_children()
    assert not (tmp_path / "quarantine.csv").exists()


def test_f05_workers_that_cannot_be_started_end_the_run(videos, tmp_path, monkeypatch):
    def fork():
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    batches = make_loader(clip_dataset(videos), tmp_path / "quarantine.csv")
    monkeypatch.setattr(os, "fork", fork)
    with pytest.raises(UserError, match=r"^2 loader workers cannot be started \(Resource temp"):
        next(iter(batches))


def test_f05_workers_that_do_nothing_are_started_again(
    undisturbed, videos, tmp_path, monkeypatch, capfd
):
    init_worker = loader.init_worker

    def hang_once(worker_id):
        init_worker(worker_id)
        if is_first_time(tmp_path / f"started_{worker_id}"):
            time.sleep(1000)

    monkeypatch.setattr(watchdog, "STALL_SECONDS", 1)
    monkeypatch.setattr(loader, "init_worker", hang_once)
    with time_limit(CHECK_INTERVAL + GUARD):
        batches = list(make_loader(clip_dataset(videos), tmp_path / "quarantine.csv"))
    assert_same_batches(undisturbed, batches)
    assert "a loader worker died (did nothing for" in capfd.readouterr().err


def is_alive(process: psutil.Process) -> bool:
    """Return whether a process exists and is not a zombie."""
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def read_hanging_file(path: str, quarantine: Path) -> None:
    """Wait for a batch that never comes."""
    next(iter(make_loader(clip_dataset([path] * 4), quarantine)))


def test_f05_a_hanging_worker_ends_with_the_main_process(videos, tmp_path, faulty):
    faulty[videos[0]] = "hang"
    context = multiprocessing.get_context("fork")
    main_process = context.Process(target=read_hanging_file, args=(videos[0], tmp_path / "q"))
    main_process.start()
    parent = psutil.Process(main_process.pid)
    wait_until(lambda: len(parent.children()) == 2)
    time.sleep(0.5)  # until they have opened the file
    workers = parent.children()
    main_process.kill()
    main_process.join()
    time.sleep(1)
    alive = [worker for worker in workers if is_alive(worker)]
    for worker in alive:
        worker.kill()
    assert alive == []


def test_an_abandoned_pass_leaves_no_batch_behind(videos, tmp_path):
    workers = WorkerSettings(2, False, READ_TIMEOUT, None)
    start_pass = eval_loader(clip_dataset(videos), 2, workers, ONE_PROCESS)
    batches = start_pass()
    assert indices_of([next(batches)]) == [0, 1]
    batches.close()
    assert not multiprocessing.active_children()
    abandoned = start_pass()
    later = start_pass()
    assert indices_of([next(abandoned), next(later)]) == [0, 1, 0, 1]
    abandoned.close()
    assert indices_of(later) == list(range(2, 8))


@pytest.mark.slow
def test_f05_two_ranks_survive_kills_and_suspension(folder, tmp_path):
    flags = "--batch_size_per_gpu 2 --epochs 6 --read_timeout 2 --num_workers 1".split()
    flags += ["--val_dirs", str(folder)]
    slow = [{"do": "slow read", "seconds": 0.4}, {"do": "slow", "seconds": 0.2}]
    jobs = []
    for name in ("undisturbed", "disturbed"):
        arguments = pretrain_command(folder, tmp_path / name, *flags)
        jobs.append(Job(tmp_path / name, "tests/faulty.py", faulty_arguments(slow, arguments)))
    job = jobs[1]
    job.wait_for("update 1/12")
    ranks = psutil.Process(job.process.pid).children()
    assert len(ranks) == 2
    for rank in ranks:
        rank.children()[-1].kill()  # its training worker
        time.sleep(1)
    job.wait_for("update 3/12")
    everything = [job.process.pid, *job.processes()]
    for pid in everything:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(PAUSE)
    for pid in everything:
        os.kill(pid, signal.SIGCONT)
    for job in jobs:
        assert job.wait_until_gone(120) == 0
        assert not (job.out / "quarantine.csv").exists()
        assert not (job.out / "bad_videos.csv").exists()
    assert "a loader worker died (SIGKILL)" in jobs[1].printed.read_text()
    assert_same_run(tmp_path / "undisturbed", tmp_path / "disturbed")


# ---- Errors of the system while a file is read ----

ERRORS = [
    OSError(errno.EIO, "Input/output error"),
    OSError(errno.ESTALE, "Stale file handle"),
    OSError(errno.ETIMEDOUT, "Connection timed out"),
    MemoryError("cannot allocate 3 GiB"),
]


def test_f01_files_of_a_failing_disk_are_replaced_and_listed(
    undisturbed, folder, videos, tmp_path, faulty
):
    faulty.update(zip(videos, ERRORS, strict=False))
    data = clip_dataset(videos)
    batches = list(make_loader(data, tmp_path / "quarantine.csv"))
    assert_only_these_files_differ(undisturbed, batches, videos[: len(ERRORS)], data)
    reasons = bad_files(batches)
    assert reasons[videos[0]].endswith("Error: Input/output error")
    assert reasons[videos[1]].endswith("Error: Stale file handle")
    assert reasons[videos[2]].endswith("Error: Connection timed out")
    assert reasons[videos[3]] == "MemoryError: cannot allocate 3 GiB"

    flags = "--batch_size_per_gpu 2 --epochs 2 --max_bad_frac 0.5".split()
    for workers in ("0", "2"):
        out = tmp_path / workers
        pretrain.main(pretrain_command(folder, out, *flags, "--num_workers", workers))
        listed = (out / "bad_videos.csv").read_text()
        for path in videos[: len(ERRORS)]:
            assert f"{path},{reasons[path]}" in listed
        assert not (out / "quarantine.csv").exists()
        assert log_records(out)[-1]["unreadable_videos"] == len(ERRORS)
    assert_same_run(tmp_path / "0", tmp_path / "2")


# ---- Open files ----


def limit_open_files(soft: int, hard: int):
    """Return a function that sets the limits of open files."""
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("limit", [40, 64])
def test_f07_too_few_open_files_are_one_line(folder, tmp_path, limit):
    flags = "--batch_size_per_gpu 2 --epochs 1 --num_workers 2".split()
    command = script_command("pretrain.py", pretrain_command(folder, tmp_path, *flags))
    run = subprocess.run(
        command,
        preexec_fn=limit_open_files(limit, limit),
        capture_output=True,
        text=True,
        timeout=60,
        env=clean_environment(),
    )
    assert run.returncode == 2
    error = run.stderr.splitlines()
    assert len(error) == 1
    assert error[0].startswith(f"error: {limit} open files are allowed (ulimit -n), ")
    assert "are needed with 2 loader workers: raise the limit (ulimit -n 1024)" in error[0]


def test_f07_the_soft_limit_of_open_files_is_raised():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    low = highest_descriptor() + 10
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (low, hard))
        check_limits([LoaderNeeds(0, 0, 0)])
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (low, hard)
        check_limits([LoaderNeeds(2, 8, 1)])
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def lower_open_files() -> None:
    """Let this process open no more files than it has open."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest_descriptor() + 1, hard))


def highest_descriptor() -> int:
    """Return the highest descriptor of this process after which all lower ones are in use."""
    opened = [os.open(os.devnull, os.O_RDONLY)]
    in_use = set(map(int, os.listdir("/proc/self/fd")))
    while len(in_use) <= max(in_use):
        opened.append(os.dup(opened[0]))
        in_use = set(map(int, os.listdir("/proc/self/fd")))
    return max(in_use)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_f07_a_file_is_not_bad_if_none_can_be_opened(
    videos, tmp_path, monkeypatch, faulty, num_workers
):
    data = clip_dataset(videos)
    read_clips = data.read_clips
    data.read_clips = lambda *key: lower_open_files() or read_clips(*key)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    workers = WorkerSettings(num_workers, False, READ_TIMEOUT, tmp_path / "quarantine.csv")
    start_pass = eval_loader(data, 2, workers, ONE_PROCESS)
    try:
        with time_limit(GUARD), pytest.raises(UserError, match="no more files can be opened"):
            list(start_pass())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not (tmp_path / "quarantine.csv").exists()


def test_f07_the_main_process_cannot_open_a_batch(videos, tmp_path):
    batches = iter(make_loader(clip_dataset(videos), tmp_path / "quarantine.csv"))
    next(batches)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        lower_open_files()
        with time_limit(GUARD), pytest.raises(UserError, match="no more files can be opened"):
            next(batches)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not multiprocessing.active_children()


def test_f07_frames_are_not_replaced_if_no_file_can_be_opened(videos, monkeypatch):
    data = clip_dataset(videos)
    read = data.read_clips((0, 0), videos[0], None, None)._replace(replaced=1)
    monkeypatch.setattr(data, "read_clips", lambda *_: read)
    assert data[(0, 0)]["replaced"] == 1
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        lower_open_files()
        with pytest.raises(UserError, match="no more files can be opened"):
            data[(0, 0)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# ---- Shared memory ----


def view_dataset(videos: list[str]) -> ViewDataset:
    """Return two time windows of three crops of each video."""
    return ViewDataset(
        paths=videos,
        labels=[0] * len(videos),
        sampling=ClipSampling(4, 2),
        num_views=2,
        transform=view_transform(32, 3),
        decoder="pyav",
        short_side=48,
    )


def test_the_size_of_a_sample_is_known_before_it_is_read(videos, images):
    clips = clip_dataset(videos)
    sample = clips[(0, 0)]
    assert clips.sample_bytes() == sample["clips"].nbytes + sample["noise"].nbytes
    views = view_dataset(videos)
    assert views.sample_bytes() == views[(0, 0)]["clips"].nbytes
    pictures = ImageDataset(
        paths=[str(next(Path(images).rglob("*.png")))],
        labels=[0],
        transform=image_transform(32, train=True),
        seed=0,
        substitutes=0,
    )
    assert pictures.sample_bytes() == pictures[(0, 0)]["clips"].nbytes


def test_f18_a_small_shared_memory_is_one_line_at_the_start(videos, tmp_path, monkeypatch):
    workers = WorkerSettings(2, False, READ_TIMEOUT, tmp_path / "quarantine.csv")
    batch_bytes = 2 * view_dataset(videos).sample_bytes()
    usage = worker_limits.shutil.disk_usage("/")

    def leave_free(size: int) -> None:
        free = usage._replace(free=size)
        monkeypatch.setattr(worker_limits.shutil, "disk_usage", lambda _: free)

    leave_free(8 * batch_bytes - 1)
    message = r"/dev/shm has 1\.18 MB free, .* take 1\.18 MB \(8 batches of 0\.147 MB\): lower"
    with pytest.raises(UserError, match=message):
        eval_loader(view_dataset(videos), 2, workers, ONE_PROCESS)
    leave_free(8 * batch_bytes)
    first = eval_loader(view_dataset(videos), 2, workers, ONE_PROCESS)
    with pytest.raises(UserError, match=r"8 batches of .* MB and 8 batches of"):
        eval_loader(view_dataset(videos), 2, workers, ONE_PROCESS)
    list(first())  # its batches are in use: only the second one's must fit
    second = eval_loader(view_dataset(videos), 2, workers, ONE_PROCESS)
    del first, second
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="in each of 2 processes"):
        eval_loader(view_dataset(videos), 2, workers, ONE_PROCESS)
    no_workers = workers._replace(num_workers=0)
    eval_loader(view_dataset(videos), 2, no_workers, ONE_PROCESS)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            RuntimeError("unable to allocate shared memory(shm): No space left on device (28)"),
            "no room for a batch in /dev/shm",
        ),
        (MemoryError(), "no memory left"),
        (UserError("the cure"), "^the cure$"),
    ],
    ids=["shared memory", "memory", "of the user"],
)
def test_f18_a_batch_that_cannot_be_sent_ends_the_run(videos, tmp_path, error, message):
    def fail(samples):
        raise error

    batches = make_loader(clip_dataset(videos), tmp_path / "quarantine.csv")
    batches.collate_fn = fail
    with time_limit(GUARD), pytest.raises(UserError, match=message) as raised:
        next(iter(batches))
    assert "\n" not in str(raised.value)


def test_f18_a_run_in_a_small_shared_memory(folder, tmp_path):
    small = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    mount = "mount -t tmpfs -o size=100k tmpfs /dev/shm"
    if subprocess.run([*small, mount], capture_output=True).returncode != 0:
        pytest.skip("this system does not allow to mount a file system")
    flags = "--batch_size_per_gpu 2 --epochs 1 --num_workers 2".split()
    command = script_command("pretrain.py", pretrain_command(folder, tmp_path, *flags))
    run = subprocess.run(
        [*small, f'{mount} && exec "$@"', "sh", *command],
        capture_output=True,
        text=True,
        timeout=60,
        env=clean_environment(),
    )
    assert run.returncode == 2
    assert run.stderr.startswith("error: /dev/shm has 0.102 MB free, the batches that loader")
    assert run.stderr.count("\n") == 1


def test_a_packed_batch_is_sent_in_one_piece(videos):
    data = clip_dataset(videos)
    sample = data[(0, 0)]
    sample["path"] = "long/" * 100
    batch = collate([sample] * 64)
    packed = PackedBatch(batch)
    # at most PIPE_BUF bytes are written to a pipe all at once or not at all
    assert len(pickle.dumps((10**9, packed))) < select.PIPE_BUF / 2
    unpacked = packed.unpack()
    assert unpacked.keys() == batch.keys()
    for key, value in batch.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(unpacked[key], value)
            assert unpacked[key].stride() == value.stride()
        else:
            assert unpacked[key] == value
