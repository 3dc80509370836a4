"""Checkpoint files survive crashes (T05); corrupt and hostile ones are refused (T19)."""

import argparse
import json
import os
import pickle
import signal
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from corrupt_files import Payload, corrupted
from foreign_models import INSTALL, SIZE
from PIL import Image
from tiny import same, tiny_vit

from models_vit import VideoEncoder
from tools.convert_checkpoint import main as convert
from tools.inspect_checkpoint import main as inspect
from util import checkpoint, resume
from util.checkpoint import CorruptCheckpoint, load, previous, save
from util.dist import UserError
from util.files import RunFiles
from util.pretrained import load_encoder

SYSTEM_CALLS = ("fsync", "link", "replace")  # of os, made by a save


def save_step(folder: Path, step: int, keep: int) -> None:
    """Save a checkpoint whose weights all equal its step."""
    state = {"step": step, "model": {"w": torch.full((1000,), step)}}
    save(folder / "run.pth", state, keep)


def steps_of_files(folder: Path, keep: int) -> list[int]:
    """Return the steps of the kept checkpoints that exist, the newest first."""
    newest = folder / "run.pth"
    paths = [newest, *(previous(newest, index) for index in range(1, keep))]
    return [load(path)["step"] for path in paths if path.exists()]


def killed_in_save(folder: Path, step: int, call: int, keep: int) -> bool:
    """Save in a process that is killed before its `call`-th system call.

    Return False if the save makes fewer calls and is complete.
    """
    child = os.fork()
    if child == 0:
        calls = [0]

        def dying(function):
            def call_or_die(*arguments):
                calls[0] += 1
                if calls[0] == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments)

            return call_or_die

        for name in SYSTEM_CALLS:
            setattr(os, name, dying(getattr(os, name)))
        save_step(folder, step, keep)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == -signal.SIGKILL


@pytest.mark.parametrize(("keep", "links"), [(2, True), (4, True), (3, False)])
def test_t05_a_save_killed_anywhere_leaves_a_complete_file(keep, links, tmp_path, monkeypatch):
    """Before the rename, in the rotation, between the two and after both."""

    def refuse(*_):
        raise PermissionError("no hard links here")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    found_steps = []
    for call in range(1, 100):
        folder = tmp_path / str(call)
        folder.mkdir()
        for step in range(6):
            save_step(folder, step, keep)
        if not killed_in_save(folder, 6, call, keep):
            break
        path = resume.find_resume(RunFiles(folder, "run"), "auto", False)
        found = load(path)
        assert found["step"] in (5, 6)
        assert torch.equal(found["model"]["w"], torch.full((1000,), found["step"]))
        if links:  # without hard links there is a moment without run.pth
            assert path == folder / "run.pth"
        found_steps.append(found["step"])
        check_next_save(folder, keep)
    assert found_steps == sorted(found_steps)
    assert set(found_steps) == {5, 6}
    assert len(found_steps) >= 4
    assert steps_of_files(folder, keep + 1) == list(range(6, 6 - keep, -1))


def check_next_save(folder: Path, keep: int) -> None:
    """Assert that a save after a crash works and leaves no other files."""
    save_step(folder, 7, keep)
    steps = steps_of_files(folder, keep)
    assert steps[0] == 7
    assert steps == sorted(set(steps), reverse=True)
    assert len(steps) >= keep - 1
    allowed = {"run.pth", ".run.lock", *(f"run_previous{index}.pth" for index in range(1, keep))}
    assert {file.name for file in folder.iterdir()} <= allowed


def test_a_failed_save_leaves_everything_as_it_was(tmp_path, monkeypatch):
    save_step(tmp_path, 1, 2)

    def full_disk(state, file):
        file.write(b"half")
        raise RuntimeError("unexpected pos") from OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path / "run.pth", {"step": 2}, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["run.pth"]
    assert load(tmp_path / "run.pth")["step"] == 1


def test_rename_aside_never_replaces_a_file(tmp_path):
    for content in ("a", "b", "c"):
        (tmp_path / "x.pth").write_text(content)
        checkpoint.rename_aside(tmp_path / "x.pth", ".damaged")
    contents = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert contents == {"x.pth.damaged": "a", "x.pth.damaged1": "b", "x.pth.damaged2": "c"}


def test_load_names_what_is_wrong_with_a_file(tmp_path):
    with pytest.raises(UserError, match="nowhere.pth not found"):
        load(tmp_path / "nowhere.pth")
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(UserError, match="holds a list, not a dictionary"):
        load(tmp_path / "list.pth")


def test_a_folder_without_weights_names_its_files(tmp_path):
    with pytest.raises(UserError, match="is a folder without model.safetensors. Pass a file"):
        load(tmp_path)
    for name in ("b.pth", "a.pth", "log.txt"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"Pass one of its files \(a.pth, b.pth\)"):
        load(tmp_path)


def write_zip(path: Path, names: tuple[str, ...] = ("a.txt",)) -> None:
    """Write an archive that is not one of torch.save."""
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, "text")


def write_script(path: Path) -> None:
    """Write an archive with the records that make torch.load see TorchScript."""
    write_zip(path, ("a/data.pkl", "a/constants.pkl", "a/version"))


def write_half(path: Path) -> None:
    """Write the first half of a checkpoint."""
    torch.save({"w": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:600])


# What writes the file, the words of the message, and whether a run resumes from an older file
NO_CHECKPOINTS = {
    "text": (lambda path: path.write_text("path,label\n"), "a text file", True),
    "unicode": (lambda path: path.write_text("a" + "ä" * 5000), "a text file", True),
    "page": (lambda path: path.write_text("<!DOCTYPE html>"), "a web page", True),
    "pointer": (lambda path: path.write_text("version https://git-lfs.x"), "Git LFS", True),
    "empty": (lambda path: path.write_bytes(b""), "an empty file", True),
    "picture": (lambda path: write_picture(path), "a PNG image", True),
    "video": (lambda path: path.write_bytes(b"\0\0\0\x20ftypisom\0\1"), "an MP4 video", True),
    "noise": (lambda path: path.write_bytes(b"\xc3\1\xff" * 99), "not tensors and plain", True),
    "control": (lambda path: path.write_bytes(b"\1\2\3" * 99), "not tensors and plain", True),
    "pickle": (lambda path: path.write_bytes(pickle.dumps({1: 2})), "not tensors and plain", True),
    "half": (write_half, "its end is missing", True),
    "zip": (write_zip, "a zip archive", False),
    "numpy": (lambda path: torch.save({"a": np.ones(2)}, path), "it contains numpy", False),
    "scalar": (lambda path: torch.save({"a": np.float64(2)}, path), "it contains numpy", False),
    "module": (lambda path: torch.save(torch.nn.ReLU(), path), "contains torch.nn.mod", False),
    "script": (write_script, "a TorchScript program", False),
}


def write_picture(path: Path) -> None:
    """Write a PNG image of one pixel."""
    Image.new("RGB", (1, 1)).save(path, "PNG")


@pytest.mark.parametrize("kind", NO_CHECKPOINTS)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_what_is_not_a_checkpoint_is_one_plain_line(kind, suffix, tmp_path):
    write, words, corrupt = NO_CHECKPOINTS[kind]
    path = tmp_path / f"file{suffix}"
    write(path)
    if suffix == ".safetensors":
        pytest.importorskip("safetensors", reason=INSTALL)
        if words.startswith(("not tensors", "it contains", "contains", "its end")):
            words = "cannot be read"  # in the words of safetensors
    with pytest.raises(UserError, match=f"file{suffix} cannot be read .*") as error:
        load(path)
    message = str(error.value)
    assert words in message
    assert "\n" not in message and "weights_only" not in message
    assert isinstance(error.value, CorruptCheckpoint) == corrupt


def test_an_archive_with_a_broken_directory_is_one_line(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"w": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes().replace(b"PK\x01\x02", b"PK\x01\x03"))
    assert zipfile.is_zipfile(path)
    for check in (True, False):
        with pytest.raises(CorruptCheckpoint, match="a.pth cannot be read"):
            load(path, check=check)


def test_a_failing_disk_is_not_a_corrupt_file(tmp_path, monkeypatch):
    save_step(tmp_path, 1, 1)

    def fail(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(UserError, match="check memory, disk and permissions") as error:
        load(tmp_path / "run.pth")
    assert not isinstance(error.value, CorruptCheckpoint)


@pytest.mark.parametrize("content", ["{", "[1]", "\xff"])
def test_a_bad_config_beside_the_weights_is_named(content, tmp_path):
    safetensors_torch = pytest.importorskip("safetensors.torch", reason=INSTALL)
    safetensors_torch.save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match="config.json .* Repair it"):
        load(tmp_path)


def test_a_folder_with_pytorch_model_bin_has_its_config(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    described = {"model_type": "videomae", "image_size": 32, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(described))
    state = load(tmp_path)
    assert torch.equal(state["model"]["w"], torch.ones(2))
    assert state["config"] == {"img_size": 32, "num_heads": 4}


def test_only_checking_reads_the_checksums(tmp_path):
    path = tmp_path / "a.pth"
    weight = torch.arange(1000.0)
    torch.save({"w": weight}, path)
    content = path.read_bytes()
    offset = content.index(weight.numpy().tobytes()) + 100
    path.write_bytes(content[:offset] + b"\xff" + content[offset + 1 :])
    with pytest.raises(CorruptCheckpoint, match="the checksum of .* is wrong"):
        load(path, lazily=True)
    assert load(path, check=False, lazily=True)["w"].shape == (1000,)


def test_parts_of_a_run_are_required_with_their_types():
    state = {"model": {}, "optimizer": {}, "step": 1, "config": 7}
    checkpoint.require_parts("x.pth", state, ("model", "optimizer", "step"))
    with pytest.raises(UserError, match=r"x.pth is not a checkpoint of a run \(no args, scaler\)"):
        checkpoint.require_parts("x.pth", state, ("model", "args", "scaler"))
    with pytest.raises(UserError, match=r"\(config is of type int\)"):
        checkpoint.require_parts("x.pth", state, ("model", "config"))


def test_check_config_lists_every_change():
    state = {"config": {"depth": 2, "mean": (0.5,), "cls_embed": True}}
    checkpoint.check_config("x.pth", state, state["config"] | {"new": 1})
    listing = "cls_embed: True in the checkpoint, False now; depth: 2 in the checkpoint, 12 now"
    with pytest.raises(UserError, match=listing):
        checkpoint.check_config("x.pth", state, {"depth": 12, "mean": (0.5,), "cls_embed": False})


def test_load_weights_counts_the_faults():
    model = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"x.pth does not fit the model \(3 faults\)") as error:
        checkpoint.load_weights("x.pth", model, {"weight": torch.ones(3), "more": torch.ones(1)})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "position",
    ["top", "beside the weights", "in a Namespace", "in a plain pickle", "in the old format"],
)
def test_t19_a_payload_is_refused_and_not_run(position, tmp_path):
    path = tmp_path / "hostile.pth"
    payload = Payload(tmp_path / "ran")
    model = {"model": tiny_vit().state_dict()}
    hostile_args = argparse.Namespace(lr=payload)
    contents = {
        "top": payload,
        "beside the weights": model | {"epoch": payload},
        "in a Namespace": model | {"args": hostile_args},
        "in a plain pickle": hostile_args,
        "in the old format": model | {"args": hostile_args},
    }
    if position == "in a plain pickle":
        path.write_bytes(pickle.dumps(contents[position]))
    else:
        zipped = position != "in the old format"
        torch.save(contents[position], path, _use_new_zipfile_serialization=zipped)
    for attempt in (
        load,
        load_encoder,
        lambda path: inspect([str(path)]),
        lambda path: convert([str(path), f"{path}.out", "--to", "native"]),
    ):
        with pytest.raises(UserError, match="hostile.pth cannot be read") as error:
            attempt(path)
        assert "\n" not in str(error.value)
    assert [file.name for file in tmp_path.iterdir()] == ["hostile.pth"]


def test_a_name_that_is_no_text_is_no_damage(tmp_path):
    path = tmp_path / os.fsdecode(b"run\xff.pth")
    torch.save({"w": torch.zeros(3)}, path)
    assert load(path, check=False, lazily=True)["w"].shape == (3,)


def test_t19_the_payload_runs_in_a_careless_reader(tmp_path):
    torch.save(Payload(tmp_path / "ran"), tmp_path / "hostile.pth")
    torch.load(tmp_path / "hostile.pth", weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(("kind", "min_refused"), [("pth", 106), ("safetensors", 156)])
def test_t19_corrupt_files_are_refused(kind, min_refused, tmp_path):
    """A flipped bit is noticed, or it is in the padding of a .pth file and changes nothing."""
    encoder = VideoEncoder(**SIZE | {"depth": 1})
    path = tmp_path / "whole.pth"
    torch.save({"model": encoder.state_dict(), "config": encoder.config, "step": 3}, path)
    if kind == "safetensors":
        pytest.importorskip("safetensors", reason=INSTALL)
        convert([str(path), str(tmp_path / "folder"), "--to", "safetensors"])
        path = tmp_path / "folder/model.safetensors"
    expected = load(path)
    refused = 0
    for index, content in enumerate(corrupted(path.read_bytes(), flips=150)):
        path.write_bytes(content)
        try:
            assert same(load(path), expected), index
        except UserError as error:
            assert "cannot be read" in str(error)
            assert "\n" not in str(error)
            assert "()" not in str(error)
            refused += 1
    assert refused >= min_refused
