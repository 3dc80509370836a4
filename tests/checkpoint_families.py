"""Small random checkpoints of every family, and the table of what each can be used for.

    python tests/checkpoint_families.py      write the table into docs/checkpoints.md

Each file has the names, entries and shapes that the family's own code saves. Models have two blocks
of width 64, and take 4 frames of 32 x 32 pixels.
"""

import argparse
import contextlib
import io
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from foreign_models import (
    fuse_qkv,
    hugging_face_videomae,
    randomized,
    timm_vit,
    videomae_file,
)
from make_videos import write_folder

import finetune
import pretrain
from data.manifest import Samples, walk, write_manifest
from models_mae import MaskedAutoencoderViT
from models_vit import VideoEncoder, VisionTransformer
from tools import (
    convert_checkpoint,
    extract_features,
    inspect_checkpoint,
    predict,
    visualize,
)
from util.checkpoint import load
from util.checkpoint_formats import parse_checkpoint
from util.class_names import class_list
from util.dist import UserError
from util.model_source import IMAGE_CLIP, describe
from util.pixels import VIDEO_MEAN, VIDEO_STD
from util.pretrained import load_classifier

PAGE = ROOT / "docs" / "checkpoints.md"
BEGIN = "<!-- made by tests/checkpoint_families.py -->\n"
END = "<!-- end -->\n"
SIZE = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 64,
    "depth": 2,
    "num_heads": 2,
    "num_frames": 4,
    "t_patch_size": 2,
}
DECODER = {
    "decoder_embed_dim": 512,
    "decoder_depth": 1,
    "decoder_num_heads": 16,
    "pred_t_dim": 4,
}
JOINT = {"cls_embed": False, "sep_pos_embed": False}
PIXELS = {"mean": VIDEO_MEAN, "std": VIDEO_STD}
RUN = (
    "--device cpu --num_workers 0 --lr 0.001 --max_steps 1 --batch_size_per_gpu 2 --decoder pyav "
    "--save_prefix run"
).split()
READ = "--device cpu --num_workers 0 --batch_size_per_gpu 4 --decoder pyav".split()


def autoencoder(**changes) -> MaskedAutoencoderViT:
    """Return a random autoencoder."""
    return randomized(MaskedAutoencoderViT(**SIZE | DECODER | changes))


def classifier(**changes) -> VisionTransformer:
    """Return a random classifier of two classes."""
    return randomized(VisionTransformer(**SIZE | {"num_classes": 2} | changes))


def released_mae_st(folder: Path) -> dict:
    """Return mae_st's released layout: an encoder, and a decoder in SlowFast's style."""
    weights = VideoEncoder(**SIZE).state_dict()
    other_decoder = {
        "decoder_pos_embed": torch.zeros(1, 33, 512),
        "decoder_embed.weight": torch.zeros(512, 64),
        "mask_token": torch.zeros(1, 1, 512),
        "pred_head.transforms.0.0.attn.qkv.weight": torch.zeros(1536, 512),
        "pred_head.projections.0.weight": torch.zeros(192, 512),
    }
    return {"model_state": weights | other_decoder}


def slowfast(folder: Path) -> dict:
    """Return SlowFast's layout of a classifier."""
    weights = fuse_qkv(classifier().state_dict())
    return {"model_state": {n.replace("head.", "head.projection."): v for n, v in weights.items()}}


def videomae_pretrained(folder: Path) -> dict:
    """Return VideoMAE's own layout of an autoencoder, with its flags."""
    model = autoencoder(**JOINT)
    tensors = {
        f"encoder.{name}": value
        for name, value in videomae_file(model, "").items()
        if not name.startswith(("decoder", "mask_token", "encoder_to"))
    }
    decoder = fuse_qkv(model.state_dict())
    for name, value in decoder.items():
        if name.startswith(("decoder_blocks", "decoder_norm")) and ".qkv.bias" not in name:
            tensors[name.replace("decoder_", "decoder.")] = value
    attn = "decoder.blocks.0.attn"
    tensors |= {f"{attn}.{part}_bias": torch.zeros(512) for part in "qv"}
    tensors["encoder_to_decoder.weight"] = decoder["decoder_embed.weight"]
    tensors["mask_token"] = decoder["mask_token"]
    for part in ("weight", "bias"):
        tensors[f"decoder.head.{part}"] = decoder[f"decoder_pred.{part}"]
    flags = argparse.Namespace(input_size=32, num_frames=4, sampling_rate=4)
    return {"model": tensors, "args": flags}


def videomae_finetuned(folder: Path, **entries) -> dict:
    """Return VideoMAE's own layout of a classifier."""
    weights = videomae_file(classifier(**JOINT), "")
    names = {name: re.sub(r"^norm\.", "fc_norm.", name) for name in weights}
    return {"module": {names[name]: value for name, value in weights.items()}} | entries


def hugging_face(kind: str, folder: Path) -> Path:
    """Write a folder of Hugging Face VideoMAE and return it."""
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 256}
    hugging_face_videomae(kind, **sizes).save_pretrained(folder / "hf")
    return folder / "hf"


def image_mae(folder: Path) -> dict:
    """Return image MAE's layout of an autoencoder, whose decoder predicts images."""
    image = timm_vit(embed_dim=64, num_heads=2, num_classes=0).state_dict()
    image |= {
        "decoder_pred.weight": torch.zeros(192, 512),
        "decoder_embed.weight": torch.zeros(512, 64),
        "decoder_pos_embed": torch.zeros(1, 17, 512),
        "mask_token": torch.zeros(1, 1, 512),
    }
    return {"model": {name.replace("fc_norm.", "norm."): value for name, value in image.items()}}


def vjepa(folder: Path) -> dict:
    """Return V-JEPA 2's layout of an encoder."""
    names = ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight")
    return {"target_encoder": {f"module.backbone.{name}": torch.zeros(2) for name in names}}


def ours(model: VideoEncoder, **config) -> dict:
    """Return a checkpoint of ours, without optimizer."""
    return {"model": model.state_dict(), "config": model.config | PIXELS | config}


OPTIMIZED = argparse.Namespace(save_prefix="x", sampling_rate=8)
MAE_ST = argparse.Namespace(lr=0.1, sampling_rate=4)
# family: the contents of its file, or a function of a folder that returns them or their path
FAMILIES: dict[str, Callable[[Path], dict | Path]] = {
    "ours, pretrained": lambda _: ours(autoencoder()),
    "ours, finetuned": lambda _: ours(classifier(), classes=["class_0", "class_1"]),
    "optimized-stmae, pretrained": lambda _: {
        "model": autoencoder().state_dict(),
        "args": OPTIMIZED,
    },
    "optimized-stmae, finetuned": lambda _: {"model": classifier().state_dict(), "args": OPTIMIZED},
    "hvm-1, pretrained": lambda _: autoencoder().state_dict(),
    "hvm-1, finetuned": lambda _: classifier().state_dict(),
    "mae_st's code, pretrained": lambda _: {
        "model": fuse_qkv(autoencoder().state_dict()),
        "args": MAE_ST,
    },
    "mae_st's code, finetuned": lambda _: {"model": classifier().state_dict(), "args": MAE_ST},
    "mae_st's released weights": released_mae_st,
    "SlowFast, finetuned": slowfast,
    "VideoMAE, pretrained": videomae_pretrained,
    "VideoMAE, finetuned": lambda folder: videomae_finetuned(
        folder, args=argparse.Namespace(input_size=32, num_frames=4, sampling_rate=4)
    ),
    "VideoMAE v2, distilled": videomae_finetuned,
    "Hugging Face VideoMAE, pretrained": lambda f: hugging_face("VideoMAEForPreTraining", f),
    "Hugging Face VideoMAE, finetuned": lambda f: hugging_face("VideoMAEForVideoClassification", f),
    "image MAE, pretrained": image_mae,
    "timm ViT, class token": lambda _: timm_vit(
        embed_dim=64, num_heads=2, num_classes=2
    ).state_dict(),
    "timm ViT, mean": lambda _: timm_vit(
        embed_dim=64, num_heads=2, num_classes=2, global_pool="avg"
    ).state_dict(),
    "V-JEPA 2": vjepa,
}
NEEDED = {  # flags that a family's files need, because nothing in them tells
    "hvm-1, finetuned": "--cls_token",
    "VideoMAE v2, distilled": "--img_size 32 --num_frames 4",
    "image MAE, pretrained": "--num_frames 4 --t_patch_size 2",
    "timm ViT, class token": "--num_frames 4 --t_patch_size 2",
    "timm ViT, mean": "--num_frames 4 --t_patch_size 2",
}


class Sample:
    """The videos that all uses read, and where they write."""

    def __init__(self, folder: Path):
        """Write four videos in two classes below a folder."""
        self.folder = folder
        self.videos = folder / "videos"
        write_folder(self.videos, 4)
        self.paths = walk(str(self.videos), (".mp4",))
        self.runs = 0

    def new_folder(self) -> Path:
        """Return a folder for the files of the next run."""
        self.runs += 1
        return self.folder / f"run{self.runs}"

    def labeled(self, classes: list[str]) -> str:
        """Return a manifest of the videos, labeled alternately by the first two classes."""
        manifest = self.folder / "labeled.csv"
        labels = [classes[i % 2] for i in range(len(self.paths))]
        write_manifest(manifest, Samples(self.paths, labels))
        return str(manifest)


def write_family(name: str, folder: Path) -> Path:
    """Write the file of a family, and return its path."""
    torch.manual_seed(0)
    content = FAMILIES[name](folder)
    if isinstance(content, Path):
        return content
    path = folder / f"{re.sub('[^a-z0-9]+', '_', name.lower())}.pth"
    torch.save(content, path)
    return path


def init_from(path: Path, flags: list[str], sample: Sample) -> str:
    """Pretrain one update from the file."""
    flags = sizes_only(flags)
    out = ["--output_dir", str(sample.new_folder()), "--data_dirs", str(sample.videos)]
    system = ["--recon_every", "0", "--decoder_embed_dim", "32", "--decoder_num_heads", "2"]
    if has_decoder(path, flags):
        system = ["--recon_every", "0"]
    system += [] if "--num_frames" in flags else ["--num_frames", "4"]
    pretrain.main([*RUN, *out, *system, *flags, "--init_from", str(path)])
    return "encoder and decoder" if has_decoder(path, flags) else "encoder"


def finetune_from(path: Path, flags: list[str], sample: Sample) -> str:
    """Finetune one update from the file, on videos of its own classes."""
    source = describe_file(path, flags)
    classes = class_list(path, source.num_classes or 2, source.classes, "")
    data = [f"--{kind}_csv={sample.labeled(classes)}" for kind in ("train", "val")]
    out = ["--output_dir", str(sample.new_folder())]
    printed = run(finetune, [*RUN, *out, *data, *flags, "--finetune", str(path)])
    return "encoder and head" if "head of" in printed and "is kept" in printed else "encoder"


def evaluate(path: Path, flags: list[str], sample: Sample) -> str:
    """Evaluate the file's classifier; its accuracy is that of its own predictions."""
    model = load_classifier(path, given=given_by(flags))
    data = ["--val_csv", sample.labeled(model.config["classes"]), "--eval", *RUN[:4], *RUN[-4:]]
    out = ["--output_dir", str(sample.new_folder()), "--resume", str(path)]
    printed = run(finetune, [*data, *out, *flags])
    assert re.search(r"top-1 \d+\.\d\d %", printed), printed
    return "yes"


def classify(path: Path, flags: list[str], sample: Sample) -> str:
    """Predict the classes of videos with the file's head, and compare with the model itself."""
    out = sample.new_folder()
    out.mkdir()
    predict.main(
        ["--checkpoint", str(path), "--output", f"{out}/pred.csv", *READ, *flags]
        + [str(sample.videos)]
    )
    lines = Path(out, "pred.csv").read_text().splitlines()
    assert len(lines) == 1 + len(sample.paths)
    return "yes"


def extract(path: Path, flags: list[str], sample: Sample) -> str:
    """Extract the features of videos."""
    out = sample.new_folder()
    flags = sizes_only(flags)
    source = [str(path), "--data_dir", str(sample.videos)]
    extract_features.main([*source, "--output", f"{out}/features.npz", *READ, *flags])
    return "yes"


def draw(path: Path, flags: list[str], sample: Sample) -> str:
    """Draw predictions of hidden patches."""
    out = sample.new_folder()
    flags = sizes_only(flags)
    source = [str(path), "--data_dirs", str(sample.videos), "--clips", "1"]
    visualize.main([*source, "--output_dir", str(out), "--device", "cpu", *flags])
    assert len(list(out.glob("*.png"))) == 1
    return "yes"


def inspect(path: Path, flags: list[str], sample: Sample) -> str:
    """List the contents of the file, without flags."""
    printed = run(inspect_checkpoint, [str(path)])
    assert "tensors" in printed
    return "yes"


def convert(path: Path, flags: list[str], sample: Sample) -> str:
    """Convert the file to our layout, to safetensors, and back: encoders and heads stay equal."""
    flags = sizes_only(flags)
    folder = sample.new_folder()
    native = folder / "native.pth"
    back = folder / "back.pth"
    convert_checkpoint.main([str(path), str(native), "--to", "native", *flags])
    convert_checkpoint.main([str(native), str(folder / "tensors"), "--to", "safetensors"])
    convert_checkpoint.main([str(folder / "tensors"), str(back), "--to", "native"])
    given = given_by(flags)
    original = parse_checkpoint(load(path), given, path, IMAGE_CLIP)
    for other in (native, folder / "tensors", back):
        found = parse_checkpoint(load(other), {}, other)
        assert found.sizes == original.sizes
        for part in ("weights", "decoder", "head"):
            assert_equal_tensors(getattr(found, part), getattr(original, part))
    return "yes"


USES: dict[str, Callable[[Path, list[str], Sample], str]] = {
    "`--init_from`": init_from,
    "`--finetune`": finetune_from,
    "`--eval`": evaluate,
    "`predict`": classify,
    "`extract_features`": extract,
    "`visualize`": draw,
    "`inspect_checkpoint`": inspect,
    "`convert_checkpoint`": convert,
}
REASONS = {  # part of a message: its short form in the table
    "has no classifier": "no head",
    "decoder": "no decoder",
    "rotary positions": "refused",
}


def outcome(use: Callable, path: Path, flags: list[str], sample: Sample) -> str:
    """Return what comes of a use, in the words of the table."""
    try:
        return use(path, flags, sample)
    except UserError as error:
        for part, reason in REASONS.items():
            if part in str(error):
                return reason
        raise


def row(name: str, folder: Path) -> str:
    """Return a family's line of the table."""
    folder.mkdir(parents=True)
    path = write_family(name, folder)
    sample = Sample(folder)
    flags = NEEDED.get(name, "").split()
    with contextlib.redirect_stdout(io.StringIO()):
        cells = [outcome(use, path, flags, sample) for use in USES.values()]
    needed = re.sub(r" \d+", "", NEEDED.get(name, ""))
    shown = " ".join(f"`{flag}`" for flag in needed.split())
    return f"| {' | '.join([name, shown, *cells])} |"


def table(rows: list[str]) -> str:
    """Return the whole table."""
    columns = ["file", "flags that it needs", *USES]
    head = [f"| {' | '.join(columns)} |", f"| {' | '.join('---' for _ in columns)} |"]
    return "\n".join([*head, *rows]) + "\n"


def run(program, words: list[str]) -> str:
    """Run a program in this process, and return what it prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        program.main(words)
    return printed.getvalue()


def given_by(flags: list[str]) -> dict:
    """Return flags as `given` of the loading functions."""
    given: dict = {}
    for i, flag in enumerate(flags):
        if flag in ("--cls_token", "--global_pool"):
            given["global_pool"] = flag == "--global_pool"
        elif flag.startswith("--"):
            given[flag.removeprefix("--")] = int(flags[i + 1])
    return given


def sizes_only(flags: list[str]) -> list[str]:
    """Return flags without the read-out of a classifier."""
    return [flag for flag in flags if flag not in ("--cls_token", "--global_pool")]


def describe_file(path: Path, flags: list[str]):
    """Return what a file says about its model, completed by the flags."""
    return describe(parse_checkpoint(load(path), given_by(flags), path, IMAGE_CLIP), path)


def has_decoder(path: Path, flags: list[str]) -> bool:
    """Return whether a file has a decoder that our model can express."""
    return bool(describe_file(path, flags).decoder)


def assert_equal_tensors(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Assert that two models have the same tensors."""
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        rows = [row(name, Path(folder, str(i))) for i, name in enumerate(FAMILIES)]
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + BEGIN + table(rows) + END + after)
