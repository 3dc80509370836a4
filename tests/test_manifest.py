"""Manifests: files found in folders, CSV files of any usual form, and classes."""

from pathlib import Path

import pytest

from data.manifest import (
    VIDEO_EXTENSIONS,
    check_classes,
    class_indices,
    class_names,
    find_labeled,
    find_videos,
    keep_fraction,
    keep_stratified,
    read_manifest,
    write_manifest,
)
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
    paths, labels = find_labeled(str(tmp_path), VIDEO_EXTENSIONS, "--train_dir")
    assert [Path(path).name for path in paths] == ["2.mp4", "3.mp4", "1.mp4"]
    assert labels == ["jump", "jump", "run"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="class folder .*empty has no files of .mp4"):
        find_labeled(str(tmp_path), VIDEO_EXTENSIONS, "--train_dir")
    with pytest.raises(UserError, match="--train_dir .*deep has no subfolders"):
        find_labeled(str(tmp_path / "run/deep"), VIDEO_EXTENSIONS, "--train_dir")


def test_fraction_keeps_the_first_and_rounds_up():
    paths = [str(index) for index in range(10)]
    assert keep_fraction(paths, 0.25) == ["0", "1", "2"]
    assert keep_fraction(paths, 1.0) == paths
    assert keep_fraction(paths, 0.001) == ["0"]


def test_t17_a_written_manifest_reads_back(tmp_path):
    names = ["plain", "with, comma", 'with "quote"', "with space", "ü"]
    paths = [f"/v/{name}.mp4" for name in names]
    labels = ["a", "NA", "None", "3", "b c"]
    write_manifest(tmp_path / "made/m.csv", paths, labels)
    assert read_manifest(tmp_path / "made/m.csv") == (paths, labels)
    write_manifest(tmp_path / "made/m.csv", paths)
    assert read_manifest(tmp_path / "made/m.csv") == (paths, [""] * 5)
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
    ],
)
def test_t17_all_usual_forms_are_the_same_manifest(tmp_path, text, encoding):
    assert read_manifest(write_text(tmp_path, text, encoding)) == TWO_ROWS


def test_t17_one_column_and_relative_paths(tmp_path):
    manifest = write_text(tmp_path, "sub/a clip.mp4\n../b.mp4\n/c.mp4\n")
    paths, labels = read_manifest(manifest)
    assert paths == [str(tmp_path / "sub/a clip.mp4"), str(tmp_path.parent / "b.mp4"), "/c.mp4"]
    assert labels == ["", "", ""]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("/v/a.mp4,x\n/v/b.mp4,y,z\n", "line 2: more than two fields"),
        ("/v/a.mp4,x\n,y\n", "line 2: no path"),
        ("/v/a.mp4,x\n\nconcat:a|b,y\n", "line 3: a URL or protocol"),
        ("/v/a.mp4,x\nhttp://host/b.mp4,y\n", "line 2: a URL"),
        ("/v/a.mp4,x\n/v/b.mp4,y,z,w,v\n", "line 2"),
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
    assert read_manifest(manifest) == (paths, labels)
    with open(manifest, "a") as file:
        file.write("\r\n/videos/a.mp4,x,y")
    with pytest.raises(UserError, match=f"line {NUM_ROWS + 2}: more than two fields"):
        read_manifest(manifest)


def test_a_missing_or_binary_manifest_is_an_error(tmp_path):
    with pytest.raises(UserError, match="none.csv not found"):
        read_manifest(tmp_path / "none.csv")
    with pytest.raises(UserError, match="list.csv cannot be read .*: give a text file in UTF-8"):
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


def test_t17_the_validation_set_must_have_the_training_classes():
    assert check_classes(["a", "b"], ["b", "a"], None, "VAL") == ["a", "b"]
    with pytest.raises(UserError, match="VAL: unknown class 'c'; .* 2 classes are a, b"):
        check_classes(["a", "b"], ["a", "b", "c"], None, "VAL")
    with pytest.raises(UserError, match="VAL: no validation samples of 1 .*'b'"):
        check_classes(["a", "b"], ["a"], None, "VAL")


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
