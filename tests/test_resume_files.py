"""Which checkpoint a run resumes from or evaluates (T07), and what must not change (T09)."""

from pathlib import Path

import pytest
import torch

from util import checkpoint, resume
from util.dist import UserError
from util.files import RunFiles

PIXELS = {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}
CONFIG = {"depth": 2, "embed_dim": 64, "num_heads": 2} | PIXELS
CURRENT = {
    "config": CONFIG,
    "args": {"lr": 0.1, "data_dirs": ["a"]},
    "data": {"samples": 17, "sha256": "a"},
    "global_batch": 8,
}


@pytest.fixture
def files(tmp_path):
    return RunFiles(tmp_path, "run")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in resume.RESTART_COUNTS:
        monkeypatch.delenv(name, raising=False)


def run_state(**changes) -> dict:
    """Return the parts of a run's checkpoint."""
    state = {
        "model": {"w": torch.ones(3)},
        "optimizer": {},
        "scaler": {},
        "step": 1,
        "samples_consumed": 8,
        "config": CONFIG,
        "args": {"lr": 0.1, "data_dirs": ["a"], "resume": "auto"},
        "data": CURRENT["data"],
        "global_batch": 8,
    }
    return state | changes


def test_without_checkpoints_a_run_starts_from_scratch(files):
    assert resume.find_resume(files, "auto", False) is None
    assert resume.find_resume(files, "", False) is None


def test_auto_resumes_from_the_newest_checkpoint(files):
    checkpoint.save(files.checkpoint, run_state())
    assert resume.find_resume(files, "auto", False) == files.checkpoint


def test_an_existing_run_is_only_overwritten_on_request(files, tmp_path):
    checkpoint.save(files.checkpoint, run_state())
    checkpoint.save(tmp_path / "other.pth", run_state())
    with pytest.raises(UserError, match="--resume '' would overwrite that run"):
        resume.find_resume(files, "", False)
    other = str(tmp_path / "other.pth")
    with pytest.raises(UserError, match="other.pth would overwrite that run"):
        resume.find_resume(files, other, False)
    assert resume.find_resume(files, "", True) is None
    assert resume.find_resume(files, other, True) == Path(other)


def test_a_repeated_command_with_a_path_resumes_its_own_run(files, tmp_path):
    other = str(tmp_path / "other.pth")
    checkpoint.save(Path(other), run_state())
    assert resume.find_resume(files, other, False) == Path(other)
    checkpoint.save(files.checkpoint, run_state(args={"resume": other}))
    assert resume.find_resume(files, other, False) == files.checkpoint
    assert resume.find_resume(files, str(files.checkpoint), False) == files.checkpoint


@pytest.mark.parametrize("name", resume.RESTART_COUNTS)
def test_a_restart_by_the_launcher_resumes(name, files, monkeypatch):
    checkpoint.save(files.checkpoint, run_state())
    monkeypatch.setenv(name, "0")
    assert not resume.is_restart()
    monkeypatch.setenv(name, "1")
    assert resume.is_restart()
    assert resume.find_resume(files, "", True) == files.checkpoint


def test_t07_a_missing_or_corrupt_path_is_an_error(files, tmp_path):
    with pytest.raises(UserError, match="checkpoint missing.pth not found"):
        resume.find_resume(files, "missing.pth", False)
    (tmp_path / "bad.pth").write_text("text")
    with pytest.raises(UserError, match="bad.pth cannot be read"):
        resume.find_resume(files, str(tmp_path / "bad.pth"), False)


def test_t07_corrupt_checkpoints_are_renamed(files, capsys):
    for step in (1, 2):
        checkpoint.save(files.checkpoint, {"step": step}, 2)
    for count in (1, 2):  # the second one does not replace the first
        files.checkpoint.write_bytes(b"bad")
        assert resume.newest_readable(files.checkpoint) == files.path("_previous1.pth")
        assert len(list(files.folder.glob("*.damaged*"))) == count
    assert "renamed to run.pth.damaged1, resuming from" in capsys.readouterr().out


def test_t07_a_run_without_readable_checkpoints_is_an_error(files):
    for path in (files.checkpoint, files.path("_previous1.pth")):
        path.write_bytes(b"bad")
    with pytest.raises(UserError, match="no earlier checkpoint is readable either"):
        resume.newest_readable(files.checkpoint)
    assert files.checkpoint.read_bytes() == b"bad"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no room"),
        OSError(5, "Input/output error"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_t07_only_corrupt_checkpoints_are_renamed(error, files, monkeypatch):
    for step in (1, 2):
        checkpoint.save(files.checkpoint, {"step": step}, 2)

    def fail(*_, **__):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(torch, "load", fail)
        with pytest.raises(UserError, match="run.pth cannot be read"):
            resume.find_resume(files, "auto", False)
    assert resume.find_resume(files, "auto", False) == files.checkpoint
    assert not list(files.folder.glob("*.damaged*"))


def test_eval_reads_the_best_checkpoint_then_the_newest(files):
    with pytest.raises(
        UserError, match="--eval found no checkpoint at .*run_best.pth or .*run.pth"
    ):
        resume.find_eval_checkpoint(files, "auto")
    files.checkpoint.touch()
    assert resume.find_eval_checkpoint(files, "auto") == files.checkpoint
    files.best.touch()
    assert resume.find_eval_checkpoint(files, "auto") == files.best
    assert resume.find_eval_checkpoint(files, str(files.checkpoint)) == files.checkpoint
    with pytest.raises(UserError, match="--eval found no checkpoint at missing.pth"):
        resume.find_eval_checkpoint(files, "missing.pth")
    with pytest.raises(UserError, match="--eval reads the checkpoint of --resume, which is ''"):
        resume.find_eval_checkpoint(files, "")


def test_a_finetuning_run_records_class_names(files):
    config = CONFIG | {"classes": ["a", "b"]}
    checkpoint.save(files.best, {"model": {}, "config": config})
    assert resume.recorded_classes(files.best) == ["a", "b"]
    checkpoint.save(files.checkpoint, run_state())
    with pytest.raises(UserError, match="is not a finetuning checkpoint"):
        resume.recorded_classes(files.checkpoint)
    checkpoint.save(files.checkpoint, {"model": {}})
    with pytest.raises(UserError, match="no config"):
        resume.recorded_classes(files.checkpoint)


def test_the_only_run_of_a_folder_needs_no_prefix(tmp_path):
    assert resume.only_run(tmp_path, default="vit") == "vit"
    for name in ("a.pth", "a_best.pth", "a_previous1.pth"):
        (tmp_path / name).touch()
    assert resume.only_run(tmp_path, default="vit") == "a"
    (tmp_path / "b.pth").touch()
    with pytest.raises(UserError, match=r"has several runs \(a, b\). Choose one by --save_prefix"):
        resume.only_run(tmp_path, default="vit")
    assert resume.only_run(tmp_path, default="b") == "b"


def test_t09_changed_flags_are_printed(files, capsys):
    saved = {"lr": 0.1, "seed": 0, "data_dirs": ("a",), "data_csv": "", "removed": 1}
    flags = {"lr": 0.2, "seed": 0, "data_dirs": ["a"], "data_csv": [], "new": 1}
    current = CURRENT | {"args": flags}
    resume.check_same_run(files.checkpoint, run_state(args=saved), current, force=False)
    assert capsys.readouterr().out == "flag changed since the checkpoint: --lr 0.1 -> 0.2\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"global_batch": 4}, "global batch 8 -> 4.*Restore --batch_size_per_gpu"),
        (
            {"data": {"samples": 16, "sha256": "b"}},
            "training set of 17 -> 16 samples.*Restore the manifest in --datafile_dir",
        ),
        (
            {"data": {"samples": 16, "sha256": "b"}, "args": {"train_data_path": "images"}},
            "Restore --train_data_path, --shots, --frac_retained and --seed, or pass",
        ),
        (
            {"data": {"samples": 17, "sha256": "a", "weighting": "--balanced"}},
            r"another run \(weighting of the samples: none -> --balanced\). Restore the w",
        ),
    ],
)
def test_t09_another_batch_or_data_set_needs_force(change, message, files, capsys):
    with pytest.raises(UserError, match=message):
        resume.check_same_run(files.checkpoint, run_state(), CURRENT | change, force=False)
    resume.check_same_run(files.checkpoint, run_state(), CURRENT | change, force=True)
    assert "changed since the checkpoint, by --force_resume: " in capsys.readouterr().out


def test_t09_another_model_needs_force(files):
    current = CURRENT | {"config": CONFIG | {"depth": 12}}
    with pytest.raises(UserError, match="depth: 2 in the checkpoint, 12 now"):
        resume.check_same_run(files.checkpoint, run_state(), current, force=False)
    resume.check_same_run(files.checkpoint, run_state(), current, force=True)


def test_checkpoints_without_fingerprint_or_batch_are_accepted(files):
    state = run_state()
    del state["data"], state["global_batch"]
    resume.check_same_run(files.checkpoint, state, CURRENT, force=False)


def test_files_of_other_programs_are_refused_even_with_force(files):
    with pytest.raises(UserError, match="no optimizer, scaler, step, samples_consumed, config"):
        resume.check_same_run(files.checkpoint, {"model": {}}, CURRENT, force=True)
