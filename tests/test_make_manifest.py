"""Official annotation files become manifests."""

import json

import pytest

from data.manifest import read_manifest
from tools.make_manifest import main
from util.dist import UserError


@pytest.fixture
def videos(tmp_path):
    """Return a folder of files that are named like the videos of the data sets."""
    folder = tmp_path / "videos"
    (folder / "deep").mkdir(parents=True)
    for name in ("abc_000010_000020.mp4", "deep/xyz.mkv", "7.webm", "8.webm"):
        (folder / name).write_bytes(b"x")
    return folder


@pytest.fixture
def kinetics(tmp_path):
    """Return an annotation file of Kinetics whose last video is missing."""
    path = tmp_path / "train.csv"
    path.write_text(
        "label,youtube_id,time_start,time_end,split\n"
        'running,abc,10,20,train\n"a, b",xyz,1,2,train\nlost,gone,3,13,train\n'
    )
    return path


def test_kinetics_files_are_found_by_id_and_times_or_id(kinetics, videos, tmp_path, capsys):
    main(["--from", "kinetics", str(kinetics), str(videos), str(tmp_path / "k.csv")])
    assert "2 of 3 videos, 3 classes" in capsys.readouterr().out
    assert read_manifest(tmp_path / "k.csv") == (
        [str(videos / "abc_000010_000020.mp4"), str(videos / "deep/xyz.mkv")],
        ["running", "a, b"],
    )


def test_kinetics_annotations_need_no_times(videos, tmp_path):
    annotations = tmp_path / "train.csv"
    annotations.write_text("label,youtube_id\nNA,xyz\n")
    main(["--from", "kinetics", str(annotations), str(videos), str(tmp_path / "k.csv")])
    assert read_manifest(tmp_path / "k.csv") == ([str(videos / "deep/xyz.mkv")], ["NA"])


def test_missing_videos_are_listed(kinetics, videos, tmp_path):
    main(["--from", "kinetics", str(kinetics), str(videos), str(tmp_path / "k.csv")])
    listed = (tmp_path / "k.missing.csv").read_text().splitlines()
    assert listed == ["id,label", "gone_000003_000013,lost"]


def test_ssv2_labels_are_templates_without_brackets(videos, tmp_path):
    annotations = tmp_path / "train.json"
    records = [
        {"id": "7", "label": "x", "template": "Holding [something]"},
        {"id": "8", "template": "Poking [a hole]"},
    ]
    annotations.write_text(json.dumps(records))
    main(["--from", "ssv2", str(annotations), str(videos), str(tmp_path / "s.csv")])
    assert read_manifest(tmp_path / "s.csv") == (
        [str(videos / "7.webm"), str(videos / "8.webm")],
        ["Holding something", "Poking a hole"],
    )
    assert not (tmp_path / "s.missing.csv").exists()


@pytest.mark.parametrize(
    ("source", "text", "message"),
    [
        ("ssv2", '[{"video": "7"}]', "have no id, template"),
        ("ssv2", "[{", "cannot be read"),
        ("kinetics", "label,video\nrun,abc\n", "have no youtube_id"),
        ("kinetics", "", "cannot be read"),
        ("kinetics", "label,youtube_id\nrun,none\n", "none of the 1 videos"),
    ],
)
def test_bad_annotations_are_one_line(source, text, message, videos, tmp_path):
    annotations = tmp_path / "annotations"
    annotations.write_text(text)
    with pytest.raises(UserError, match=message) as raised:
        main(["--from", source, str(annotations), str(videos), str(tmp_path / "m.csv")])
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "m.csv").exists()
