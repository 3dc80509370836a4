"""Resumed runs whose flags name other data than before: training keeps its set."""

import shutil

import pytest
from make_videos import write_folder
from runs import log_records, pretrain_command, saved_weights, video_command
from tiny import same

import finetune
import pretrain
from data.manifest import find_videos, read_manifest
from util.dist import UserError

BATCH = ["--batch_size_per_gpu", "4"]
TWO_UPDATES = [*BATCH, "--max_steps", "2"]


@pytest.fixture(scope="module")
def others(tmp_path_factory) -> str:
    """Return a folder of three other videos in two classes."""
    return str(write_folder(tmp_path_factory.mktemp("others"), 3, first=100))


def test_f03_pretraining_lists_a_changed_validation_set(videos, others, tmp_path, capsys):
    same_flags = tmp_path / "same"
    changed = tmp_path / "changed"
    command = pretrain_command(videos, same_flags, *BATCH, "--val_dirs", videos)
    pretrain.main([*command, "--max_steps", "1"])
    shutil.copytree(same_flags, changed)
    pretrain.main([*command, "--max_steps", "2"])
    assert "listed again" not in capsys.readouterr().out
    pretrain.main(pretrain_command(others, changed, *TWO_UPDATES, "--val_dirs", others))
    printed = capsys.readouterr().out
    assert printed.count("--val_dirs changed, so the validation set is listed again") == 1
    assert printed.count("--data_dirs changed, but a resumed run keeps its training set") == 1
    assert read_manifest(changed / "run_val.csv").paths == find_videos([others], "--val_dirs")
    assert same(saved_weights(changed), saved_weights(same_flags))
    records = log_records(changed)[-1], log_records(same_flags)[-1]
    assert records[0]["train_loss"] == records[1]["train_loss"]
    assert records[0]["val_loss"] != records[1]["val_loss"]


def test_f03_finetuning_lists_a_changed_validation_set(videos, others, tmp_path, capsys):
    same_flags = tmp_path / "same"
    changed = tmp_path / "changed"
    command = video_command(videos, same_flags, *BATCH)
    finetune.main([*command, "--max_steps", "1"])
    shutil.copytree(same_flags, changed)
    finetune.main([*command, "--max_steps", "2"])
    unknown = write_folder(tmp_path / "unknown", 3)
    (unknown / "class_1").rename(unknown / "class_x")
    command = video_command(videos, changed, *TWO_UPDATES)
    before = (changed / "run_val.csv").read_bytes()
    with pytest.raises(UserError, match="unknown class 'class_x'"):
        finetune.main([*command, "--val_dir", str(unknown)])
    assert (changed / "run_val.csv").read_bytes() == before
    capsys.readouterr()
    finetune.main([*command, "--val_dir", others])
    printed = capsys.readouterr().out
    assert printed.count("--val_dir changed, so the validation set is listed again") == 1
    assert read_manifest(changed / "run_val.csv").paths == find_videos([others], "--val_dir")
    assert same(saved_weights(changed), saved_weights(same_flags))
