"""Mixtures: sources of videos with shares of an epoch and frame spacings of their own."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_dataset import clip_dataset
from runs import PRETRAIN_FLAGS, output_flags, saved_weights
from tiny import same

import finetune
import pretrain
from data.clips import ClipSampling
from data.manifest import (
    NO_SPAN,
    Samples,
    find_videos,
    keep_fraction,
    read_manifest,
    unlabeled,
    write_manifest,
)
from data.mixtures import check_mixture, join_sources, print_mixture, source_groups
from data.samplers import EpochSampler
from tools.reading import CLIP_FLAGS, add_clip_flags, parse_again
from util.args import parse
from util.checkpoint import load
from util.cli import Parser
from util.dist import UserError
from util.model_flags import find_start

MIXTURE = "--batch_size_per_gpu 2 --data_weights 3 1 --sampling_rate 1 3 --min_lr 0.001".split()


@pytest.fixture(scope="module")
def lists(videos, tmp_path_factory) -> list[str]:
    """Return manifests of two and of six videos."""
    folder = tmp_path_factory.mktemp("lists")
    paths = find_videos([videos], "--data_dirs")
    for name, part in (("few", paths[:2]), ("many", paths[2:])):
        (folder / f"{name}.csv").write_text("".join(f"{path}\n" for path in part))
    return [str(folder / "few.csv"), str(folder / "many.csv")]


def mixture_command(lists: list[str], out: Path, *more: str) -> list[str]:
    """Return a small pretraining command line on two manifests."""
    data = ["--data_csv", *lists, "--save_prefix", "run"]
    return [*PRETRAIN_FLAGS, *data, *output_flags(out), *MIXTURE, *more]


def test_a_mixture_has_its_shares_and_survives_a_stop(lists, tmp_path, monkeypatch, capsys):
    made = []

    class RecordedSampler(EpochSampler):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            made.append(self)

    monkeypatch.setattr(pretrain, "EpochSampler", RecordedSampler)
    pretrain.main(mixture_command(lists, tmp_path / "whole", "--max_steps", "6"))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("source ")]
    assert lines == [
        "source 1: 2 samples, 75 % of an epoch (6.0 of 8), each used 3 times, sampling rate 1",
        "source 2: 6 samples, 25 % of an epoch (2.0 of 8), each used 0.333 times, sampling rate 3",
    ]
    made[0].skip = 0
    made[0].set_updates(0, 3 * 4)  # three epochs
    used = Counter(index for _, index in made[0])
    assert used == Counter({index: 9 if index < 2 else 1 for index in range(8)})

    pretrain.main(mixture_command(lists, tmp_path / "part", "--max_steps", "3"))
    listed = read_manifest(tmp_path / "part/run_train.csv")
    assert listed.sources.tolist() == [0, 0, 1, 1, 1, 1, 1, 1]
    pretrain.main(mixture_command(["gone", "too"], tmp_path / "part", "--max_steps", "6"))
    assert same(saved_weights(tmp_path / "part"), saved_weights(tmp_path / "whole"))


def test_each_source_is_read_at_its_own_rate(videos):
    paths = find_videos([videos], "--data_dirs")
    mixed = clip_dataset(paths, sources=np.array([0, 1] * 4), sampling_rates=[1, 3])
    for index in (4, 5):
        alone = clip_dataset(paths, sampling=ClipSampling(4, [1, 3][index % 2]))
        other = clip_dataset(paths, sampling=ClipSampling(4, [3, 1][index % 2]))
        clips = mixed[0, index]["clips"]
        assert torch.equal(clips, alone[0, index]["clips"])
        assert not torch.equal(clips, other[0, index]["clips"])


def test_other_weights_are_refused_and_rates_come_from_the_checkpoint(lists, tmp_path, capsys):
    command = mixture_command(lists, tmp_path, "--max_steps", "1")
    pretrain.main(command)
    where = command.index("--data_weights")
    message = r"weighting of the samples: --data_weights 3 1 -> --data_weights 1 3"
    with pytest.raises(UserError, match=message):
        pretrain.main([*command[:where], "--data_weights", "1", "3", *command[where + 3 :]])
    rates = command.index("--sampling_rate", where)
    without_rates = [*command[:rates], *command[rates + 3 :]]
    first = without_rates.index("--sampling_rate")
    without_rates[first : first + 2] = []
    without_rates[without_rates.index("--max_steps") + 1] = "2"
    capsys.readouterr()
    pretrain.main(without_rates)
    assert ", every 1 3 frames at 30 fps" in capsys.readouterr().out
    assert load(tmp_path / "run.pth")["args"]["sampling_rate"] == [1, 3]

    flags = ["--output_dir", str(tmp_path / "ft"), "--finetune", str(tmp_path / "run.pth")]
    args, given = parse(finetune.get_parser(), flags)
    find_start(args, given, args.finetune)
    assert args.sampling_rate == 2  # the script's default
    note = f"note: {tmp_path}/run.pth was trained at --sampling_rate 1 3, this run is at 2"
    assert note in capsys.readouterr().out


def test_tools_name_the_rate_that_they_use(capsys):
    parser = Parser("", prog="tool")
    add_clip_flags(parser)
    recorded = {"sampling_rate": [1, 3], "target_fps": 25.0}
    assert parse_again(parser, [], recorded, CLIP_FLAGS).sampling_rate == 4
    assert "--sampling_rate 1 3, videos are read here at 4" in capsys.readouterr().out
    assert parse_again(parser, [], recorded | {"sampling_rate": 3}, CLIP_FLAGS).sampling_rate == 3
    assert capsys.readouterr().out == ""


def test_a_mixture_without_weights_is_a_concatenation(lists, videos, tmp_path):
    flags = [*PRETRAIN_FLAGS, *"--save_prefix run --batch_size_per_gpu 2 --max_steps 2".split()]
    pretrain.main([*flags, "--data_csv", *lists, *output_flags(tmp_path / "lists")])
    pretrain.main([*flags, "--data_dirs", videos, *output_flags(tmp_path / "folder")])
    assert same(saved_weights(tmp_path / "lists"), saved_weights(tmp_path / "folder"))
    manifests = [tmp_path / name / "run_train.csv" for name in ("lists", "folder")]
    assert manifests[0].read_text() == manifests[1].read_text()
    for more in ("--data_weights", "--sampling_rate"):
        with pytest.raises(UserError, match=r"lists/run_train.csv of the resumed run has none"):
            command = [*flags, "--data_csv", *lists, *output_flags(tmp_path / "lists")]
            pretrain.main([*command, more, "1", "2"])


@pytest.mark.parametrize(
    ("weights", "rates", "message"),
    [
        (
            [1.0],
            [4],
            "--data_weights 1: 1 values, but the number of sources in LISTS is 2. Give one",
        ),
        (
            [1.0, 2.0, 0.5],
            [4],
            "--data_weights 1 2 0.5: 3 values, but the number of sources in LISTS is 2",
        ),
        ([], [4, 4, 8], "--sampling_rate 4 4 8: 3 values, but the number of sources in LISTS is 2"),
    ],
)
def test_each_source_has_one_weight_and_one_rate(weights, rates, message):
    with pytest.raises(UserError) as raised:
        check_mixture(2, weights, rates, "LISTS")
    assert str(raised.value).startswith(message)


def test_the_part_that_is_used_is_that_of_each_source(lists, videos):
    flags = ["--data_frac", "0.5", "--data_csv", *lists]
    for more, counts in ((["--data_weights", "1", "2"], [1, 3]), ([], [4])):
        args = pretrain.get_parser().parse_args([*flags, *more])
        kept = keep_fraction(pretrain.find_training_samples(args), args.data_frac)
        sources = [0] * len(kept.paths) if kept.sources is None else kept.sources.tolist()
        assert np.bincount(sources).tolist() == counts
    folders = sorted(str(folder) for folder in Path(videos).iterdir())
    args = pretrain.get_parser().parse_args(["--data_dirs", *folders, "--sampling_rate", "2", "4"])
    found = pretrain.find_training_samples(args)
    assert found.paths == find_videos(folders, "--data_dirs")
    assert found.sources.tolist() == [0] * 4 + [1] * 4


def test_sources_of_parts_and_whole_files_are_joined_and_read_back(tmp_path):
    parts = Samples(["/v/long.mp4"] * 2, ["x", ""], np.array([[0, 1.5], [1.5, 9]]))
    joined = join_sources([parts, unlabeled(["/v/a.mp4"])])
    write_manifest(tmp_path / "m.csv", joined)
    for samples in (joined, read_manifest(tmp_path / "m.csv")):
        assert samples.paths == ["/v/long.mp4", "/v/long.mp4", "/v/a.mp4"]
        assert samples.labels == ["x", "", ""]
        assert samples.spans.tolist() == [[0, 1.5], [1.5, 9], list(NO_SPAN)]
        assert samples.sources.tolist() == [0, 0, 1]
        assert samples.select([2, 0]).sources.tolist() == [1, 0]
    for text in ("path,source\na.mp4,0\nb.mp4,2\n", "path,source\na.mp4,0\nb.mp4,\n"):
        (tmp_path / "m.csv").write_text(text)
        with pytest.raises(UserError, match=r"m.csv: source '2?' is not one of the numbers 0 to 1"):
            read_manifest(tmp_path / "m.csv")
    (tmp_path / "m.csv").write_text("a.mp4,x,0,1,0\n")  # only a header names sources
    with pytest.raises(UserError, match="too many fields"):
        read_manifest(tmp_path / "m.csv")


def test_substitutes_come_from_the_same_source(videos, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.touch()
    paths = find_videos([videos], "--data_dirs")
    sources = np.array([0, 1, 0, 1, 0, 1, 0, 1, 1])
    mixed = clip_dataset([*paths, str(broken)], sources=sources, sampling_rates=[1, 1])
    used = {mixed[epoch, 8]["path"] for epoch in range(12)}
    assert used == {paths[index] for index in (1, 3, 5, 7)}


def test_a_source_without_a_sample_in_an_epoch_is_an_error(capsys):
    sources = np.array([0] * 6 + [1] * 2)
    with pytest.raises(UserError, match=r"--data_weights 0.01 gives source 2 0.079 of the 8 samp"):
        print_mixture(sources, source_groups(sources, [1.0, 0.01]), 8, [4])
    with pytest.raises(UserError, match=r"--data_weights 2 has no effect, because LIST has one"):
        check_mixture(1, [2.0], [4], "LIST")
    print_mixture(None, None, 8, [4])
    capsys.readouterr()
    print_mixture(sources, source_groups(sources, []), 4, [4, 8])
    assert capsys.readouterr().out.splitlines() == [
        "source 1: 6 samples, 75 % of an epoch (3.0 of 4), each used 0.5 times, sampling rate 4",
        "source 2: 2 samples, 25 % of an epoch (1.0 of 4), each used 0.5 times, sampling rate 8",
    ]
    assert source_groups(sources, []) is None
