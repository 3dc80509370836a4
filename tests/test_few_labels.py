"""Few labels: K shots or a part of each class, and classes that are drawn equally often."""

from collections import Counter
from pathlib import Path

import pytest
from runs import image_command, saved_state, saved_weights, video_command
from tiny import same

import finetune
import finetune_on_image
from data.manifest import keep_shots, keep_stratified, keep_subset, read_manifest
from data.samplers import EpochSampler, class_groups
from util.dist import UserError

LABELS = [0] * 30 + [1] * 3 + [4] * 20
BATCH = "--batch_size_per_gpu 2".split()


def kept_per_class(kept: list[int]) -> list[int]:
    """Return how many samples of each class are kept."""
    counts = Counter(LABELS[index] for index in kept)
    return [counts[label] for label in (0, 1, 4)]


def unbalanced(folder: Path, images: str) -> Path:
    """Link five images of one class and two of another below a folder."""
    for name, count in (("bright", 5), ("dark", 2)):
        (folder / name).mkdir(parents=True)
        for path in sorted(Path(images, name).glob("*.png"))[:count]:
            (folder / name / path.name).symlink_to(path)
    return folder


def test_fewer_shots_are_among_more_and_parts_likewise():
    parts = {
        (1, 1, 1): keep_shots(LABELS, 1, seed=7),
        (3, 1, 2): keep_stratified(LABELS, 0.1, seed=7),
        (5, 3, 5): keep_shots(LABELS, 5, seed=7),
        (15, 2, 10): keep_stratified(LABELS, 0.5, seed=7),
        (20, 3, 20): keep_shots(LABELS, 20, seed=7),
        (30, 3, 20): keep_shots(LABELS, 30, seed=7),
    }
    for counts, kept in parts.items():
        assert tuple(kept_per_class(kept)) == counts
        assert kept == sorted(set(kept))
        for more, others in parts.items():
            if all(count <= other for count, other in zip(counts, more, strict=True)):
                assert set(kept) <= set(others)
    assert keep_shots(LABELS, 5, seed=7) == parts[5, 3, 5]
    assert keep_shots(LABELS, 5, seed=8) != parts[5, 3, 5]
    assert parts[3, 1, 2] == [4, 12, 14, 30, 43, 47]  # as ever


def test_what_is_kept_is_printed_and_two_ways_are_an_error(capsys):
    assert keep_subset(LABELS, 1.0, None, seed=7) == list(range(53))
    assert capsys.readouterr().out == ""
    assert keep_subset(LABELS, 0.1, None, seed=7) == keep_stratified(LABELS, 0.1, seed=7)
    assert "--frac_retained 0.1: 6 of 53 samples" in capsys.readouterr().out
    assert keep_subset(LABELS, 1.0, 5, seed=7) == keep_shots(LABELS, 5, seed=7)
    assert capsys.readouterr().out.splitlines() == [
        "--shots 5: 13 of 53 samples of 3 classes",
        "note: 1 of the 3 classes have fewer samples and keep all of them",
    ]
    with pytest.raises(UserError, match=r"--shots 5 and --frac_retained 0.5 both choose a subset"):
        keep_subset(LABELS, 0.5, 5, seed=7)


def drawn_labels(monkeypatch, script, command: list[str], epochs: int) -> Counter:
    """Run a script; return how often its sampler draws each class in the first epochs."""
    made = []

    class RecordedSampler(EpochSampler):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            made.append(self)

    labels = []

    def recorded_groups(of_samples, balanced):
        labels.extend(of_samples)
        return class_groups(of_samples, balanced)

    with monkeypatch.context() as patch:
        patch.setattr(script, "EpochSampler", RecordedSampler)
        patch.setattr(script, "class_groups", recorded_groups)
        script.main(command)
    (sampler,) = made
    sampler.skip = 0
    sampler.set_updates(0, epochs * sampler.updates_per_epoch)
    return Counter(labels[index] for _, index in sampler)


def test_balanced_images_and_their_order_survive_a_stop(images, tmp_path, monkeypatch, capsys):
    train = unbalanced(tmp_path / "train", images)
    flags = [*BATCH, "--balanced", "--min_lr", "0.001", "--max_steps"]
    whole = image_command(train, tmp_path / "whole", *flags, "5")
    drawn = drawn_labels(monkeypatch, finetune_on_image, whole, epochs=4)
    assert drawn == {0: 12, 1: 12}  # of 4 x 6 of the 7 images
    printed = capsys.readouterr().out
    assert "--balanced: 2 classes of 2 to 5 samples, each of them 50 % of an epoch" in printed
    part = image_command(train, tmp_path / "part", *flags)
    finetune_on_image.main([*part, "2"])  # of three updates of an epoch
    finetune_on_image.main([*part, "5"])
    assert same(saved_weights(tmp_path / "part"), saved_weights(tmp_path / "whole"))
    capsys.readouterr()
    with pytest.raises(UserError, match=r"weighting of the samples: --balanced -> none") as raised:
        finetune_on_image.main([*part, "6", "--no-balanced"])
    assert "Restore the weighting, or pass --force_resume" in str(raised.value)


def test_shots_of_videos_are_the_runs_manifest(videos, tmp_path, capsys):
    flags = [*BATCH, "--shots", "2", "--max_steps"]
    finetune.main(video_command(videos, tmp_path, *flags, "1"))
    assert "--shots 2: 4 of 8 samples of 2 classes" in capsys.readouterr().out
    listed = read_manifest(tmp_path / "run_train.csv")
    assert sorted(listed.labels) == ["class_0", "class_0", "class_1", "class_1"]
    finetune.main(video_command(videos, tmp_path, *flags, "2"))
    assert read_manifest(tmp_path / "run_train.csv").paths == listed.paths
    assert saved_state(tmp_path)["data"]["samples"] == 4
    with pytest.raises(UserError, match=r"--shots is 3, but .*run_train.csv of .* made with 2"):
        finetune.main(video_command(videos, tmp_path, *BATCH, "--shots", "3"))
    fewer = ["--shots", "1", "--save_prefix", "fewer", *BATCH, "--max_steps", "1"]
    finetune.main(video_command(videos, tmp_path, *fewer))
    few = read_manifest(tmp_path / "fewer_train.csv").paths
    assert len(few) == 2
    assert set(few) < set(listed.paths)
