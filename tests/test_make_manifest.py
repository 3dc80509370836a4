"""Official annotation files become manifests, and lists of classes in their official order."""

import csv
import json
import math
from pathlib import Path

import pytest
from clip_dataset import clip_dataset
from make_videos import write_frames, write_video
from runs import CLASSIFIER_FLAGS, log_records

import finetune
import finetune_on_image
from data.manifest import class_indices, read_manifest
from data.video_index import load_index
from tools.make_manifest import main
from util.class_names import read_class_names
from util.dist import UserError

CLASSIND = "1 ApplyEyeMakeup\r\n2 Archery\r\n3 YoYo\r\n"
TEMPLATES = {"Poking [a hole] into [some substance]": 1, "Holding [something], slowly": 0}
LABELS = {name.replace("[", "").replace("]", ""): str(TEMPLATES[name]) for name in TEMPLATES}


def touch(folder: Path, *names: str) -> Path:
    """Make files of one byte; return the folder."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return folder


def write(path: Path, text: str) -> Path:
    """Write a text; return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, newline="")
    return path


def make(source: str, annotations: Path, videos: Path, *flags) -> list[tuple[str, int]]:
    """Make a manifest; return (path below VIDEOS, official class number) of each row."""
    output = videos.parent / "m.csv"
    main(["--from", source, *map(str, (annotations, videos, output, *flags))])
    paths, labels, *_ = read_manifest(output)
    numbers = class_indices(labels, read_class_names(videos.parent / "m_classes.json"), "m.csv")
    return [
        (str(Path(path).relative_to(videos)), number)
        for path, number in zip(paths, numbers, strict=True)
    ]


def missing_rows(tmp_path: Path) -> list[list[str]]:
    """Return the rows of the list of videos without a file."""
    with open(tmp_path / "m.missing.csv", newline="") as file:
        return list(csv.reader(file))[1:]


@pytest.fixture
def videos(tmp_path):
    """Return a folder of files that are named like the videos of the data sets."""
    names = ("abc_000010_000020.mp4", "deep/xyz.mkv", "7.webm", "8.webm")
    return touch(tmp_path / "videos", *names)


@pytest.fixture
def kinetics(tmp_path):
    """Return an annotation file of Kinetics whose last video is missing."""
    return write(
        tmp_path / "train.csv",
        "label,youtube_id,time_start,time_end,split\n"
        'running,abc,10,20,train\n"a, b",xyz,1,2,train\nlost,gone,3,13,train\n',
    )


def write_ssv2(folder: Path) -> Path:
    """Write train.json and labels.json of Something-Something v2; return the first."""
    records = [
        {"id": str(index), "label": "x", "template": name}
        for index, name in enumerate(TEMPLATES, 7)
    ]
    write(folder / "labels.json", json.dumps(LABELS))
    return write(folder / "train.json", json.dumps(records))


def test_kinetics_files_are_found_by_id_and_times_or_id(kinetics, videos, tmp_path, capsys):
    made = make("kinetics", kinetics, videos)
    assert made == [("abc_000010_000020.mp4", 2), ("deep/xyz.mkv", 0)]
    printed = capsys.readouterr().out
    assert "2 of 3 files, 3 classes, from 0 (lost) to 1 (a, b) files" in printed
    assert read_class_names(tmp_path / "m_classes.json") == ["a, b", "lost", "running"]
    assert missing_rows(tmp_path) == [["gone_000003_000013", "lost"]]


def test_kinetics_annotations_need_no_times(videos, tmp_path):
    annotations = write(tmp_path / "train.csv", "label,youtube_id\nNA,xyz\n")
    make("kinetics", annotations, videos)
    assert read_manifest(tmp_path / "m.csv")[:2] == ([str(videos / "deep/xyz.mkv")], ["NA"])


def test_kinetics_copies_and_ids_with_several_rows(tmp_path, capsys):
    annotations = write(
        tmp_path / "train.csv",
        "label,youtube_id,time_start,time_end\nrun,a,1,11\nsit,b,1,11\nrun,b,20,30\n",
    )
    names = ("other/a_000001_000011.mp4", "run/a_000001_000011.mp4", "b.mp4")
    made = make("kinetics", annotations, touch(tmp_path / "videos", *names))
    assert made == [("run/a_000001_000011.mp4", 0)]  # b.mp4 may be either row's
    assert "several files" not in capsys.readouterr().out
    touch(tmp_path / "videos", "more/run/a_000001_000011.webm")
    make("kinetics", annotations, tmp_path / "videos", "--overwrite")
    assert "1 rows have several files, of which the first is taken" in capsys.readouterr().out


def test_ssv2_numbers_are_those_of_labels_json(videos, tmp_path):
    annotations = write_ssv2(tmp_path / "labels")
    assert make("ssv2", annotations, videos) == [("7.webm", 1), ("8.webm", 0)]
    assert read_manifest(tmp_path / "m.csv")[1] == list(LABELS)
    answers = write(
        tmp_path / "labels/test-answers.csv",
        "8;Holding something, slowly\r\n9;Poking a hole into some substance\r\n",
    )
    assert make("ssv2", answers, videos, "--overwrite") == [("8.webm", 0)]
    assert missing_rows(tmp_path) == [["9", "Poking a hole into some substance"]]


def test_ssv2_without_labels_json_has_no_order(videos, tmp_path, capsys):
    annotations = write_ssv2(tmp_path)
    (tmp_path / "labels.json").rename(tmp_path / "numbers.json")
    main(["--from", "ssv2", str(annotations), str(videos), str(tmp_path / "m.csv")])
    assert read_manifest(tmp_path / "m.csv")[1] == list(LABELS)
    assert "pass --class_names" in capsys.readouterr().out
    assert not (tmp_path / "m_classes.json").exists()
    flags = ("--class_names", tmp_path / "numbers.json", "--overwrite")
    assert make("ssv2", annotations, videos, *flags) == [("7.webm", 1), ("8.webm", 0)]


def test_ucf101_lists_count_from_1_or_have_no_numbers(tmp_path):
    names = ("UCF-101/YoYo/v_YoYo_g08_c01.avi", "UCF-101/Archery/v_Archery_g01_c01.avi")
    folder = touch(tmp_path / "videos", *names)
    write(tmp_path / "lists/classInd.txt", CLASSIND)
    train = write(
        tmp_path / "lists/trainlist02.txt",
        "YoYo/v_YoYo_g08_c01.avi 3\r\nArchery/v_Archery_g09_c01.avi 2\r\n",
    )
    assert make("ucf101", train, folder) == [(names[0], 2)]
    assert missing_rows(tmp_path) == [["Archery/v_Archery_g09_c01", "Archery"]]
    test = write(tmp_path / "lists/testlist02.txt", "Archery/v_Archery_g01_c01.avi\r\n")
    assert make("ucf101", test, folder, "--overwrite") == [(names[1], 1)]
    assert not (tmp_path / "m.missing.csv").exists()
    assert len(read_class_names(tmp_path / "m_classes.json")) == 3


def test_hmdb51_has_three_splits_of_two_parts(tmp_path):
    names = ("clap/#1_a_(b)_0.avi", "clap/c_1.avi", "wave/c_1.avi", "wave/d.avi")
    folder = touch(tmp_path / "videos", *names)
    lines = "#1_a_(b)_0.avi 1 \nc_1.avi 2 \ngone.avi 2 \n"
    splits = write(tmp_path / "splits/clap_test_split1.txt", lines).parent
    write(splits / "wave_test_split1.txt", "c_1.avi 1 \nd.avi 0 \n")
    write(splits / "clap_test_split2.txt", "c_1.avi 1 \n")
    write(splits / "wave_test_split2.txt", "d.avi 1 \n")
    train = make("hmdb51", splits, folder, "--split", "train1")
    assert train == [(names[0], 0), (names[2], 1)]
    test = make("hmdb51", splits, folder, "--split", "test1", "--overwrite")
    assert test == [(names[1], 0)]
    assert missing_rows(tmp_path) == [["clap/gone", "clap"]]
    second = make("hmdb51", splits, folder, "--split", "train2", "--overwrite")
    assert second == [(names[1], 0), (names[3], 1)]


def test_diving48_labels_are_the_class_numbers(videos, tmp_path):
    rows = [{"vid_name": "7", "label": 12, "end_frame": 9}, {"vid_name": "xyz", "label": 3}]
    annotations = write(tmp_path / "train.json", json.dumps(rows))
    assert make("diving48", annotations, videos) == [("7.webm", 12), ("deep/xyz.mkv", 3)]
    names = write(tmp_path / "names.txt", "".join(f"dive {index}\n" for index in range(48)))
    flags = ("--class_names", names, "--overwrite")
    assert make("diving48", annotations, videos, *flags) == [("7.webm", 12), ("deep/xyz.mkv", 3)]
    assert read_manifest(tmp_path / "m.csv")[1] == ["dive 12", "dive 3"]


def test_jester_numbers_are_the_lines_of_its_labels(videos, tmp_path, capsys):
    annotations = write(tmp_path / "jester-v1-train.csv", "7;Swiping Left\n8;Doing other things\n")
    write(tmp_path / "jester-v1-labels.csv", "Swiping Left\nStop Sign\nDoing other things\n")
    assert make("jester", annotations, videos) == [("7.webm", 0), ("8.webm", 2)]
    frames = touch(tmp_path / "frames", "7/00001.jpg", "8/00001.jpg")
    assert make("jester", annotations, frames, "--overwrite") == [("7", 0), ("8", 2)]
    assert "2 videos are folders of frames" in capsys.readouterr().out
    (videos / "8.webm").unlink()
    touch(videos, "deep/8/00000.jpg", "7/img_1.png")
    found = make("jester", annotations, videos, "--overwrite")
    assert found == [("7.webm", 0), ("deep/8", 2)]  # a file is preferred


def test_imagenet_numbers_are_the_sorted_synsets(tmp_path):
    names = ("val/ILSVRC2012_val_00000001.JPEG", "val/ILSVRC2012_val_00000002.JPEG")
    folder = touch(tmp_path / "images", *names)
    annotations = write(
        tmp_path / "LOC_val_solution.csv",
        "ImageId,PredictionString\nILSVRC2012_val_00000002,n03995372 85 1 499 272 \n"
        "ILSVRC2012_val_00000001,n01440764 1 2 3 4 n01440764 5 6 7 8 \n",
    )
    mapping = "n03995372 power drill\nn01443537 goldfish, Carassius\nn01440764 tench, Tinca tinca\n"
    write(tmp_path / "LOC_synset_mapping.txt", mapping)
    assert make("imagenet", annotations, folder) == [(names[1], 2), (names[0], 0)]
    assert read_manifest(tmp_path / "m.csv")[1] == ["n03995372", "n01440764"]


@pytest.mark.parametrize("separator", [" ", ", ", "  "])
def test_lists_of_videomae_keep_their_numbers(separator, tmp_path):
    rows = (("/old/disk/run/1.mp4", 2), ("/old/disk/sit/1.mp4", 10), ("/old/disk/hop/1.mp4", 3))
    text = "".join(f"{path}{separator}{number}\n" for path, number in rows)
    annotations = write(tmp_path / "lists/train.csv", text)
    folder = touch(tmp_path / "videos", "train/sit/1.mp4", "train/run/1.webm", "train/fly/1.mp4")
    expected = [("train/run/1.webm", 2), ("train/sit/1.mp4", 10)]
    assert make("videomae", annotations, folder) == expected
    assert len(read_class_names(tmp_path / "m_classes.json")) == 11
    assert missing_rows(tmp_path) == [["/old/disk/hop/1", "3"]]


def test_lists_for_pretraining_make_manifests_without_labels(videos, tmp_path, capsys):
    annotations = write(tmp_path / "list.csv", "/old/7.mp4 0 -1\n/old/8.mp4 0 -1\n")
    main(["--from", "videomae", str(annotations), str(videos), str(tmp_path / "m.csv")])
    assert (tmp_path / "m.csv").read_text().splitlines()[0] == "path"
    assert "2 of 2 files, without labels" in capsys.readouterr().out
    assert not (tmp_path / "m_classes.json").exists()


@pytest.mark.parametrize("suffix", [".mp4", ".png"])
def test_plain_folders_are_classes(suffix, tmp_path):
    names = (f"b/deep/1{suffix}", f"a/2{suffix}", f"b/3{suffix}")
    folder = touch(tmp_path / "videos", *names, "a/notes.txt")
    main(["--from", "folders", str(folder), str(tmp_path / "m.csv")])
    paths, labels, *_ = read_manifest(tmp_path / "m.csv")
    assert [str(Path(path).relative_to(folder)) for path in paths] == [names[1], names[2], names[0]]
    assert labels == ["a", "b", "b"]
    assert read_class_names(tmp_path / "m_classes.json") == ["a", "b"]


def test_folders_of_frames_are_samples_if_asked_for(tmp_path, capsys):
    folder = touch(tmp_path / "videos", "b/9/1.jpg", "b/9/2.jpg", "b/7.mp4", "a/deep/8/img_3.PNG")
    main(["--from", "frame_folders", str(folder), str(tmp_path / "m.csv")])
    paths, labels, *_ = read_manifest(tmp_path / "m.csv")
    assert [str(Path(path).relative_to(folder)) for path in paths] == ["a/deep/8", "b/7.mp4", "b/9"]
    assert labels == ["a", "b", "b"]
    with pytest.raises(UserError, match="a has no files of"):
        main(["--from", "folders", str(folder), str(tmp_path / "other.csv")])
    assert "1 folders of numbered images are left out" in capsys.readouterr().out
    touch(folder, "b/9/2.mp4")
    with pytest.raises(UserError, match="b/9 holds numbered images and videos .2.mp4."):
        main(["--from", "frame_folders", str(folder), str(tmp_path / "other.csv")])


@pytest.mark.parametrize(
    ("source", "text", "message"),
    [
        ("ssv2", '[{"video": "7"}]', "have no id, template. --from ssv2 reads train.json"),
        ("ssv2", '[{"id": "7"}]', "have no template.*test-answers.csv"),
        ("ssv2", "[{", "cannot be read"),
        ("ssv2", '{"Holding something": "0"}', "not a list of records.*train.json"),
        ("ssv2", "label,youtube_id\nrun,abc\n", "line 1: 'label,youtube_id'.*reads train.json"),
        ("ssv2", '[{"id": "7", "template": "Flying"}]', "none of the .* belong to the same data"),
        ("kinetics", "label,video\nrun,abc\n", "have no youtube_id"),
        ("kinetics", "", "cannot be read"),
        ("kinetics", "label,youtube_id\nrun,none\n", "none of the 1 videos"),
        ("kinetics", "label,youtube_id\n", "are empty"),
        ("kinetics", "label,youtube_id\nrun,7\n,8\n", "8 has no label, others have one"),
        ("ucf101", CLASSIND, "line 1: '1 ApplyEyeMakeup.*reads trainlist01.txt"),
        ("ucf101", "YoYo/v_YoYo_g08_c01.avi 2\n", "YoYo the number 2, the list of classes 3"),
        ("ucf101", "Yo/v_Yo_g08_c01.avi 2\n", "class 'Yo' is none of the 3"),
        ("diving48", '[{"vid_name": "7"}]', "have no label"),
        ("diving48", "[]", "have no label, vid_name"),
        ("jester", "7\n", "line 1: '7'.*reads jester-v1-train.csv"),
        ("jester", "7;Stop\n", "needs jester-v1-labels.csv.*or pass --class_names"),
        ("imagenet", "490\n361\n", "order of the devkit's meta.mat.*Use LOC_val_solution.csv"),
        ("imagenet", "n01440764 tench\n", "have no ImageId, PredictionString"),
        ("videomae", "frames/7 0 90\n", "VideoMAE's lists of frame folders"),
    ],
)
def test_bad_annotations_are_one_line(source, text, message, videos, tmp_path):
    annotations = write(tmp_path / "annotations", text)
    write(tmp_path / "classInd.txt", CLASSIND)
    write(tmp_path / "labels.json", json.dumps(LABELS))
    with pytest.raises(UserError, match=message) as raised:
        main(["--from", source, str(annotations), str(videos), str(tmp_path / "m.csv")])
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "m.csv").exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("--from kinetics train.csv videos", "--from kinetics takes ANNOTATIONS VIDEOS OUTPUT"),
        ("--from folders train.csv videos m.csv", "--from folders takes VIDEOS OUTPUT"),
        ("--from folders videos m.csv --class_names x", "folders are the classes"),
        ("--from folders nothing m.csv", "nothing. not found"),
        ("--from hmdb51 videos videos m.csv", "needs --split, one of train1, test1"),
        ("--from hmdb51 videos videos m.csv --split test2", "no files CLASS_test_split2.txt"),
        ("--from hmdb51 train.csv videos m.csv --split test2", "no files CLASS_test_split2.txt"),
        ("--from kinetics train.csv videos m.csv --split test1", "give the split's own file"),
        ("--from kinetics train.csv nowhere m.csv", "nowhere' not found"),
        ("--from kinetics nowhere.csv videos m.csv", "nowhere.csv cannot be read"),
        ("--from kinetics train.csv videos train.csv --overwrite", "train.csv is an input"),
        ("--from kinetics train.csv videos old.csv", "old.csv exists. .* or pass --overwrite"),
        ("--from ucf101 list.txt videos m.csv --class_names list.txt", "line 1: 'YoYo/v.avi'"),
        ("--from ucf101 list.txt videos m.csv --class_names two.txt", "number its classes from 1"),
    ],
)
def test_bad_commands_are_one_line(command, message, kinetics, videos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "old.csv", "old")
    write(tmp_path / "list.txt", "YoYo/v.avi")
    write(tmp_path / "two.txt", "2 YoYo")
    annotated = kinetics.read_text()
    with pytest.raises(UserError, match=message) as raised:
        main(command.split())
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "m.csv").exists()
    assert (tmp_path / "old.csv").read_text() == "old"
    assert kinetics.read_text() == annotated


def finetuned_rows(tmp_path: Path, source: str, lists: list[Path], names: list[str]) -> list[dict]:
    """Make train.csv and val.csv of annotations, finetune on them; return predictions.csv."""
    for name in names:
        write_video(tmp_path / "videos" / name, frames=8, size=(48, 32), codec="mpeg4", b_frames=0)
    for kind, annotations in zip(("train", "val"), lists, strict=True):
        manifest = str(tmp_path / f"{kind}.csv")
        main(["--from", source, str(annotations), str(tmp_path / "videos"), manifest])
    return predicted_rows(tmp_path, [])


def predicted_rows(tmp_path: Path, more: list[str]) -> list[dict]:
    """Finetune on train.csv and val.csv for two epochs; return predictions.csv."""
    flags = "--epochs 2 --batch_size_per_gpu 2 --num_classes 3 --short_side 32 --decoder pyav"
    for kind in ("train", "val"):
        more = [*more, f"--{kind}_csv", str(tmp_path / f"{kind}.csv")]
    more += ["--class_names", str(tmp_path / "train_classes.json"), "--output_dir", str(tmp_path)]
    finetune.main([*CLASSIFIER_FLAGS, *flags.split(), *more])
    with open(tmp_path / "run_predictions.csv", newline="") as file:
        return list(csv.DictReader(file))


KINETICS_HEADER = "label,youtube_id,time_start,time_end,split\n"
OFFICIAL = {  # lists, files of videos, flags of the lists, classes; all have samples of c and a
    "kinetics": (
        {"train.csv": KINETICS_HEADER + "c,uvw,10,20,train\na,xyz,1,11,train\n"},
        ["c/uvw_000010_000020.mp4", "a/xyz_000001_000011.mp4"],
        [["train.csv"], ["train.csv"]],
        ["a", "c"],
    ),
    "hmdb51": (
        {
            "c_test_split1.txt": "1.avi 1\n2.avi 2\n3.avi 0\n",
            "a_test_split1.txt": "4.avi 1\n5.avi 2\n",
        },
        [f"c/{number}.avi" for number in (1, 2, 3)] + ["a/4.avi", "a/5.avi"],
        [[".", "--split", "train1"], [".", "--split", "test1"]],
        ["a", "c"],
    ),
    "diving48": (
        {"train.json": '[{"vid_name": "x1", "label": 2}, {"vid_name": "y1", "label": 0}]'},
        ["x1.mp4", "y1.mp4"],
        [["train.json"], ["train.json"]],
        ["0", "1", "2"],
    ),
    "jester": (
        {"jester-v1-train.csv": "7;c\n12;a\n", "jester-v1-labels.csv": "b\na\nc\n"},
        ["7/", "12/"],
        [["jester-v1-train.csv"], ["jester-v1-train.csv"]],
        ["b", "a", "c"],
    ),
    "videomae": (
        {"train.csv": "/old/place/x.mp4 2\n/old/place/y.mp4 0\n"},
        ["x.mp4", "y.mp4"],
        [["train.csv"], ["train.csv"]],
        ["0", "1", "2"],
    ),
    "folders": ({}, ["a/x.mp4", "c/y.mp4"], [[], []], ["a", "c"]),
    "frame_folders": ({}, ["a/x/", "c/y/"], [[], []], ["a", "c"]),
}


@pytest.mark.parametrize("source", OFFICIAL)
def test_annotations_are_finetuned_with_official_numbers(source, tmp_path):
    lists, names, commands, classes = OFFICIAL[source]
    for name, text in lists.items():
        write(tmp_path / "lists" / name, text)
    for name in names:
        path = tmp_path / "videos" / name
        if name.endswith("/"):
            write_frames(path, frames=8, size=(48, 32))
        else:
            write_video(path, frames=8, size=(48, 32), codec="mpeg4", b_frames=0)
    for kind, command in zip(("train", "val"), commands, strict=True):
        annotations = [str(tmp_path / "lists" / name) for name in command[:1]]
        where = [str(tmp_path / "videos"), str(tmp_path / f"{kind}.csv")]
        main(["--from", source, *annotations, *where, *command[1:]])
    has_frames = source in ("jester", "frame_folders")
    rows = predicted_rows(tmp_path, ["--frames_fps", "12"] if has_frames else [])
    sorts = source in ("hmdb51", "folders", "frame_folders")
    labels = ["a", "c"] if sorts else ["c", "a"]
    if classes[0] == "0":
        labels = ["2", "0"]
    assert [row["label"] for row in rows] == labels
    recorded = json.loads((tmp_path / "run_classes.json").read_text())
    assert recorded == classes == read_class_names(tmp_path / "train_classes.json")
    assert {row["top1"] for row in rows} <= set(classes)


def test_ucf101_is_finetuned_with_official_numbers(tmp_path):
    names = [f"{c}/v_{c}_g0{g}_c01.avi" for g in (1, 2) for c in ("YoYo", "Archery")]
    write(tmp_path / "lists/classInd.txt", CLASSIND)
    train = write(tmp_path / "lists/trainlist01.txt", f"{names[0]} 3\n{names[1]} 2\n")
    test = write(tmp_path / "lists/testlist01.txt", f"{names[2]}\n{names[3]}\n")
    rows = finetuned_rows(tmp_path, "ucf101", [train, test], names)
    assert [row["label"] for row in rows] == ["YoYo", "Archery"]
    official = ["ApplyEyeMakeup", "Archery", "YoYo"]
    assert json.loads((tmp_path / "run_classes.json").read_text()) == official


def test_a_flat_imagenet_validates_synset_folders(images, tmp_path):
    synsets = {"dark": "n01440764", "bright": "n03995372"}
    rows = ["ImageId,PredictionString"]
    for index, file in enumerate(sorted(Path(images).rglob("*.png"))):
        synset = synsets[file.relative_to(images).parts[0]]
        write(tmp_path / "train" / synset / f"{synset}_{index}.png", "").write_bytes(
            file.read_bytes()
        )
        write(tmp_path / "val" / f"v_{index}.png", "").write_bytes(file.read_bytes())
        rows.append(f"v_{index},{synset} 1 2 3 4")
    annotations = write(tmp_path / "LOC_val_solution.csv", "\n".join(rows))
    make("imagenet", annotations, tmp_path / "val")
    data = ["--train_data_path", tmp_path / "train", "--val_data_path", tmp_path / "m.csv"]
    names = ["--class_names", tmp_path / "m_classes.json", "--output_dir", tmp_path / "run"]
    flags = "--epochs 10 --batch_size_per_gpu 6 --dropout 0".split()
    finetune_on_image.main([*CLASSIFIER_FLAGS, *map(str, data + names), *flags])
    assert log_records(tmp_path / "run")[-1]["test_acc1"] == 100
    write(tmp_path / "m.csv", "a.png,n01440764\nb.png\n")
    with pytest.raises(UserError, match="--val_data_path .*m.csv: .*b.png has no label"):
        finetune_on_image.main([*CLASSIFIER_FLAGS, *map(str, data), "--output_dir", str(tmp_path)])


def test_ssv2_is_finetuned_with_official_numbers(tmp_path):
    train = write_ssv2(tmp_path / "labels")
    rows = finetuned_rows(tmp_path, "ssv2", [train, train], ["7.avi", "8.avi"])
    assert [row["label"] for row in rows] == list(LABELS)
    official = ["Holding something, slowly", "Poking a hole into some substance"]
    assert json.loads((tmp_path / "run_classes.json").read_text()) == official


EPIC_HEADER = (
    "narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,"
    "start_frame,stop_frame,narration,verb,verb_class,noun,noun_class,all_nouns,all_noun_classes\n"
)
EPIC_VERBS = "id,key,instances,category\n0,take,\"['take', 'grab']\",access\n1,put,['put'],leave\n"
EPIC_NOUNS = (
    "id,key,instances,category\n0,tap,['tap'],x\n1,spoon,['spoon'],x\n2,plate,['plate'],x\n"
)


def write_epic(folder: Path, *rows: tuple[str, str, str, int, int]) -> Path:
    """Write annotations of EPIC-Kitchens-100: video, start, stop, verb class, noun class."""
    lines = [
        f"{video}_{i},P01,{video},00:00:00.500,{start},{stop},8,9,take it,take,{verb},tap:kitchen,"
        f"{noun},\"['tap', 'it']\",\"[0, 1]\"\n"
        for i, (video, start, stop, verb, noun) in enumerate(rows)
    ]
    write(folder / "EPIC_100_verb_classes.csv", EPIC_VERBS)
    write(folder / "EPIC_100_noun_classes.csv", EPIC_NOUNS)
    return write(folder / "EPIC_100_train.csv", EPIC_HEADER + "".join(lines))


def test_epic_actions_are_parts_of_long_files(tmp_path):
    videos = touch(tmp_path / "videos", "P01/videos/P01_01.MP4", "P01/videos/P01_101.MP4")
    rows = (
        ("P01_01", "00:00:01.09", "00:00:02.5", 1, 2),
        ("P01_02", "00:00:01.00", "00:00:02.00", 0, 0),
        ("P01_101", "01:02:03.25", "01:02:05.00", 0, 1),
        ("P01_01", "00:00:00.00", "00:01:00.00", 0, 0),
    )
    annotations = write_epic(tmp_path / "lists", *rows)
    first, other = "P01/videos/P01_01.MP4", "P01/videos/P01_101.MP4"
    assert make("epic_verb", annotations, videos) == [(first, 1), (other, 0), (first, 0)]
    samples = read_manifest(tmp_path / "m.csv")
    assert samples.labels == ["put", "take", "take"]
    assert samples.spans.tolist() == [[1.09, 2.5], [3723.25, 3725], [0, 60]]
    assert missing_rows(tmp_path) == [["P01_02", "take"]]
    nouns = make("epic_noun", annotations, videos, "--overwrite")
    assert nouns == [(first, 2), (other, 1), (first, 0)]
    with pytest.raises(UserError, match="--segment_seconds cuts whole videos, but .* gives parts"):
        make("epic_noun", annotations, videos, "--overwrite", "--segment_seconds", 5)
    for stamp in ("1:90", "", "01:02:03"):
        annotations = write_epic(tmp_path / "bad", ("P01_01", "01:02:03", stamp, 0, 0))
        with pytest.raises(UserError, match="in row 0 is no HH:MM|span 0 is 3723 to 3723 s"):
            make("epic_verb", annotations, videos, "--overwrite")


def test_long_videos_are_cut_into_samples_of_some_seconds(tmp_path, capsys):
    videos = tmp_path / "videos"
    for name, frames in (("a.mp4", 120), ("b.mp4", 24), ("c.mp4", 193)):
        write_video(videos / name, frames=frames, size=(48, 32))
    (videos / "d.mp4").write_text("no video")
    output = tmp_path / "parts.csv"
    main(["--from", "folders", str(videos), str(output), "--segment_seconds", "2"])
    samples = read_manifest(output)
    assert [Path(path).stem for path in samples.paths] == list("aabcccd")
    parts = [[0, 2], [2, 4], [0, 0.8], [0, 2], [2, 4], [4, 193 / 30], [0, math.inf]]
    assert samples.spans.tolist() == parts
    assert "7 parts of 4 videos, 0.0 hours, 1 of them unreadable" in capsys.readouterr().out
    index = load_index(output, samples.paths)
    assert index.rows["frames"].tolist() == [120, 24, 193, 0]
    dataset = clip_dataset(samples.paths, spans=samples.spans, known=index)
    assert dataset[(0, 5)]["path"] == samples.paths[5]
    with pytest.raises(UserError, match="--frames_fps is needed for --segment_seconds only"):
        main(["--from", "folders", str(videos), str(tmp_path / "x.csv"), "--frames_fps", "5"])


def test_epic_is_finetuned_with_official_numbers(tmp_path):
    write_video(tmp_path / "videos/P01/P01_01.MP4", frames=90, size=(48, 32))
    rows = [
        ("P01_01", f"00:00:0{second}.00", f"00:00:0{second + 1}.00", 1, second) for second in (0, 2)
    ]
    annotations = write_epic(tmp_path / "lists", *rows)
    found = finetuned_rows(tmp_path, "epic_noun", [annotations, annotations], [])
    assert [row["label"] for row in found] == ["tap", "plate"]
    assert [(row["start"], row["end"]) for row in found] == [("0.0", "1.0"), ("2.0", "3.0")]
    assert json.loads((tmp_path / "run_classes.json").read_text()) == ["tap", "spoon", "plate"]
