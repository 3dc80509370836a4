"""Folders and CSV files to manifests."""

import pytest

from data.index import find_videos, keep_fraction, read_manifest, write_manifest
from util.dist import UserError


def manifest(tmp_path, text, encoding="utf-8"):
    """A file with this text."""
    path = tmp_path / "list.csv"
    path.write_bytes(text.encode(encoding))
    return path


def test_find_videos_in_any_case_and_depth_sorted(tmp_path):
    for name in ("b/two.MP4", "b/one.webm", "a/deep/er/three.MKV", "a/four.avi", "five.Mov", "a/notes.txt", "a/.hidden.mp4", ".git/x.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = [path[len(str(tmp_path)) + 1 :] for path in find_videos([str(tmp_path)])]
    assert found == ["five.Mov", "a/four.avi", "a/deep/er/three.MKV", "b/one.webm", "b/two.MP4"]
    assert find_videos([str(tmp_path / "b"), str(tmp_path / "a")])[0].endswith("b/one.webm")


def test_no_videos_and_no_folder_are_named(tmp_path):
    with pytest.raises(UserError, match="no videos below .*mp4"):
        find_videos([str(tmp_path)])
    with pytest.raises(UserError, match="nowhere"):
        find_videos([str(tmp_path / "nowhere")])


def test_fraction_keeps_the_first_and_rounds_up():
    paths = [str(i) for i in range(10)]
    assert keep_fraction(paths, 0.25) == ["0", "1", "2"]
    assert keep_fraction(paths, 1.0) == paths
    assert keep_fraction(paths, 0.001) == ["0"]


def test_written_manifest_reads_back(tmp_path):
    paths = ["/v/plain.mp4", "/v/with, comma.mp4", '/v/with "quote".mp4', "/v/with space.mp4", "/v/ü.mp4"]
    labels = ["a", "NA", "None", "3", "b c"]
    write_manifest(tmp_path / "m.csv", paths, labels)
    assert read_manifest(tmp_path / "m.csv") == (paths, labels)
    write_manifest(tmp_path / "m.csv", paths)
    assert read_manifest(tmp_path / "m.csv") == (paths, [""] * 5)


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
def test_all_usual_forms_are_the_same_manifest(tmp_path, text, encoding):
    assert read_manifest(manifest(tmp_path, text, encoding)) == (["/v/a.mp4", "/v/b.mp4"], ["x", "y"])


def test_one_column_and_relative_paths(tmp_path):
    paths, labels = read_manifest(manifest(tmp_path, "sub/a clip.mp4\n../b.mp4\n/c.mp4\n"))
    assert paths == [str(tmp_path / "sub/a clip.mp4"), str(tmp_path.parent / "b.mp4"), "/c.mp4"]
    assert labels == ["", "", ""]


@pytest.mark.parametrize(
    ("text", "said"),
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
def test_malformed_rows_are_named_by_file_and_line(tmp_path, text, said):
    with pytest.raises(UserError, match="list.csv") as raised:
        read_manifest(manifest(tmp_path, text))
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_missing_manifest(tmp_path):
    with pytest.raises(UserError, match="not found"):
        read_manifest(tmp_path / "none.csv")
