"""Bad command lines end in one line that names the flag that was meant; flags that follow others."""

import argparse
from importlib import import_module

import pytest

from data import doctor, index, reencode
from util import args as flags
from util import export
from util.cli import SYNONYMS, Parser
from util.dist import UserError

SCRIPTS = ("pretrain", "finetune", "finetune_on_image")


def error_of(call, *words: str) -> str:
    """Return the message of the UserError that a call on a command line raises."""
    with pytest.raises(UserError) as raised:
        call(list(words))
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("script", "flag", "meant"),
    [
        ("pretrain", "--data_dir", "--data_dirs"),
        ("pretrain", "--batch_size", "--batch_size_per_gpu"),
        ("pretrain", "--learning_rate", "--lr"),
        ("pretrain", "--data-dirs", "--data_dirs"),
        ("pretrain", "--mask-ratio", "--mask_ratio"),
        ("pretrain", "--learning-rate", "--lr"),
        ("pretrain", "--LR", "--lr"),
        ("pretrain", "-lr", "--lr"),
        ("pretrain", "--workers", "--num_workers"),
        ("pretrain", "--out_dir", "--output_dir"),
        ("finetune", "--train_dirs", "--train_dir"),
        ("finetune", "--nb_classes", "--num_classes"),
        ("finetune", "--pretrained", "--finetune"),
        ("finetune_on_image", "--train_path", "--train_data_path"),
    ],
)
def test_an_unknown_flag_names_the_one_that_was_meant(script, flag, meant):
    parse = import_module(script).get_parser().parse_args
    for words in ([flag, "x"], [f"{flag}=x"], ["--lr", "1", flag, "x", "y"]):
        assert error_of(parse, *words) == f"unknown flag {flag}: did you mean {meant}?"


def test_a_flag_like_no_other_is_named_alone():
    parse = import_module("pretrain").get_parser().parse_args
    assert error_of(parse, "--zzz").startswith("unknown flag --zzz (")
    assert error_of(parse, "stray").startswith("'stray' belongs to no flag (")


def test_retired_flags_are_never_suggested():
    parser = import_module("pretrain").get_parser()
    assert parser.nearest("--start_epochs") not in flags.RETIRED


@pytest.mark.parametrize(
    ("program", "words", "meant"),
    [
        (doctor.main, ["x", "--num_frame", "8"], "--num_frames"),
        (reencode.main, ["x", "y", "--shortside", "8"], "--short_side"),
        (index.official, ["--from", "ssv2", "a", "b", "c", "--form", "x"], "--from"),
        (export.main, ["inspect", "x", "--img-size", "8"], "--img_size"),
    ],
)
def test_programs_beside_the_scripts_name_it_too(program, words, meant):
    assert error_of(program, *words).endswith(f"did you mean {meant}?")


def test_every_synonym_leads_to_a_flag_of_a_script():
    parsers = [import_module(script).get_parser() for script in SCRIPTS]
    known = {
        name for parser in parsers for action in parser._actions for name in action.option_strings
    }
    assert set(SYNONYMS.values()) <= known
    assert not set(SYNONYMS) & known


def test_flags_are_not_abbreviated():
    parser = Parser("A program.", prog="program")
    parser.add_argument("--output_dir")
    assert parser.parse_args(["--output_dir", "x"]) == argparse.Namespace(output_dir="x")
    assert (
        error_of(parser.parse_args, "--output", "x")
        == "unknown flag --output: did you mean --output_dir?"
    )


@pytest.mark.parametrize("script", SCRIPTS[:2])
def test_manifests_go_to_the_output_folder_by_default(script):
    parser = import_module(script).get_parser()
    assert flags.parse(parser, ["--output_dir", "a"]).datafile_dir == "a"
    assert flags.parse(parser, ["--output_dir", "a", "--datafile_dir", "b"]).datafile_dir == "b"
