"""Official annotation files become manifests, and lists of classes in their official order."""

import csv
import json
from pathlib import Path

import pytest
from make_videos import write_video
from runs import CLASSIFIER_FLAGS, log_records

import finetune
import finetune_on_image
from data.manifest import class_indices, read_manifest
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
        ("--from folders videos/deep m.csv", "deep has no subfolders"),
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
    flags = []
    for kind, annotations in zip(("train", "val"), lists, strict=True):
        manifest = tmp_path / f"{kind}.csv"
        main(["--from", source, str(annotations), str(tmp_path / "videos"), str(manifest)])
        flags += [f"--{kind}_csv", str(manifest)]
    flags += ["--class_names", str(tmp_path / "train_classes.json"), "--output_dir", str(tmp_path)]
    more = (
        "--epochs 2 --batch_size_per_gpu 2 --num_classes 3 --short_side 32 --decoder pyav".split()
    )
    finetune.main([*CLASSIFIER_FLAGS, *flags, *more])
    with open(tmp_path / "run_predictions.csv", newline="") as file:
        return list(csv.DictReader(file))


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
