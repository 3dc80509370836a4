"""Manifests: files found in folders, CSV files of any usual form, and classes."""

import json
import math
import os
import random
import re
from pathlib import Path

import numpy as np
import pytest

from data.manifest import (
    VIDEO_EXTENSIONS,
    Samples,
    check_classes,
    class_indices,
    class_names,
    find_labeled,
    find_videos,
    keep_fraction,
    keep_stratified,
    read_manifest,
    unlabeled,
    walk,
    write_classes,
    write_manifest,
)
from util.class_names import read_class_names
from util.dist import UserError

TWO_ROWS = (["/v/a.mp4", "/v/b.mp4"], ["x", "y"])
NUM_ROWS = 500_000


def write_text(folder: Path, text: str, encoding: str = "utf-8") -> Path:
    """Write list.csv."""
    path = folder / "list.csv"
    path.write_bytes(text.encode(encoding))
    return path


def touch(folder: Path, *names: str) -> None:
    """Make files of one byte."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def test_videos_are_found_in_any_case_and_depth_sorted(tmp_path):
    touch(tmp_path, "b/two.MP4", "b/one.webm", "a/deep/er/three.MKV", "a/four.avi", "five.Mov")
    touch(tmp_path, "a/notes.txt", "a/.hidden.mp4", ".git/x.mp4")
    found = find_videos([str(tmp_path)], "--data_dirs")
    expected = ["five.Mov", "a/four.avi", "a/deep/er/three.MKV", "b/one.webm", "b/two.MP4"]
    assert [str(Path(path).relative_to(tmp_path)) for path in found] == expected


def test_links_to_a_folder_above_are_not_followed(tmp_path):
    inner = tmp_path / "videos" / "inner"
    inner.mkdir(parents=True)
    (tmp_path / "other").mkdir()
    for path in (inner / "a.mp4", tmp_path / "other" / "b.mp4"):
        path.touch()
    os.symlink(".", inner / "itself")
    os.symlink(tmp_path / "videos", inner / "above")
    os.symlink(tmp_path, inner / "root")
    os.symlink(tmp_path / "other", inner / "other")
    os.symlink(tmp_path / "videos", tmp_path / "other" / "back")
    found = walk(str(tmp_path / "videos"), (".mp4",))
    assert found == [str(inner / "a.mp4"), str(inner / "other" / "b.mp4")]


def found_names(folder: Path) -> list[str]:
    """Return the videos below a folder, relative to it, in the order of a walk."""
    return [str(Path(path).relative_to(folder)) for path in walk(str(folder), (".mp4",))]


@pytest.mark.parametrize(
    ("links", "expected"),
    [
        ({"loop": ".", "again": "."}, ["a/1.mp4", "b/2.mp4"]),
        ({"a/to_b": "../b", "b/to_a": "../a"}, ["a/1.mp4", "a/to_b/2.mp4"]),
        ({"b/to_deep": "../a/deep"}, ["a/1.mp4", "a/deep/3.mp4", "b/2.mp4"]),
        ({"z": "b", "A": "b"}, ["A/2.mp4", "a/1.mp4"]),
        ({"c": "OUTSIDE", "d": "OUTSIDE"}, ["a/1.mp4", "b/2.mp4", "c/4.mp4"]),
        ({"c": "OUTSIDE", "d": "OUTSIDE/inner"}, ["a/1.mp4", "b/2.mp4", "c/4.mp4"]),
    ],
    ids=["loops", "each other", "found before", "siblings", "outside", "outside and inside"],
)
def test_f02_each_real_folder_is_searched_once(links, expected, tmp_path, capsys):
    folder = tmp_path / "videos"
    touch(folder, "a/1.mp4", "b/2.mp4")
    if "a/deep/3.mp4" in expected:
        touch(folder, "a/deep/3.mp4")
    touch(tmp_path, "outside/4.mp4", "outside/inner/.hidden")
    for name, target in links.items():
        (folder / name).symlink_to(target.replace("OUTSIDE", str(tmp_path / "outside")))
    assert found_names(folder) == expected
    assert capsys.readouterr().out.count("folders are left out, since links lead to them") == 1


def test_f02_several_folders_have_each_real_folder_once(tmp_path, capsys):
    touch(tmp_path, "a/1.mp4", "a/deep/2.mp4", "b/3.mp4")
    (tmp_path / "b/to_a").symlink_to("../a")
    folders = [str(tmp_path / name) for name in ("a/deep", "b", "a")]
    found = find_videos(folders, "--data_dirs")
    assert [str(Path(path).relative_to(tmp_path)) for path in found] == [
        "a/deep/2.mp4",
        "b/3.mp4",
        "b/to_a/1.mp4",
    ]
    shown = f"note: 2 folders are left out, .* (first: {tmp_path}/b/to_a/deep)"
    assert re.search(re.escape(shown).replace(re.escape(".*"), ".*"), capsys.readouterr().out)
    assert find_videos([str(tmp_path / "a")], "--data_dirs") != []
    assert "left out" not in capsys.readouterr().out


def test_f02_links_between_classes_change_no_label(tmp_path, capsys):
    touch(tmp_path, "cat/1.mp4", "dog/2.mp4")
    (tmp_path / "cat/friend").symlink_to("../dog")
    samples = find_labeled(str(tmp_path), VIDEO_EXTENSIONS, "--train_dir")
    assert [Path(path).name for path in samples.paths] == ["1.mp4", "2.mp4"]
    assert samples.labels == ["cat", "dog"]
    assert f"(first: {tmp_path}/cat/friend)" in capsys.readouterr().out
    (tmp_path / "hound").symlink_to("dog")
    with pytest.raises(UserError, match="class folders dog and hound in .* are one folder"):
        find_labeled(str(tmp_path), VIDEO_EXTENSIONS, "--train_dir")
    (tmp_path / "hound").unlink()
    (tmp_path / "loop").symlink_to(".")
    with pytest.raises(UserError, match="class folder .*loop has no files"):
        find_labeled(str(tmp_path), VIDEO_EXTENSIONS, "--train_dir")


def test_folders_keep_their_order(tmp_path):
    touch(tmp_path, "b/one.webm", "a/two.mp4")
    found = find_videos([str(tmp_path / "b"), str(tmp_path / "a")], "--data_dirs")
    assert [Path(path).name for path in found] == ["one.webm", "two.mp4"]


@pytest.mark.parametrize("flag", ["--data_dirs", "--val_dirs"])
def test_errors_about_folders_name_the_flag_that_was_given(tmp_path, flag):
    touch(tmp_path, "file")
    with pytest.raises(UserError, match=f"no videos below .*: check {flag} .*mp4"):
        find_videos([str(tmp_path)], flag)
    with pytest.raises(UserError, match=f"nowhere' not found: check {flag}"):
        find_videos([str(tmp_path / "nowhere")], flag)
    with pytest.raises(UserError, match=f"{flag} .*file is not a folder"):
        find_videos([str(tmp_path / "file")], flag)


def test_subfolders_are_classes(tmp_path):
    touch(tmp_path, "run/deep/1.mp4", "jump/2.mp4", "jump/3.mp4", ".git/4.mp4")
    paths, labels, *_ = find_labeled(str(tmp_path), VIDEO_EXTENSIONS, "--train_dir")
    assert [Path(path).name for path in paths] == ["2.mp4", "3.mp4", "1.mp4"]
    assert labels == ["jump", "jump", "run"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="class folder .*empty has no files of .mp4"):
        find_labeled(str(tmp_path), VIDEO_EXTENSIONS, "--train_dir")
    with pytest.raises(UserError, match="--train_dir .*deep has no subfolders"):
        find_labeled(str(tmp_path / "run/deep"), VIDEO_EXTENSIONS, "--train_dir")


def test_fraction_keeps_the_first_and_rounds_up():
    paths = [str(index) for index in range(10)]
    spans = np.arange(20.0).reshape(10, 2)
    kept = keep_fraction(Samples(paths, paths, spans), 0.25)
    assert kept.paths == kept.labels == ["0", "1", "2"]
    assert kept.spans.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert keep_fraction(unlabeled(paths), 0.01) == unlabeled(["0"])
    assert keep_fraction(unlabeled(paths), 1) == unlabeled(paths)


def test_t17_a_written_manifest_reads_back(tmp_path):
    names = ["plain", "with, comma", 'with "quote"', "with space", "ü"]
    paths = [f"/v/{name}.mp4" for name in names]
    labels = ["a", "NA", "None", "3", "b c"]
    write_manifest(tmp_path / "made/m.csv", Samples(paths, labels))
    assert read_manifest(tmp_path / "made/m.csv")[:2] == (paths, labels)
    write_manifest(tmp_path / "made/m.csv", unlabeled(paths))
    assert read_manifest(tmp_path / "made/m.csv")[:2] == (paths, [""] * 5)
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["m.csv"]


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("/v/a.mp4,x\n/v/b.mp4,y\n", "utf-8"),
        ("path,label\n/v/a.mp4,x\n/v/b.mp4,y", "utf-8"),
        ("/v/a.mp4 x\n/v/b.mp4 y\n", "utf-8"),
        ("video\tclass\n/v/a.mp4\tx\n/v/b.mp4\ty\n", "utf-8"),
        ("/v/a.mp4, x\r\n\r\n/v/b.mp4, y\r\n", "utf-8"),
        ('"/v/a.mp4","x"\n"/v/b.mp4","y"\n', "utf-8-sig"),
        ("/v/a.mp4;x\n/v/b.mp4;y\n", "utf-8"),
        ("path;label\r\n/v/a.mp4; x\r\n/v/b.mp4; y\r\n", "utf-8"),
        ("/v/a.mp4   x\n  /v/b.mp4  y  \n", "utf-8"),
        ('"/v/a.mp4"  x\n"/v/b.mp4" y\n', "utf-8"),
        ("path label\n/v/a.mp4 x\n/v/b.mp4 y\n", "utf-8"),
        ("/v/a.mp4\tx\r/v/b.mp4\ty\r", "utf-8"),
    ],
)
def test_t17_all_usual_forms_are_the_same_manifest(tmp_path, text, encoding):
    assert read_manifest(write_text(tmp_path, text, encoding))[:2] == TWO_ROWS


def test_t17_one_column_and_relative_paths(tmp_path):
    manifest = write_text(tmp_path, "sub/a clip.mp4\n../b.mp4\n/c.mp4\n")
    paths, labels, *_ = read_manifest(manifest)
    assert paths == [str(tmp_path / "sub/a clip.mp4"), str(tmp_path.parent / "b.mp4"), "/c.mp4"]
    assert labels == ["", "", ""]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("/v/a.mp4,x\n/v/b.mp4,y,z\n", "line 2: too many fields"),
        ("/v/a.mp4,x\n,y\n", "line 2: no path"),
        ("/v/a.mp4,x\n\nconcat:a|b,y\n", "line 3: a URL or protocol"),
        ("/v/a.mp4,x\nhttp://host/b.mp4,y\n", "line 2: a URL"),
        ("/v/a.mp4,x\n/v/b.mp4,y,z,w,v\n", "line 2"),
        ("/v/a,0,90\n", "line 1: two numbers after the path, as in VideoMAE's lists of frame"),
        ("/v/a 0 90\n/v/b 1 30\n", "line 1: two numbers after the path"),
        ("/v/a.mp4,x,1,\n/v/b.mp4,y,9\n", "line 1: too many fields"),
        ("/v/a.mp4,x,3,3\n", "line 1: the start must be 0 or more, and before the end"),
        ("/v/a.mp4,x,nan,3\n", "line 1: the start must be 0 or more"),
        ("path,end\n/v/a.mp4,1:30\n", "line 2: start and end must be seconds, such as 12.5"),
        ("path,start\n/v/a.mp4,-1\n", "line 2: the start must be 0 or more"),
        ("path,label,fold\n/v/a.mp4,x,1\n", "column 'fold' of its header is unknown"),
        ("path,start,start\n/v/a.mp4,1,2\n", "column 'start' of its header is unknown or occurs"),
        ('/v/a.mp4,x\n"/v/b.mp4,y\n/v/c.mp4,z\n', "line 2: unexpected end of data"),
        ('"/v/a.mp4" b,x\n', "line 1: ',' expected after '\"'"),
        ("/v/a.mp4,x\x00", "binary or in UTF-16"),
        ("path,label\n", "no videos"),
        ("", "empty"),
        ("\n\n", "empty"),
    ],
)
def test_t17_malformed_rows_are_named_by_file_and_line(tmp_path, text, message):
    with pytest.raises(UserError, match="list.csv") as raised:
        read_manifest(write_text(tmp_path, text))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_t17_half_a_million_rows_and_duplicates_are_read(tmp_path):
    paths = [f"/videos/{row % (NUM_ROWS - 1):06d}.mp4" for row in range(NUM_ROWS)]
    labels = [("NA", "None", "null", "007", "1e3")[row % 5] for row in range(NUM_ROWS)]
    rows = [f"{path},{label}" for path, label in zip(paths, labels, strict=True)]
    manifest = write_text(tmp_path, "\r\n".join(["path,label", *rows]), "utf-8-sig")
    assert read_manifest(manifest)[:2] == (paths, labels)
    with open(manifest, "a") as file:
        file.write("\r\n/videos/a.mp4,x,y")
    with pytest.raises(UserError, match=f"line {NUM_ROWS + 2}: too many fields"):
        read_manifest(manifest)


def test_semicolons_and_spaces_in_one_column_are_names(tmp_path):
    for names in (["a;b.mp4", "c;d.mp4"], ["a b.mp4", "c d.mp4"], ["a 0 9.mp4"], ["a;b c.webm"]):
        manifest = write_text(tmp_path, "\n".join(f"/v/{name}" for name in names))
        assert read_manifest(manifest)[:2] == ([f"/v/{name}" for name in names], [""] * len(names))


def test_labels_may_hold_other_separators(tmp_path):
    for text in (
        "/v/a.mp4\tpour, slowly\n/v/b.mp4\ttilt\n",
        "/v/a.mp4\tpour, slowly\n/v/b.mp4\ttilt, fast\n",
        "path;label\n/v/a.mp4;pour, slowly\n",
        "video\tclass\n/v/a.mp4\tpour, slowly\n",
    ):
        labels = read_manifest(write_text(tmp_path, text)).labels
        assert labels[0] == "pour, slowly"


def test_videomae_v2_lists_of_videos_have_no_labels(tmp_path):
    manifest = write_text(tmp_path, "/v/a.mp4 0 -1\n/v/c.mp4 0 -1\n")
    assert read_manifest(manifest)[:2] == (["/v/a.mp4", "/v/c.mp4"], ["", ""])


@pytest.mark.parametrize("header", ["clip_path,label", "video_name,tag", "Video Name;Tag", "clips"])
def test_f19_unknown_headers_are_told_by_the_files(header, tmp_path, capsys):
    touch(tmp_path, "a.mp4", "b.mp4")
    separator = ";" if ";" in header else ","
    rows = [f"{name}.mp4{separator}{label}" for name, label in (("a", "x"), ("b", "y"))]
    manifest = write_text(tmp_path, "\n".join([header, *rows]))
    expected = [str(tmp_path / "a.mp4"), str(tmp_path / "b.mp4")], ["x", "y"]
    assert read_manifest(manifest)[:2] == expected
    (note,) = capsys.readouterr().out.splitlines()
    assert "is read as a header" in note
    manifest.write_text("\n".join(rows))
    assert read_manifest(manifest)[:2] == expected
    assert capsys.readouterr().out == ""


def test_a_missing_video_is_no_header(tmp_path):
    touch(tmp_path, "b.mp4", "folder/c.mp4")
    for text in ("a.mp4,x\nb.mp4,y\n", "a,x\nb,y\n", "folder,x\nb.mp4,y\n"):
        assert read_manifest(write_text(tmp_path, text))[1] == ["x", "y"]


def test_f19_whole_numbers_are_numbers_however_written(tmp_path):
    manifest = write_text(tmp_path, "a.mp4,10.0\nb.mp4,2.00\nc.mp4,3\nd.mp4,\n")
    assert read_manifest(manifest)[1] == ["10", "2", "3", ""]
    assert read_manifest(write_text(tmp_path, "a.mp4 3.0\nb.mp4 0.\n"))[1] == ["3", "0"]
    for labels in (["1.0", "1.5"], ["007", "2"], ["1.0", "x"], ["1e3", "2.0"]):
        text = "".join(f"a.mp4,{label}\n" for label in labels)
        assert read_manifest(write_text(tmp_path, text))[1] == labels


def test_numbers_that_are_no_indices_are_names():
    assert class_names(["20261126123000", "7"]) == ["20261126123000", "7"]


def random_name(draw: random.Random, alphabet: list[bytes]) -> str:
    """Return a file name that the file system allows and that ends in .mp4."""
    length = draw.randint(1, 12)
    name = b"".join(draw.choice(alphabet) for _ in range(length))
    return os.fsdecode(name + b".mp4")


HARD_PARTS = [bytes([byte]) for byte in range(1, 256) if byte != ord("/")]
USUAL_PARTS = [b"a", b" ", b",", b";", b"\t", b'"', b"'", b"\r", b"\n", b"\xff", b"0", b":", b"\\"]
UNICODE_PARTS = [c.encode() for c in " a\xa0\x85\u2028\ufeffü\u3000,"]


@pytest.mark.parametrize("alphabet", [HARD_PARTS, USUAL_PARTS, UNICODE_PARTS])
def test_f06_every_name_reads_back_and_opens(alphabet, tmp_path):
    draw = random.Random(0)
    for trial in range(40):
        folder = tmp_path / str(trial) / random_name(draw, alphabet)
        folder.mkdir(parents=True)
        names = {random_name(draw, alphabet) for _ in range(draw.randint(1, 6))}
        names = {name for name in names if not name.startswith(".")}
        touch(folder, "plain.mp4", *names)
        found = find_videos([str(folder)], "--data_dirs")
        assert len(found) == len(names) + 1
        labels = [random_name(draw, alphabet) for _ in found]
        for given in (None, labels):
            write_manifest(tmp_path / "m.csv", Samples(found, given or [""] * len(found)))
            assert read_manifest(tmp_path / "m.csv")[:2] == (found, given or [""] * len(found))
        assert all(Path(path).read_bytes() == b"x" for path in read_manifest(tmp_path / "m.csv")[0])


def test_spaces_around_a_written_label_are_kept(tmp_path):
    write_manifest(tmp_path / "m.csv", Samples(["/v/a.mp4"], [" a "]))
    assert read_manifest(tmp_path / "m.csv")[:2] == (["/v/a.mp4"], [" a "])


def test_usual_names_are_written_without_quotes(tmp_path):
    write_manifest(tmp_path / "m.csv", Samples(["/v/a b;c.mp4", '/v/a"b,ü.mp4'], ["1", "x y"]))
    written = 'path,label\n/v/a b;c.mp4,1\n"/v/a""b,ü.mp4",x y\n'
    assert (tmp_path / "m.csv").read_text(encoding="utf-8") == written


def test_foreign_bytes_are_the_name_of_a_file_or_an_error(tmp_path):
    name = os.fsdecode("ü.mp4".encode("latin-1"))
    touch(tmp_path, name)
    assert read_manifest(write_text(tmp_path, "ü.mp4,x\n", "latin-1"))[0] == [str(tmp_path / name)]
    with pytest.raises(UserError, match="list.csv, line 2: not UTF-8") as raised:
        read_manifest(write_text(tmp_path, "ü.mp4,x\na.mp4,ü\n", "latin-1"))
    assert str(raised.value).isprintable()


def test_class_names_of_any_bytes_read_back(tmp_path):
    classes = ["a\nb", os.fsdecode(b"\xff"), "ü", 'a "b"', "\t"]
    write_classes(tmp_path / "classes.json", classes)
    assert json.loads((tmp_path / "classes.json").read_text(encoding="utf-8")) == classes
    assert read_class_names(tmp_path / "classes.json") == classes


def test_a_missing_or_binary_manifest_is_an_error(tmp_path):
    with pytest.raises(UserError, match="none.csv not found"):
        read_manifest(tmp_path / "none.csv")
    with pytest.raises(UserError, match="list.csv, line 1: not UTF-8, nor the name of a file"):
        read_manifest(write_text(tmp_path, "/v/ü.mp4", "latin-1"))


def test_class_names_are_sorted_and_whole_numbers_are_indices():
    assert class_names(["run", "jump", "run"]) == ["jump", "run"]
    assert class_names(["10", "2", "0"]) == [str(index) for index in range(11)]
    assert class_names(["007", "2"]) == ["007", "2"]
    assert class_indices(["2", "0"], class_names(["10", "2", "0"]), "x") == [2, 0]


def test_a_label_that_names_several_classes_is_refused():
    classes = ["crane", "dog", "crane"]  # as in ImageNet's list: a bird and a machine
    assert class_indices(["dog", "dog"], classes, "x") == [1, 1]
    with pytest.raises(UserError, match="x: 'crane' is the name of several classes"):
        class_indices(["dog", "crane"], classes, "x")


def test_t17_the_validation_set_has_the_classes_of_training(capsys):
    assert check_classes(["a", "b"], ["b", "a"], None, "VAL") == ["a", "b"]
    with pytest.raises(UserError, match="VAL: unknown class 'c'; .* 2 classes are a, b"):
        check_classes(["a", "b"], ["a", "b", "c"], None, "VAL")
    assert capsys.readouterr().out == ""


def test_f12_a_validation_set_may_lack_classes(capsys):
    assert check_classes(["a", "b", "c"], ["a"], None, "VAL") == ["a", "b", "c"]
    assert "note: VAL has no samples of 2 training classes (first: 'b')" in capsys.readouterr().out


def test_known_class_names_keep_their_order():
    assert check_classes(["a", "b"], ["b", "a"], ["c", "b", "a"], "VAL") == ["c", "b", "a"]
    with pytest.raises(UserError, match="the training set: unknown class 'a'; .* classes are b"):
        check_classes(["a", "b"], ["b"], ["b"], "VAL")


def test_a_stratified_part_is_the_same_for_the_same_seed():
    labels = [0] * 10 + [1] * 3 + [2]
    kept = keep_stratified(labels, 0.3, seed=1)
    classes = [labels[index] for index in kept]
    assert [classes.count(label) for label in range(3)] == [3, 1, 1]
    assert kept == keep_stratified(labels, 0.3, seed=1)
    assert kept != keep_stratified(labels, 0.3, seed=2)
    assert keep_stratified(labels, 1.0, seed=1) == list(range(14))


SPANS_FORMS = [
    "path,label,start,end\n/v/a.mp4,x,0,2.5\n/v/a.mp4,y,2.5,\n/v/b.mp4,x,,\n",
    "start,end,label,path\n0,2.5,x,/v/a.mp4\n2.5,,y,/v/a.mp4\n,,x,/v/b.mp4\n",
    "Label;Start;Path;End\nx;0.0;/v/a.mp4;2.50\ny;2.5;/v/a.mp4\nx;;/v/b.mp4\n",
    "video\tend\tstart\tclass\n/v/a.mp4\t2.5\t0\tx\n/v/a.mp4\t\t2.5\ty\n/v/b.mp4\t\t\tx\n",
    "/v/a.mp4,x,0,2.5\n/v/a.mp4,y,2.5,inf\n/v/b.mp4,x\n",
    "/v/a.mp4 x 0 2.5\n/v/a.mp4 y 2.5 1e400\n/v/b.mp4 x 0 inf\n",
]


@pytest.mark.parametrize("text", SPANS_FORMS)
def test_rows_may_be_parts_of_videos_in_any_column_order(text, tmp_path):
    samples = read_manifest(write_text(tmp_path, text))
    assert samples.paths == ["/v/a.mp4", "/v/a.mp4", "/v/b.mp4"]
    assert samples.labels == ["x", "y", "x"]
    assert samples.spans.tolist() == [[0, 2.5], [2.5, math.inf], [0, math.inf]]


def test_parts_of_videos_are_written_and_read_back_equal(tmp_path):
    spans = np.array([[0, 1 / 3], [1e-9, math.inf], [0, math.inf], [0.1 + 0.2, 1e6]])
    paths = ["/v/a b,c.mp4", "/v/\n.mp4", "/v/d.mp4", "/v/d.mp4"]
    for labels in (["x", "", "z", "2"], [""] * 4):
        write_manifest(tmp_path / "m.csv", Samples(paths, labels, spans))
        read = read_manifest(tmp_path / "m.csv")
        assert read[:2] == (paths, labels)
        assert np.array_equal(read.spans, spans)


def test_a_manifest_of_whole_files_has_no_parts(tmp_path):
    assert read_manifest(write_text(tmp_path, "path,start,end\n/v/a.mp4,,\n")).spans is None
    assert read_manifest(write_text(tmp_path, "path,start,end\n/v/a.mp4,0,inf\n")).spans is None


def test_an_image_has_no_parts(tmp_path):
    header = "path,start,end\n"
    manifest = write_text(tmp_path, f"{header}/v/a.JPG,,\n/v/a.mp4,1,2\n/v/b.png,0,\n")
    assert read_manifest(manifest).spans.tolist() == [[0, math.inf], [1, 2], [0, math.inf]]
    with pytest.raises(UserError, match=r"line 3: an image has no start and end .*b.png,1,2"):
        read_manifest(write_text(tmp_path, f"{header}/v/a.mp4,1,2\n/v/b.png,1,2\n"))
