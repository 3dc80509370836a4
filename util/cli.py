"""Command lines: a parser whose errors are one line that names the nearest flag, and number types."""

import argparse
import difflib
import re

from util.dist import UserError

SYNONYMS = {  # what the field calls a flag: what it is called here, where a script has it
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
        """Make a parser; the texts of its help are printed as they are."""
        super().__init__(
            prog=prog,
            usage="%(prog)s [--flag value ...]" if prog is None else None,
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> None:
        """Raise a UserError; argparse calls this for a bad command line."""
        raise UserError(f"{message} ({self.prog} --help lists the flags)")

    def parse_args(self, args=None, namespace=None):
        """Parse a command line. Raises UserError, for an unknown flag with the nearest one."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if not unknown:
            return parsed
        flags = [word for word in unknown if re.match("--?[A-Za-z]", word)]
        if not flags:
            self.error(f"{unknown[0]!r} belongs to no flag")
        flag = flags[0].partition("=")[0]
        near = self.nearest(flag)
        if near is None:
            self.error(f"unknown flag {flag}")
        raise UserError(f"unknown flag {flag}: did you mean {near}?")

    def nearest(self, flag: str) -> str | None:
        """Return the flag of this parser that an unknown one is most likely meant to be."""
        shown = [action for action in self._actions if action.help != argparse.SUPPRESS]
        known = [name for action in shown for name in action.option_strings]
        flag = "--" + flag.strip("-").replace("-", "_").lower()
        if flag in known:
            return flag
        if SYNONYMS.get(flag) in known:
            return SYNONYMS[flag]
        longer = [name for name in known if name.startswith(flag)]
        near = difflib.get_close_matches(flag, known, n=1, cutoff=0.6)
        return (longer or near or [None])[0]


def positive(text: str) -> int:
    """Return an integer of at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return int(text)


def natural(text: str) -> int:
    """Return an integer of at least 0."""
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return int(text)


def at_least_two(text: str) -> int:
    """Return an integer of at least 2."""
    if int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text} is less than 2: the newest may be damaged")
    return int(text)


def fraction(text: str) -> float:
    """Return a number in (0, 1]."""
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} does not lie in (0, 1]")
    return float(text)
