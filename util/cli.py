"""Command lines: a parser that reports errors in one line, and the number types of flags."""

import argparse
import difflib
import math
import re
from typing import NoReturn

from util.dist import UserError

SYNONYMS = {  # a flag's name in other repositories: its name here
    "--batch": "--batch_size_per_gpu",
    "--bs": "--batch_size_per_gpu",
    "--checkpoint": "--finetune",
    "--data": "--data_dirs",
    "--data_path": "--data_dirs",
    "--drop_path": "--drop_path_rate",
    "--fp16": "--amp",
    "--gradient_accumulation_steps": "--accum_iter",
    "--gpus": "--device",
    "--label_smoothing": "--smoothing",
    "--learning_rate": "--lr",
    "--nb_classes": "--num_classes",
    "--precision": "--amp",
    "--pretrained": "--finetune",
    "--resolution": "--img_size",
    "--stride": "--sampling_rate",
    "--tubelet_size": "--t_patch_size",
    "--update_freq": "--accum_iter",
    "--wd": "--weight_decay",
    "--workers": "--num_workers",
}


class Parser(argparse.ArgumentParser):
    """An argument parser without abbreviations that reports a bad command line as a UserError."""

    def __init__(self, description: str | None, prog: str | None = None, epilog: str | None = None):
        """Create the parser. description and epilog: printed by --help without wrapping."""
        usage = None
        if prog is None:
            usage = "%(prog)s [--flag value ...]"
        super().__init__(
            prog=prog,
            usage=usage,
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Raise a UserError; argparse calls this for a bad command line."""
        raise UserError(f"{message} ({self.prog} --help lists the flags)")

    def parse_args(self, args=None, namespace=None):
        """Parse a command line. Raises UserError; for an unknown flag it names the nearest one."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if not unknown:
            return parsed
        flags = [word for word in unknown if re.match("--?[A-Za-z]", word)]
        if not flags:
            self.error(f"unexpected argument {unknown[0]!r}")
        flag = flags[0].partition("=")[0]
        suggestion = self.nearest(flag)
        if suggestion is None:
            self.error(f"unknown flag {flag}")
        raise UserError(f"unknown flag {flag}: did you mean {suggestion}?")

    def nearest(self, flag: str) -> str | None:
        """Return the flag of this parser that an unknown flag most likely means, or None."""
        known: list[str] = []
        for action in self._actions:
            if action.help != argparse.SUPPRESS:
                known += action.option_strings
        flag = "--" + flag.strip("-").replace("-", "_").lower()
        if flag in known:
            return flag
        if SYNONYMS.get(flag) in known:
            return SYNONYMS[flag]
        for name in known:
            if name.startswith(flag):
                return name
        similar = difflib.get_close_matches(flag, known, n=1, cutoff=0.6)
        return next(iter(similar), None)


def positive_int(text: str) -> int:
    """Return an integer of at least 1. Raises ArgumentTypeError."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive integer")
    return value


def nonnegative_int(text: str) -> int:
    """Return an integer of at least 0. Raises ArgumentTypeError."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def positive_float(text: str) -> float:
    """Return a number above 0. Raises ArgumentTypeError."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def nonnegative_float(text: str) -> float:
    """Return a number of at least 0. Raises ArgumentTypeError."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return value


def min_two(text: str) -> int:
    """Return an integer of at least 2. Raises ArgumentTypeError."""
    value = int(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"{text} is less than 2: the newest file may be corrupt")
    return value


def decay_factor(text: str) -> float:
    """Return a number in [0, 1). Raises ArgumentTypeError."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return value


def fraction(text: str) -> float:
    """Return a number in (0, 1]. Raises ArgumentTypeError."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in (0, 1]")
    return value
