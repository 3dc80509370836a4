"""Names of a classifier's outputs: from the checkpoint, from a file, or numbers."""

import json

import pytest

from util.class_names import class_list, read_class_names
from util.dist import UserError


def write(tmp_path, text: str) -> str:
    """Write a file of names and return its path."""
    path = tmp_path / "names.txt"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    "text",
    [
        "run\nsit down\n",
        "\ufeffrun\r\n\r\n sit down",
        '["run", "sit down"]',
        '{"sit down": "1", "run": "0"}',
        '{"sit down": 1, "run": 0}',
    ],
)
def test_names_are_read_in_the_order_of_their_numbers(text, tmp_path):
    assert read_class_names(write(tmp_path, text)) == ["run", "sit down"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ('{"a": "0", "b": "2"}', "does not number its 2 classes from 0 to 1"),
        ('{"a": "x"}', "class 'a' has the number 'x'"),
        ('{"a": ', "is not valid JSON"),
    ],
)
def test_a_bad_list_is_one_line(text, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read_class_names(write(tmp_path, text))


def test_a_missing_or_binary_list_is_one_line(tmp_path):
    (tmp_path / "names.bin").write_bytes(b"\xff\xfe\x00")
    for name in ("nowhere.txt", "names.bin"):
        with pytest.raises(UserError, match="cannot be read"):
            read_class_names(tmp_path / name)


def test_names_come_from_the_file_the_checkpoint_or_are_numbers(tmp_path, capsys):
    names = write(tmp_path, "a\nb\nc")
    assert class_list("x.pth", 3, None, "") == ["0", "1", "2"]
    assert class_list("x.pth", 3, ["p", "q", "r"], "") == ["p", "q", "r"]
    assert class_list("x.pth", 5, ["p", "q", "r"], "") == ["p", "q", "r"]  # two unused outputs
    assert capsys.readouterr().out == ""
    assert class_list("x.pth", 3, None, names) == ["a", "b", "c"]
    assert f"class names from {names}, in its order: a, b, c, ..." in capsys.readouterr().out
    assert class_list("x.pth", 5, ["a", "b", "c"], names) == ["a", "b", "c"]


def test_a_list_that_does_not_belong_to_the_checkpoint_is_refused(tmp_path):
    names = write(tmp_path, json.dumps(list("abcdef")))
    with pytest.raises(UserError, match="has 6 names, but x.pth has 5 classes"):
        class_list("x.pth", 5, None, names)
    shown = "in 4 of 6 classes .class 0 is 'a', not 'd'; class 2 is 'c', not 'a'; class 3 is 'd', "
    with pytest.raises(UserError, match=f"{shown}not 'f'"):
        class_list("x.pth", 6, list("dbafec"), names)
