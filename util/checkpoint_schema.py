"""What a checkpoint may hold: kinds, ranges, shapes, and how deep its parts are nested.

`check_contents` is called whenever a file is read, before anything in it is used. For every file it
checks that its parts end and that its tensors are no larger than their memory. For a checkpoint of
this repository it also checks the entries in ENTRIES and CONFIG, and the entries against each
other. Tensors are not read, except the optimizer's counts of updates.
"""

import argparse
import math
import reprlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

MAX_DEPTH = 20  # of parts in parts; ours have 5 levels
MAX_ENTRIES = 1_000_000  # in all parts; an entry that is reached twice counts twice
MAX_BITS = 128  # of a whole number
MAX_COUNT = 2**53  # updates or samples: a float holds each of them
MAX_SIZE = 2**24  # of a model: pixels, tokens, blocks, classes
MOMENTS = ("exp_avg", "exp_avg_sq")
COUNTS = ("updates", "skipped", "shares", "replaced")  # in sums of metrics
END = object()  # of a container


class SchemaError(ValueError):
    """A part of a checkpoint has a value that no checkpoint of that kind has."""


class Rule(NamedTuple):
    """Which values an entry may have."""

    accepts: Callable[[object], bool]
    expected: str  # in words


def whole(lowest: int, highest: int = MAX_COUNT) -> Rule:
    """Return the rule for a whole number in a range, the ends included. highest: a power of 2."""

    def accepts(value: object) -> bool:
        return type(value) is int and lowest <= value <= highest

    return Rule(accepts, f"a whole number from {lowest} to 2^{highest.bit_length() - 1}")


def is_number(value: object) -> bool:
    """Return whether a value is a finite number; True and False are none."""
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def number(lowest: float, highest: float) -> Rule:
    """Return the rule for a finite number in a range, the ends included."""

    def accepts(value: object) -> bool:
        return is_number(value) and lowest <= value <= highest  # type: ignore[operator]

    return Rule(accepts, f"a number from {lowest:g} to {highest:g}")


def instance(kind: type, expected: str) -> Rule:
    """Return the rule for an object of a class."""
    return Rule(lambda value: isinstance(value, kind), expected)


def sequence(each: Rule, length: int | None = None) -> Rule:
    """Return the rule for a list or tuple, of `length` entries unless None."""

    def accepts(value: object) -> bool:
        if not isinstance(value, (list, tuple)) or length not in (None, len(value)):
            return False
        return all(each.accepts(entry) for entry in value)

    return Rule(accepts, f"{length or 'a list'} of {each.expected}")


FLAG = instance(bool, "True or False")
TEXT = instance(str, "text")
PART = instance(dict, "a dictionary")
SIZE = whole(1, MAX_SIZE)
FACTOR = number(1e-6, 1e6)
ENTRIES = {
    "model": PART,
    "ema": PART,
    "optimizer": PART,
    "scaler": PART,
    "epoch": whole(0),
    "step": whole(0),
    "samples_consumed": whole(0),
    "config": PART,
    "args": PART,
    "tally": instance((dict, type(None)), "a dictionary"),  # type: ignore[arg-type]
    "global_batch": whole(1),
    "steps_per_epoch": whole(1),
    "data": PART,
    "best_acc1": number(-1, 100),
    "averaged": FLAG,
    "unreadable": PART,
    "converted_from": TEXT,
}
COLORS = {
    "mean": sequence(number(-1e6, 1e6), 3),
    "std": sequence(FACTOR, 3),
}
CONFIG = {
    "img_size": SIZE,
    "patch_size": SIZE,
    "embed_dim": SIZE,
    "depth": SIZE,
    "num_heads": SIZE,
    "num_frames": SIZE,
    "t_patch_size": SIZE,
    "mlp_ratio": FACTOR,
    "sep_pos_embed": FLAG,
    "cls_embed": FLAG,
    "no_qkv_bias": FLAG,
    "decoder_embed_dim": SIZE,
    "decoder_depth": SIZE,
    "decoder_num_heads": SIZE,
    "pred_t_dim": SIZE,
    "norm_pix_loss": FLAG,
    "num_classes": SIZE,
    "global_pool": FLAG,
    "model": TEXT,
    "classes": sequence(TEXT),
    "probe": TEXT,
    "probe_lrs": sequence(number(0, 1e6)),
    "targets": TEXT,
    **COLORS,
}
SCALER = {
    "scale": number(2.0**-149, 2.0**127),
    "growth_factor": FACTOR,
    "backoff_factor": FACTOR,
    "growth_interval": whole(1),
    "_growth_tracker": whole(0),
}
DATA = {"samples": whole(0), "sha256": TEXT}
# Without them the file of a run would be taken for another project's, or get the usual values.
REQUIRED_OF_RUNS = {"model", "config"}
REQUIRED_CONFIG = {"embed_dim", "depth", "num_heads", "mean", "std"}


def check_contents(state: dict) -> None:
    """Raise SchemaError if a checkpoint of any family has a part that cannot be right."""
    _check_nesting_and_memory(state)
    config = state.get("config")
    if isinstance(config, dict):
        check_entries("config", config, COLORS)
    if _is_ours(state):
        check_entries("", state, ENTRIES)
        check_entries("config", state.get("config", {}), CONFIG)
        _require_description(state)
        _check_plain_parts(state)
        _check_weights(state)
        _check_optimizer(state)
        _check_progress(state)


def check_values(state: dict) -> None:
    """Raise SchemaError if a run cannot continue from the weights or moments of its checkpoint.

    Weights must be finite, moments numbers, and mean squares not negative. Reads all of them.
    `check_contents` has accepted the parts.
    """
    for name, weight in state.get("model", {}).items():
        if isinstance(weight, Tensor) and weight.is_floating_point() and weight.numel() > 0:
            lowest, highest = weight.aminmax()  # NaN if any value is
            if not (lowest.isfinite() and highest.isfinite()):
                raise SchemaError(f"model.{name} has values that are not finite")
    for index, entry in state.get("optimizer", {}).get("state", {}).items():
        mean, mean_square = (entry.get(name) for name in MOMENTS)
        if mean is None or mean_square is None or mean.numel() == 0:
            continue  # of another optimizer, which does not fit the run
        if mean.aminmax().min.isnan() or not mean_square.min() >= 0:
            raise SchemaError(f"optimizer.state.{index} has values that are no moments")


def all_tensors(state: dict) -> Iterator[Tensor]:
    """Yield the tensors in all parts of a checkpoint that `check_contents` accepts."""
    waiting: list[object] = [state]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            yield value
        waiting += _inner(value)


def shown(value: object) -> str:
    """Return a value as short text, however long or deep it is."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    if type(value) is int and value.bit_length() > MAX_BITS:
        return f"a number of {value.bit_length()} bits"
    if type(value) in (int, float, bool, type(None)):
        return repr(value)
    return f"{reprlib.repr(value)} ({type(value).__name__})"


def check_entries(part: str, entries: dict, rules: dict[str, Rule]) -> None:
    """Raise SchemaError for an entry that breaks its rule. Missing and other entries are allowed.

    part: the name of the entries in messages, "" for the file itself.
    """
    for name, rule in rules.items():
        if name in entries and not rule.accepts(entries[name]):
            place = f"{part}.{name}" if part else name
            raise SchemaError(f"{place} is {shown(entries[name])}, not {rule.expected}")


def _is_ours(state: dict) -> bool:
    """Return whether a checkpoint has an entry that only this repository writes."""
    config = state.get("config")
    return "samples_consumed" in state or (isinstance(config, dict) and "embed_dim" in config)


def _require_entries(part: str, entries: dict, names: set[str]) -> None:
    """Raise SchemaError if entries are missing."""
    missing = sorted(names - entries.keys())
    if missing:
        raise SchemaError(f"{part} has no {', '.join(missing)}")


def _require_description(state: dict) -> None:
    """Raise SchemaError if the file of a run does not describe its model."""
    if "samples_consumed" not in state:  # a converted file has what was known
        return
    _require_entries("it", state, REQUIRED_OF_RUNS)
    required = set(REQUIRED_CONFIG)
    if "num_classes" in state["config"]:
        required.add("global_pool")
    _require_entries("config", state["config"], required)


# Any file


def _check_nesting_and_memory(state: dict) -> None:
    """Raise SchemaError if parts are nested without end, or a tensor is larger than its memory."""
    count = 0
    for key, part in state.items():
        name = key if isinstance(key, str) else shown(key)
        open_parts = [iter([part])]
        while open_parts:
            value = next(open_parts[-1], END)
            if value is END:
                open_parts.pop()
                continue
            count += 1
            _check_value(name, value)
            inner = _inner(value)
            if inner:
                open_parts.append(iter(inner))
            if len(open_parts) > MAX_DEPTH:
                raise SchemaError(f"{name} is nested more than {MAX_DEPTH} deep")
            if count > MAX_ENTRIES:
                raise SchemaError(f"{name} has more than {MAX_ENTRIES} entries")


def _inner(value: object) -> list:
    """Return what a container holds, [] for any other value."""
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(value)
    return []


def _check_value(part: str, value: object) -> None:
    """Raise SchemaError for a huge number, and for a tensor without memory for all its values."""
    if type(value) is int and value.bit_length() > MAX_BITS:
        raise SchemaError(f"{part} has {shown(value)}, not of at most {MAX_BITS}")
    if not isinstance(value, Tensor):
        return
    if value.layout != torch.strided or value.is_nested or value.device.type != "cpu":
        raise SchemaError(f"{part} has {shown(value)}, which is not an array in memory")
    needed = value.numel() * value.element_size()
    available = value.untyped_storage().nbytes()
    if needed > available:
        raise SchemaError(f"{part} has {shown(value)} on {available} bytes, not {needed}")


# Checkpoints of this repository


def _require_text_names(state: dict, parts: tuple[str, ...]) -> None:
    """Raise SchemaError for an entry of these parts whose name is not text."""
    for part in parts:
        for name in state.get(part, {}):
            if not isinstance(name, str):
                raise SchemaError(f"{part} has the name {shown(name)}, which is not text")


def _check_plain_parts(state: dict) -> None:
    """Raise SchemaError for a wrong entry in a part without tensors."""
    _require_text_names(state, ("args", "config", "data", "unreadable"))
    for part in ("args", "config"):
        for name, value in state.get(part, {}).items():
            if any(isinstance(entry, Tensor) for entry in (value, *_inner(value))):
                raise SchemaError(f"{part}.{name} has a tensor, not plain data")
    unreadable = state.get("unreadable", {})
    check_entries("unreadable", unreadable, dict.fromkeys(unreadable, TEXT))
    if "data" in state:
        _require_entries("data", state["data"], set(DATA))
        check_entries("data", state["data"], DATA | {"weighting": TEXT})
    scaler = state.get("scaler")
    if scaler:
        _require_entries("scaler", scaler, set(SCALER))
        check_entries("scaler", scaler, SCALER)


def _check_weights(state: dict) -> None:
    """Raise SchemaError unless model and EMA are tensors of weights, of equal names and shapes."""
    _require_text_names(state, ("model", "ema"))
    shapes = []
    for part in ("model", "ema"):
        for name, value in state.get(part, {}).items():
            if not isinstance(value, Tensor) or not value.is_floating_point():
                raise SchemaError(f"{part}.{name} is {shown(value)}, not a tensor of weights")
        shapes.append({name: value.shape for name, value in state.get(part, {}).items()})
    model, ema = shapes
    if "ema" in state and ema != model:
        name = next(name for name in model | ema if model.get(name) != ema.get(name))
        raise SchemaError(f"ema.{name} is missing or has another shape than in model")


def _check_optimizer(state: dict) -> None:
    """Raise SchemaError for settings and moments that AdamW cannot continue with."""
    optimizer = state.get("optimizer")
    if not optimizer:
        return
    _require_entries("optimizer", optimizer, {"state", "param_groups"})
    groups = optimizer["param_groups"]
    check_entries("optimizer", optimizer, {"state": PART, "param_groups": sequence(PART)})
    for group in groups:
        _require_entries("optimizer.param_groups", group, {"params"})
        check_entries("optimizer.param_groups", group, {"params": sequence(whole(0))})
    count = sum(len(group["params"]) for group in groups)
    if [index for group in groups for index in group["params"]] != list(range(count)):
        raise SchemaError("optimizer.param_groups does not number its parameters from 0")
    states = optimizer["state"]
    if states and states.keys() != set(range(count)):  # every trained weight has a gradient
        raise SchemaError(f"optimizer.state is not of the {count} parameters of its groups")
    for index, entry in states.items():
        part = f"optimizer.state.{index}"
        if not isinstance(entry, dict):
            raise SchemaError(f"{part} is {shown(entry)}, not a dictionary")
        _require_entries(part, entry, {"step", *MOMENTS})
        _check_moments(part, entry)
    _check_moments_of_all(states, state.get("model", {}))


def _check_moments(part: str, entry: dict) -> None:
    """Raise SchemaError for wrong moments, or a wrong number of updates, of a parameter."""
    for name in MOMENTS:
        moment = entry[name]
        if not isinstance(moment, Tensor) or not moment.is_floating_point():
            raise SchemaError(f"{part}.{name} is {shown(moment)}, not a tensor of moments")
        if not moment.is_contiguous() or moment.shape != entry[MOMENTS[0]].shape:
            raise SchemaError(f"{part}.{name} has {shown(moment)} in another order or shape")
    step = entry["step"]
    if not isinstance(step, Tensor) or step.shape != () or not step.is_floating_point():
        raise SchemaError(f"{part}.step is {shown(step)}, not one number in a tensor")
    check_entries(part, {"step": step.item()}, {"step": number(0, MAX_COUNT)})


def _check_moments_of_all(states: dict, model: dict) -> None:
    """Raise SchemaError if moments share memory, or have shapes that the weights do not have."""
    moments = [entry[name] for entry in states.values() for name in MOMENTS]
    places = {moment.untyped_storage().data_ptr() for moment in moments}
    if len(places) < len(moments):
        raise SchemaError("optimizer.state has moments that share memory")
    shapes = Counter(entry[MOMENTS[0]].shape for entry in states.values())
    extra = shapes - Counter(weight.shape for weight in model.values())
    if extra:
        shape = tuple(next(iter(extra)))
        raise SchemaError(f"optimizer.state has moments of shape {shape} that no weight has")


def _check_progress(state: dict) -> None:
    """Raise SchemaError if the counts of updates contradict each other."""
    tally = state.get("tally")
    updates = 0.0  # in the epoch, as far as the metrics have seen it
    if tally:
        _require_entries("tally", tally, {"sums", "streak"})
        check_entries("tally", tally, {"sums": PART, "streak": whole(0)})
        _require_entries("tally.sums", tally["sums"], {"epoch", "line"})
        for name in ("epoch", "line"):
            _check_sums(f"tally.sums.{name}", tally["sums"][name])
        updates = tally["sums"]["epoch"].get("updates", 0)
        if tally["sums"]["line"].get("updates", 0) > updates:
            raise SchemaError("tally.sums.line has more updates than tally.sums.epoch")
    if {"epoch", "step", "steps_per_epoch"} <= state.keys():
        first = state["epoch"] * state["steps_per_epoch"]
        last = first + state["steps_per_epoch"]
        if not first + updates <= state["step"] <= last:
            raise SchemaError(
                f"step is {state['step']}, which is not in epoch {state['epoch']} (updates "
                f"{first} to {last}, {updates:g} of them in tally)"
            )


def _check_sums(part: str, sums: object) -> None:
    """Raise SchemaError for wrong sums of metrics."""
    if not isinstance(sums, dict):
        raise SchemaError(f"{part} is {shown(sums)}, not a dictionary")
    for name, value in sums.items():
        if not isinstance(name, str) or not is_number(value):
            raise SchemaError(f"{part}.{shown(name)} is {shown(value)}, not a finite number")
    check_entries(part, sums, dict.fromkeys(COUNTS, number(0, MAX_COUNT)))
    if sums.get("skipped", 0) > sums.get("updates", 0):
        raise SchemaError(f"{part} has more skipped updates than updates")
