"""Checkpoints on the Hugging Face Hub: hf:OWNER/REPO[/FILE][@REVISION] wherever a path is taken.

FILE is a file or a folder of the repository. REVISION is a branch, a tag or a commit.
"""

import glob
import posixpath
import re
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from util.dist import UserError, rank

PREFIX = "hf:"
WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
PREFERRED = ("model.safetensors", "pytorch_model.bin")  # the first one that a folder has
MAX_LISTED = 10  # files in an error message
TIMEOUT = 20  # seconds to wait for the list of a repository's files


class HubAddress(NamedTuple):
    """The parts of hf:OWNER/REPO[/FILE][@REVISION]."""

    text: str  # as given
    repository: str  # OWNER/REPO
    file: str  # "": to be chosen
    revision: str | None  # None: the default branch


def is_hub_path(path: str | Path) -> bool:
    """Return whether a path is one of the Hugging Face Hub."""
    return str(path).startswith(PREFIX)


def local_path(path: str | Path) -> Path:
    """Return the local file of a checkpoint, which is downloaded if it is on the Hub.

    Other paths than hf:... are returned as they are. A downloaded file is in the cache of
    huggingface_hub, with config.json beside it if the repository has one. If no FILE is given, it
    is the first of PREFERRED that exists, or the only file of weights. Without a connection to the
    Hub, files come from the cache alone.

    Several processes may call this at once: huggingface_hub locks each file while it downloads it.
    Raises UserError.
    """
    if not is_hub_path(path):
        return Path(path)
    address = parse_address(str(path))
    hub = _import_hub(address)
    if rank() > 0:
        hub.utils.disable_progress_bars()
    try:
        names, source = _list_files(hub, address)
        name = choose_file(address, names, source)
        config = posixpath.join(posixpath.dirname(name), "config.json")
        wanted = [glob.escape(each) for each in (name, config) if each in names]
        folder = hub.snapshot_download(
            address.repository, revision=address.revision, allow_patterns=wanted
        )
    except UserError:
        raise
    except Exception as error:  # those of huggingface_hub, of its HTTP library and of the disk
        raise _describe_failure(hub, address, error) from error
    return Path(folder, name)


def parse_address(text: str) -> HubAddress:
    """Return the parts of hf:OWNER/REPO[/FILE][@REVISION]. Raises UserError for another form.

    An @ inside the name of a file, as in model@448.pth, does not start a revision.
    """
    revision: str | None
    location, at, revision = text.removeprefix(PREFIX).rpartition("@")
    if not at or revision.endswith(WEIGHT_SUFFIXES):
        location = text.removeprefix(PREFIX)
        revision = None
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:/(.*[^/]))?/?", location)
    if not match or revision == "":
        raise UserError(f"{text}: pass a path of the form hf:OWNER/REPO[/FILE][@REVISION].")
    return HubAddress(text, match[1], match[2] or "", revision)


def choose_file(address: HubAddress, names: list[str], source: str) -> str:
    """Return the file of weights that an address means, of the files in its repository.

    source: words for where these files are, for messages. Raises UserError if there is no file of
    weights, or more than one.
    """
    if address.file in names:
        refuse_parts(address.text, [address.file])
        return address.file
    weights = sorted(name for name in names if name.endswith(WEIGHT_SUFFIXES))
    folder = ""
    if address.file:
        folder = address.file + "/"
    inside = [name for name in weights if name.startswith(folder)]
    for preferred in PREFERRED:
        if folder + preferred in inside:
            return folder + preferred
    refuse_parts(address.text, inside)
    if len(inside) == 1:
        return inside[0]
    if inside:
        problem = f"{source} has several files of weights"
    elif address.file:
        problem = f"{source} has no file {address.file}"
    else:
        problem = f"{source} has no file of weights"
    choices = inside or weights
    listed = ", ".join(choices[:MAX_LISTED]) or "none"
    if len(choices) > MAX_LISTED:
        listed += f" and {len(choices) - MAX_LISTED} more"
    raise UserError(f"{address.text}: {problem}. Choose one of: {listed}.")


def refuse_parts(path: str | Path, names: list[str]) -> None:
    """Raise UserError if files of weights are parts of one large checkpoint of Hugging Face."""
    parts = [name for name in names if re.search(r"-\d{5}-of-\d{5}\.\w+$", name)]
    if parts:
        raise UserError(
            f"{path}: {parts[0]} is a part of weights that are split into several files. Save them "
            'as one file: model.save_pretrained(FOLDER, max_shard_size="100GB").'
        )


def _import_hub(address: HubAddress) -> ModuleType:
    """Return the module huggingface_hub. Raises UserError if it is not installed."""
    try:
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError:
        raise UserError(
            f"{address.text} needs huggingface_hub, which is not installed: "
            "pip install huggingface_hub"
        ) from None
    return huggingface_hub


def _list_files(hub: ModuleType, address: HubAddress) -> tuple[list[str], str]:
    """Return the names of the repository's files, and words for where they are.

    Without a connection these are the files in the cache. Raises UserError if it has none.
    """
    errors = hub.errors
    repository = address.repository
    try:
        info = hub.HfApi().model_info(repository, revision=address.revision, timeout=TIMEOUT)
        return [file.rfilename for file in info.siblings], repository
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, ValueError):
        raise
    except Exception as error:  # no connection: its class is that of the HTTP library
        try:
            folder = Path(
                hub.snapshot_download(
                    repository,
                    revision=address.revision,
                    local_files_only=True,
                    allow_patterns=[],
                )
            )
        except errors.LocalEntryNotFoundError:
            reason = f"the Hugging Face Hub cannot be reached ({_one_line(error)})"
            if isinstance(error, errors.OfflineModeIsEnabled):
                reason = "HF_HUB_OFFLINE is set"
            raise UserError(
                f"{address.text} is not cached, and {reason}. Run the command once with a "
                "connection."
            ) from error
        files = [file for file in folder.rglob("*") if file.is_file()]
        cached = [file.relative_to(folder).as_posix() for file in files]
        return cached, f"the cached part of {repository}"


def _describe_failure(hub: ModuleType, address: HubAddress, error: Exception) -> UserError:
    """Return the error to raise for a failure of huggingface_hub."""
    errors = hub.errors
    repository = address.repository
    if isinstance(error, errors.GatedRepoError):
        message = (
            f"{repository} is gated. Request access at https://huggingface.co/{repository}, "
            "then run `hf auth login`."
        )
    elif isinstance(error, errors.RepositoryNotFoundError):
        message = (
            f"the Hugging Face Hub has no public repository {repository}. "
            "Check its name; for a private one, run `hf auth login`."
        )
    elif isinstance(error, errors.RevisionNotFoundError):
        message = f"{repository} has no revision {address.revision}. Choose one of its branches."
    else:
        message = f"the download failed ({_one_line(error)})"
    return UserError(f"{address.text}: {message}")


def _one_line(error: Exception) -> str:
    """Return an error's type and message in one line."""
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text}"
