"""The parser: errors in one line, with the flag that was probably meant; derived defaults."""

import argparse
from importlib import import_module

import pytest
import torch
from tiny import tiny_mae

from tools import data_doctor, inspect_checkpoint, make_manifest, reencode
from util import args as flags
from util.cli import SYNONYMS, Parser, fraction, min_two, nonnegative_int, positive_int
from util.dist import UserError

SCRIPTS = ("pretrain", "finetune", "finetune_on_image")


def error_of(call, *words: str) -> str:
    """Return the message of the UserError that a call with these arguments raises."""
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
def test_an_unknown_flag_gets_a_suggestion(script, flag, meant):
    parse = import_module(script).get_parser().parse_args
    for words in ([flag, "x"], [f"{flag}=x"], ["--lr", "1", flag, "x", "y"]):
        assert error_of(parse, *words) == f"unknown flag {flag}: did you mean {meant}?"


def test_a_flag_unlike_any_other_gets_no_suggestion():
    parse = import_module("pretrain").get_parser().parse_args
    assert error_of(parse, "--zzz").startswith("unknown flag --zzz (")
    assert error_of(parse, "stray").startswith("unexpected argument 'stray' (")


def test_retired_flags_are_never_suggested():
    parser = import_module("pretrain").get_parser()
    assert parser.nearest("--start_epochs") not in flags.RETIRED


@pytest.mark.parametrize(
    ("program", "words", "meant"),
    [
        (data_doctor.main, ["x", "--num_frame", "8"], "--num_frames"),
        (reencode.main, ["x", "y", "--shortside", "8"], "--short_side"),
        (make_manifest.main, ["--from", "ssv2", "a", "b", "c", "--form", "x"], "--from"),
        (inspect_checkpoint.main, ["x", "--img-size", "8"], "--img_size"),
    ],
)
def test_the_tools_suggest_flags_too(program, words, meant):
    assert error_of(program, *words).endswith(f"did you mean {meant}?")


def test_every_synonym_leads_to_a_flag_of_a_script():
    known = set()
    for script in SCRIPTS:
        for action in import_module(script).get_parser()._actions:
            known.update(action.option_strings)
    assert set(SYNONYMS.values()) <= known
    assert not set(SYNONYMS) & known


def test_flags_are_not_abbreviated():
    parser = Parser("A program.", prog="program")
    parser.add_argument("--output_dir")
    assert parser.parse_args(["--output_dir", "x"]) == argparse.Namespace(output_dir="x")
    message = error_of(parser.parse_args, "--output", "x")
    assert message == "unknown flag --output: did you mean --output_dir?"


@pytest.mark.parametrize("script", SCRIPTS[:2])
def test_manifests_go_to_the_output_folder_by_default(script):
    parser = import_module(script).get_parser()
    args, given = flags.parse(parser, ["--output_dir", "a"])
    assert args.datafile_dir == "a"
    assert given == {"output_dir"}
    args, given = flags.parse(parser, ["--output_dir", "a", "--datafile_dir", "b"])
    assert args.datafile_dir == "b"
    assert given == {"output_dir", "datafile_dir"}


@pytest.mark.parametrize(
    ("given", "device", "expected"),
    [
        ([], "cuda", True),
        ([], "cpu", False),
        (["--compile"], "cpu", True),
        (["--no-compile"], "cuda", False),
    ],
)
def test_compile_is_on_with_cuda_by_default(given, device, expected):
    args, _ = flags.parse(import_module("pretrain").get_parser(), given)
    flags.resolve_compile(args, torch.device(device))
    assert args.compile is expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [([], 0.001 * 64 / 256), (["--lr", "0.5"], 0.5)],
)
def test_the_learning_rate_follows_the_effective_batch(given, expected, capsys):
    words = ["--blr", "0.001", "--batch_size_per_gpu", "8", "--accum_iter", "2", *given]
    args, _ = flags.parse(import_module("pretrain").get_parser(), words)
    assert flags.effective_lr(args, 2, {"repeat_aug": 2}) == pytest.approx(expected)
    line = "effective batch 64 = 8 batch_size_per_gpu x 2 accum_iter x 2 processes x 2 repeat_aug\n"
    assert line in capsys.readouterr().out


@pytest.mark.parametrize(
    ("number_type", "text"),
    [(positive_int, "0"), (nonnegative_int, "-1"), (min_two, "1"), (fraction, "0")],
)
def test_numbers_out_of_range_are_rejected(number_type, text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"^{text} is "):
        number_type(text)


def test_system_flags_change_the_model():
    model = tiny_mae()
    words = "--amp bf16 --bf16_residual --activation_checkpointing --attn math".split()
    args = import_module("pretrain").get_parser().parse_args(words)
    flags.apply_system_flags(args, model, torch.device("cpu"))
    assert model.residual_dtype == torch.bfloat16
    assert model.activation_checkpointing
