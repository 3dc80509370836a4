"""Paths of the Hugging Face Hub: their form, the files they mean, downloads, cache and errors."""

import io
import json
import subprocess
import sys

import pytest
import torch
from fake_hub import COMMIT, running_hub, write_cache
from foreign_models import CLIPS, INSTALL, hugging_face_videomae
from launch import ROOT
from runs import pretrain_command, saved_weights
from tiny import same, tiny_mae

import pretrain
from tools.convert_checkpoint import main as convert
from tools.inspect_checkpoint import main as inspect
from util.checkpoint import load
from util.dist import UserError
from util.hub import HubAddress, choose_file, local_path, parse_address
from util.pretrained import load_encoder

REPOSITORY = "owner/repo-1.0"
PATH = f"hf:{REPOSITORY}"


def weights(value: float) -> bytes:
    """Return the content of a file of torch.save with one weight."""
    buffer = io.BytesIO()
    torch.save({"w": torch.tensor(value)}, buffer)
    return buffer.getvalue()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Return an empty cache of huggingface_hub, which is offline."""
    constants = pytest.importorskip("huggingface_hub.constants", reason=INSTALL)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


@pytest.fixture
def hub(cache, monkeypatch):
    """Return a server that huggingface_hub uses as the Hub, with the cache of `cache`."""
    from huggingface_hub import constants

    with running_hub() as server:
        template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield server


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("hf:a/b", ("a/b", "", None)),
        ("hf:a/b/", ("a/b", "", None)),
        ("hf:a/b@v1.0", ("a/b", "", "v1.0")),
        ("hf:a/b@refs/pr/1", ("a/b", "", "refs/pr/1")),
        ("hf:a/b/c/d.pth", ("a/b", "c/d.pth", None)),
        ("hf:a/b/c d.pth@main", ("a/b", "c d.pth", "main")),
        ("hf:a/b/c@448.pth", ("a/b", "c@448.pth", None)),
        ("hf:a/b/c@448.pth@main", ("a/b", "c@448.pth", "main")),
    ],
)
def test_a_path_has_a_repository_a_file_and_a_revision(text, parts):
    assert parse_address(text) == HubAddress(text, *parts)


@pytest.mark.parametrize("text", ["hf:", "hf:a", "hf:a/", "hf:/a/b", "hf:a/b@", "hf:a b/c"])
def test_a_path_of_another_form_is_refused(text):
    with pytest.raises(UserError, match=r"of the form hf:OWNER/REPO\[/FILE\]\[@REVISION\]"):
        local_path(text)


def test_other_paths_stay_as_they_are(tmp_path):
    assert local_path("runs/hf:a/b.pth").as_posix() == "runs/hf:a/b.pth"
    assert local_path(tmp_path) == tmp_path


@pytest.mark.parametrize(
    ("file", "names", "chosen"),
    [
        ("", ["pytorch_model.bin", "model.safetensors", "x.pth"], "model.safetensors"),
        ("", ["pytorch_model.bin", "x.pth"], "pytorch_model.bin"),
        ("", ["README.md", "deep/x.pth"], "deep/x.pth"),
        ("x.pth", ["x.pth", "model.safetensors"], "x.pth"),
        ("deep", ["model.safetensors", "deep/a.pth"], "deep/a.pth"),
        ("deep", ["deep/a.pth", "deep/model.safetensors"], "deep/model.safetensors"),
        ("notes.txt", ["notes.txt", "x.pth"], "notes.txt"),
    ],
)
def test_the_file_of_a_repository_is_chosen(file, names, chosen):
    assert choose_file(HubAddress("hf:a/b", "a/b", file, None), names, "a/b") == chosen


@pytest.mark.parametrize(
    ("file", "names", "message"),
    [
        ("", ["b.pth", "a.pth"], "has several files of weights. Choose one of: a.pth, b.pth."),
        ("", ["README.md"], "a/b has no file of weights. Choose one of: none."),
        ("c.pth", ["a.pth"], "a/b has no file c.pth. Choose one of: a.pth."),
        ("", ["model-00001-of-00002.safetensors"], "hf:a/b: model-00001-of-00002.safetensors is a"),
        ("m-00002-of-00002.bin", ["m-00002-of-00002.bin"], "Save them as one file:"),
        ("", [f"{i:02}.pth" for i in range(12)], "09.pth and 2 more."),
    ],
)
def test_a_file_that_is_not_there_is_an_error_with_a_list(file, names, message):
    with pytest.raises(UserError) as error:
        choose_file(HubAddress("hf:a/b", "a/b", file, None), names, "a/b")
    assert message in str(error.value)


def test_a_download_gets_the_weights_and_their_config_alone(hub):
    files = {"sub/x.pth": weights(1), "sub/config.json": b"{}", "config.json": b"{}", "big": b"1"}
    hub.repositories[REPOSITORY] = files
    path = local_path(f"{PATH}/sub/x.pth")
    assert path.read_bytes() == files["sub/x.pth"]
    snapshot = path.parent.parent
    found = [each for each in snapshot.rglob("*") if each.is_file()]
    assert {each.relative_to(snapshot).as_posix() for each in found} == {
        "sub/x.pth",
        "sub/config.json",
    }


def test_a_downloaded_file_is_used_without_a_connection(hub, monkeypatch):
    hub.repositories[REPOSITORY] = {"x.pth": weights(1), "[y]*.pth": weights(2)}
    assert load(f"{PATH}/x.pth")["w"] == 1
    assert load(f"{PATH}/[y]*.pth@{COMMIT}")["w"] == 2
    before = list(hub.requests)
    load(f"{PATH}/x.pth")
    assert not [path for path in hub.requests[len(before) :] if "/resolve/" in path]
    hub.repositories.clear()
    hub.denied[REPOSITORY] = (503, "")  # the Hub is down
    assert load(f"{PATH}/x.pth")["w"] == 1
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert load(f"{PATH}/x.pth")["w"] == 1


@pytest.mark.parametrize(
    ("path", "denied", "words"),
    [
        ("hf:no/where", None, "no public repository no/where. .* run `hf auth login`"),
        (PATH, (403, "GatedRepo"), "is gated. Request access at https://.* `hf auth login`"),
        (f"{PATH}@v9", None, f"{REPOSITORY} has no revision v9"),
        (f"{PATH}/z.pth", None, f"{REPOSITORY} has no file z.pth. Choose one of: x.pth"),
        ("hf:-a/b", None, "the download failed"),
    ],
)
def test_what_the_hub_refuses_is_one_line(path, denied, words, hub):
    hub.repositories[REPOSITORY] = {"x.pth": weights(1)}
    if denied:
        hub.denied[REPOSITORY] = denied
    with pytest.raises(UserError, match=f"^{path}: .*{words}") as error:
        load(path)
    assert "\n" not in str(error.value)


def test_without_a_connection_the_cache_is_listed(cache):
    with pytest.raises(UserError, match=f"{PATH} is not cached, and HF_HUB_OFFLINE is set. Run"):
        load(PATH)
    write_cache(cache, REPOSITORY, {"config.json": b"{}", "sub/x.pth": weights(3)})
    assert load(PATH)["w"] == 3
    assert load(f"{PATH}/sub@main")["w"] == 3
    with pytest.raises(UserError, match=f"the cached part of {REPOSITORY} has no file y.pth"):
        load(f"{PATH}/y.pth")
    with pytest.raises(UserError, match=f"{PATH}@other is not cached"):
        load(f"{PATH}@other")


def test_a_hub_that_cannot_be_reached_is_one_line(hub):
    hub.server_close()  # connections are refused from now on
    with pytest.raises(UserError, match="the Hugging Face Hub cannot be reached") as error:
        load(PATH)
    assert "\n" not in str(error.value)


def test_a_missing_package_is_one_line():
    program = f"""
import sys
sys.modules["huggingface_hub"] = None
sys.path.insert(0, {str(ROOT)!r})
from util.checkpoint import load
from util.dist import run_script
run_script(lambda: load("hf:a/b"))
"""
    failed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert failed.returncode == 2
    assert failed.stderr == (
        "error: hf:a/b needs huggingface_hub, which is not installed: pip install huggingface_hub\n"
    )


def test_converted_and_foreign_folders_load_by_their_hub_path(cache, tmp_path, capsys):
    mae = tiny_mae()
    torch.save({"model": mae.state_dict(), "config": mae.config}, tmp_path / "run.pth")
    convert([str(tmp_path / "run.pth"), str(tmp_path / "ours"), "--to", "safetensors"])
    hugging_face_videomae("VideoMAEForPreTraining").save_pretrained(tmp_path / "theirs")
    for name in ("ours", "theirs"):
        folder = tmp_path / name
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        write_cache(cache, f"owner/{name}", files)
        clips = CLIPS
        if name == "ours":
            clips = torch.randn(1, 3, 8, 32, 32)
        expected = load_encoder(folder)(clips)
        assert torch.equal(load_encoder(f"hf:owner/{name}")(clips), expected)
        inspect([f"hf:owner/{name}"])
        assert f"hf:owner/{name}" in capsys.readouterr().out
    assert json.loads((tmp_path / "ours/config.json").read_text())["config"] == mae.config


def test_a_run_resumes_from_the_hub(cache, videos, tmp_path):
    pretrain.main(pretrain_command(videos, tmp_path / "a", "--max_steps", "1"))
    write_cache(cache, REPOSITORY, {"run.pth": (tmp_path / "a/run.pth").read_bytes()})
    for steps in ("2", "3"):  # the second time from its own checkpoint
        more = ["--max_steps", steps]
        pretrain.main(pretrain_command(videos, tmp_path / "a", *more))
        pretrain.main(pretrain_command(videos, tmp_path / "b", *more, "--resume", PATH))
    assert same(saved_weights(tmp_path / "a"), saved_weights(tmp_path / "b"))
