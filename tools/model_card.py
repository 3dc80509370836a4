"""README.md of a converted checkpoint: the model card of the Hugging Face Hub.

The front matter is described at https://huggingface.co/docs/hub/model-cards.
"""

import json
import re
from pathlib import Path, PurePath
from typing import Any

from util.args import ScriptParser, add_run, add_system
from util.checkpoint import truncate
from util.checkpoint_formats import parse_checkpoint
from util.model_source import ModelSource, describe

DATA_FLAGS = (  # folders and manifests
    "data_dirs",
    "data_csv",
    "train_dir",
    "train_csv",
    "train_data_path",
    "val_dirs",
    "val_dir",
    "val_csv",
    "val_data_path",
)
START_FLAGS = ("finetune", "init_from")  # checkpoints that a run starts from
# Further flags that do not change the weights, or whose effect the card has elsewhere.
REPORT_FLAGS = ("datafile_dir", "probe_dir", "recon_every", "val_every", "class_names")
METRICS = {  # entries of a log's record: their meaning
    "train_loss": "training loss",
    "train_acc1": "training top-1 (%)",
    "val_loss": "validation loss",
    "test_loss": "validation loss",
    "test_acc1": "validation top-1 (%)",
    "test_acc5": "validation top-5 (%)",
}
SHOWN_CLASSES = 20


def model_card(checkpoint: dict, source_path: str | Path) -> str:
    """Return the text of README.md for a checkpoint in our layout.

    source_path: the file that it was read from; the log of its run may be beside it. Folders are
    left out of paths. Raises UserError if the checkpoint contains no encoder.
    """
    source = describe(parse_checkpoint(checkpoint, {}, source_path), source_path)
    flags = without_folders(source.flags)
    sections = [
        front_matter(source),
        f"# {source.name}",
        summary(source),
        "## Use",
        loading_code(source),
        "## Architecture",
        table(architecture(checkpoint, source)),
    ]
    data = data_rows(checkpoint, flags)
    if data:
        sections += ["## Data", table(data)]
    recipe = recipe_rows(flags, source)
    if recipe:
        sections += ["## Recipe", table(recipe)]
    metrics = metric_rows(checkpoint, source_path)
    if metrics:
        sections += ["## Results", table(metrics)]
    sections += ["## License", license_text(checkpoint, flags)]
    return "\n\n".join(sections) + "\n"


def without_folders(value: Any) -> Any:
    """Return a value with only the last component of each path in it, in lists and dicts too."""
    if isinstance(value, dict):
        return {key: without_folders(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_folders(entry) for entry in value]
    if not isinstance(value, (str, PurePath)):
        return value
    text = str(value)
    if re.match(r"hf:|https?://[^@]*$", text):  # public addresses
        return text
    return re.split(r"[/\\]", text.rstrip("/\\"))[-1]


def front_matter(source: ModelSource) -> str:
    """Return the YAML in front of a model card."""
    lines = [
        "license: other",
        "library_name: st-mae",
        "tags:",
        "- masked-autoencoder",
        "- vision-transformer",
        "- video",
    ]
    if source.num_classes is not None:
        lines.append("pipeline_tag: video-classification")
    return "\n".join(["---", *lines, "---"])


def summary(source: ModelSource) -> str:
    """Return what the model is, in one sentence."""
    clip = f"{source.sizes['num_frames']} frames of {source.sizes['img_size']} pixels"
    if source.num_classes is not None:
        return f"A video transformer with {source.num_classes} classes, for clips of {clip}."
    if source.decoder:
        return f"A masked autoencoder for video: it predicts hidden patches of clips of {clip}."
    return f"The encoder of a video transformer for clips of {clip}."


def loading_code(source: ModelSource) -> str:
    """Return the lines of Python that load the model from its repository."""
    loader, result = ("load_encoder", "tokens")
    if source.num_classes is not None:
        loader, result = ("load_classifier", "logits")
    side = source.sizes["img_size"]
    shape = f"(B, 3, {source.sizes['num_frames']}, {side}, {side})"
    return (
        f"```python\nfrom util.pretrained import {loader}\n\n"
        f'model = {loader}("hf:OWNER/REPO")\n'
        f"{result} = model(clips)  # {shape}: uint8, or float and normalized\n```"
    )


def architecture(checkpoint: dict, source: ModelSource) -> list[tuple[str, object]]:
    """Return the sizes of the model as rows of a table."""
    parameters = sum(tensor.numel() for tensor in checkpoint["model"].values())
    rows: list[tuple[str, object]] = [("parameters", f"{parameters / 1e6:.1f} M")]
    rows += (source.sizes | source.decoder).items()
    rows += source.mean_std.items()
    if source.decoder:
        rows.append(("targets", source.targets))
    if source.num_classes is not None:
        rows.append(("num_classes", source.num_classes))
        if source.attentive:
            rows.append(("attentive_pool", True))
        else:
            rows.append(("global_pool", source.global_pool))
    if source.classes:
        names = ", ".join(source.classes[:SHOWN_CLASSES])
        if len(source.classes) > SHOWN_CLASSES:
            names += ", ... (all in config.json)"
        rows.append(("classes", names))
    return rows


def data_rows(checkpoint: dict, flags: dict) -> list[tuple[str, object]]:
    """Return the names of the data, without folders, and the number of training samples."""
    rows: list[tuple[str, object]] = [
        (f"--{name}", flags[name]) for name in DATA_FLAGS if flags.get(name)
    ]
    data = checkpoint.get("data")
    if isinstance(data, dict) and "samples" in data:
        rows.append(("training samples", data["samples"]))
    return rows


def recipe_rows(flags: dict, source: ModelSource) -> list[tuple[str, object]]:
    """Return the flags of the run that may change results, and those of other projects.

    The sizes of the model are left out.
    """
    parser = ScriptParser("")
    add_run(parser)
    add_system(parser)
    unimportant = {action.dest for action in parser._actions}
    left_out = unimportant | source.sizes.keys() | source.decoder.keys()
    left_out |= {*DATA_FLAGS, *START_FLAGS, *REPORT_FLAGS}
    names = sorted(flags.keys() - left_out)
    return [(f"--{name}", flags[name]) for name in names if flags[name] not in (None, "", [])]


def metric_rows(checkpoint: dict, source_path: str | Path) -> list[tuple[str, object]]:
    """Return the results that a checkpoint and the log of its run record."""
    rows: list[tuple[str, object]] = []
    best = checkpoint.get("best_acc1")
    if isinstance(best, (int, float)) and best >= 0:  # else there was no validation
        rows.append(("best validation top-1 (%)", f"{best:.2f}"))
    for name in ("epoch", "step", "samples_consumed"):
        if name in checkpoint:
            rows.append((name, checkpoint[name]))
    record = record_of(checkpoint, source_path)
    for name, meaning in METRICS.items():
        if isinstance(record.get(name), (int, float)):
            rows.append((meaning, f"{record[name]:.4g}"))
    return rows


def record_of(checkpoint: dict, source_path: str | Path) -> dict:
    """Return the last record up to a checkpoint in the log beside it, {} if there is none."""
    path = Path(source_path)
    flags = checkpoint.get("args")
    prefix = path.stem
    if isinstance(flags, dict) and flags.get("save_prefix"):
        prefix = flags["save_prefix"]
    log = path.with_name(f"{prefix}_log.txt")
    found: dict = {}
    if not log.is_file() or "step" not in checkpoint:
        return found
    for line in log.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # a line that was being written when the run ended
            continue
        if record.get("step", 0) <= checkpoint["step"]:
            found = record
    return found


def license_text(checkpoint: dict, flags: dict) -> str:
    """Return which licenses apply, and what the user has to fill in."""
    sentences = ["Replace `license: other` in the first lines of this file by your license."]
    family = checkpoint.get("converted_from")
    if family:
        sentences.append(
            f"These weights were converted from {family}: the license of the original weights "
            "applies to them."
        )
    for name in START_FLAGS:
        if flags.get(name):
            sentences.append(
                f"Training started from `{flags[name]}`: its license may restrict these weights."
            )
    return " ".join(sentences)


def table(rows: list[tuple[str, object]]) -> str:
    """Return rows of two cells as a Markdown table."""
    lines = ["| | |", "| --- | --- |"]
    for name, value in rows:
        if isinstance(value, (list, tuple)):
            value = ", ".join(str(item) for item in value)
        text = truncate(value, 1000).replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {name} | {text} |")
    return "\n".join(lines)
