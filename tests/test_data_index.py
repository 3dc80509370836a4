"""Folders and CSV files to manifests."""

import pytest

from data.index import (
    check_classes,
    class_names,
    class_numbers,
    find_videos,
    keep_fraction,
    keep_stratified,
    main,
    read_manifest,
    write_manifest,
)
from util.dist import UserError


def manifest(tmp_path, text, encoding="utf-8"):
    """A file with this text."""
    path = tmp_path / "list.csv"
    path.write_bytes(text.encode(encoding))
    return path


def test_find_videos_in_any_case_and_depth_sorted(tmp_path):
    for name in (
        "b/two.MP4",
        "b/one.webm",
        "a/deep/er/three.MKV",
        "a/four.avi",
        "five.Mov",
        "a/notes.txt",
        "a/.hidden.mp4",
        ".git/x.mp4",
    ):
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


def test_t17_written_manifest_reads_back(tmp_path):
    paths = [
        "/v/plain.mp4",
        "/v/with, comma.mp4",
        '/v/with "quote".mp4',
        "/v/with space.mp4",
        "/v/ü.mp4",
    ]
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
def test_t17_all_usual_forms_are_the_same_manifest(tmp_path, text, encoding):
    assert read_manifest(manifest(tmp_path, text, encoding)) == (
        ["/v/a.mp4", "/v/b.mp4"],
        ["x", "y"],
    )


def test_t17_one_column_and_relative_paths(tmp_path):
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
def test_t17_malformed_rows_are_named_by_file_and_line(tmp_path, text, said):
    with pytest.raises(UserError, match="list.csv") as raised:
        read_manifest(manifest(tmp_path, text))
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_t17_duplicates_stay_and_half_a_million_rows_are_read(tmp_path):
    rows = [
        f"/videos/{number % 499_999:06d}.mp4" for number in range(500_000)
    ]  # one twice: it counts twice
    labels = [("NA", "None", "null", "007", "1e3")[number % 5] for number in range(500_000)]
    path = manifest(
        tmp_path,
        "path,label\r\n"
        + "\r\n".join(f"{row},{label}" for row, label in zip(rows, labels, strict=True)),
        "utf-8-sig",
    )
    assert read_manifest(path) == (rows, labels)
    with open(path, "a") as file:
        file.write("\r\n/videos/a.mp4,x,y")
    with pytest.raises(UserError, match="line 500002: more than two fields"):
        read_manifest(path)


def test_missing_manifest(tmp_path):
    with pytest.raises(UserError, match="not found"):
        read_manifest(tmp_path / "none.csv")


def test_class_names_are_sorted_and_whole_numbers_keep_their_value():
    assert class_names(["run", "jump", "run"]) == ["jump", "run"]
    assert class_names(["10", "2", "0"]) == [str(number) for number in range(11)]
    assert class_names(["007", "2"]) == ["007", "2"]  # names that happen to look like numbers
    assert class_numbers(["2", "0"], class_names(["10", "2", "0"]), "x") == [2, 0]


def test_t17_classes_of_the_training_set_hold_for_the_other(capsys):
    assert check_classes(["a", "b"], ["b", "a"], 3, "VAL") == ["a", "b"]
    assert "--num_classes 3 is larger than the 2 classes" in capsys.readouterr().out
    with pytest.raises(UserError, match="VAL: unknown class 'c'"):
        check_classes(["a", "b"], ["a", "b", "c"], 3, "VAL")
    with pytest.raises(UserError, match="VAL: no sample of class 'b'"):
        check_classes(["a", "b"], ["a"], 2, "VAL")


def test_a_stratified_part_is_the_same_for_the_same_seed():
    labels = [0] * 10 + [1] * 3 + [2]
    kept = keep_stratified(labels, 0.3, seed=1)
    assert [sum(labels[place] == label for place in kept) for label in range(3)] == [3, 1, 1]
    assert kept == keep_stratified(labels, 0.3, seed=1) != keep_stratified(labels, 0.3, seed=2)
    assert keep_stratified(labels, 1.0, seed=1) == list(range(14))


def test_official_annotations_become_manifests(tmp_path, capsys):
    videos = tmp_path / "videos"
    (videos / "deep").mkdir(parents=True)
    for name in ("abc_000010_000020.mp4", "deep/xyz.mkv", "7.webm", "8.webm"):
        (videos / name).write_bytes(b"x")
    kinetics = tmp_path / "train.csv"
    kinetics.write_text(
        'label,youtube_id,time_start,time_end,split\nrunning,abc,10,20,train\n"a, b",xyz,1,2,train\nlost,gone,3,13,train\n'
    )
    main(["--from", "kinetics", str(kinetics), str(videos), str(tmp_path / "k.csv")])
    assert "2 of 3 videos" in capsys.readouterr().out
    assert read_manifest(tmp_path / "k.csv") == (
        [str(videos / "abc_000010_000020.mp4"), str(videos / "deep/xyz.mkv")],
        ["running", "a, b"],
    )
    assert (tmp_path / "k.missing.csv").read_text().splitlines() == [
        "id,label",
        "gone_000003_000013,lost",
    ]
    ssv2 = tmp_path / "train.json"
    ssv2.write_text(
        '[{"id": "7", "label": "x", "template": "Holding [something]"}, {"id": "8", "template": "Poking [a hole]"}]'
    )
    main(["--from", "ssv2", str(ssv2), str(videos), str(tmp_path / "s.csv")])
    assert read_manifest(tmp_path / "s.csv")[1] == ["Holding something", "Poking a hole"]
    with pytest.raises(UserError, match="have no id, template"):
        ssv2.write_text('[{"video": "7"}]')
        main(["--from", "ssv2", str(ssv2), str(videos), str(tmp_path / "s.csv")])
