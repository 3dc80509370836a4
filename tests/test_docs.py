"""README and docs: commands parse, links resolve, measured tables are those of the results.

A table of measurements follows the line `<!-- rows of FILE -->`. It may leave out rows and columns
of FILE, a Markdown table in benchmarks/results, which a benchmark renders from its JSON.
"""

import itertools
import json
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
import torch

from models_mae import MaskedAutoencoderViT
from models_vit import VideoEncoder, VisionTransformer, named_size
from util.dist import UserError

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SCRIPTS = ("pretrain.py", "finetune.py", "finetune_on_image.py")
PAGES = [
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/recipes.md", "samples/README.md"),
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")),
]
OF_THE_PAST = ("CHANGELOG.md", "docs/migrating.md")  # they also name commands of older versions
GENERATED = "docs/decoders.md"
LINE = 100  # columns
EARLY_BREAK = 80  # a line of a paragraph that ends before this column has room for the next word
CLIP = {"img_size": 224, "num_frames": 16, "t_patch_size": 2}
DECODER = {"decoder_embed_dim": 512, "decoder_depth": 4, "decoder_num_heads": 16, "pred_t_dim": 16}


def read(page: str) -> str:
    """Return the text of a page."""
    return (ROOT / page).read_text()


def result(name: str) -> dict:
    """Return the JSON of a benchmark."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def without_code(text: str) -> str:
    """Return a page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M)


def commands(text: str, inline: bool) -> list[list[str]]:
    """Return the words of every command in bash blocks and, if `inline`, in code spans."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", text, flags=re.S | re.M)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    if inline:
        spans = re.findall(r"`([^`\n]+)`", without_code(text))
        lines += [span for span in spans if re.match(r"(python|torchrun|make|sbatch) ", span)]
    return [shlex.split(line) for line in lines if line.strip()]


def check_flags(name: str, words: list[str], capsys) -> None:
    """Parse a command line of a script or tool, or look for its flags in --help."""
    module = import_module(name)
    if hasattr(module, "get_parser"):
        module.get_parser().parse_args(words)
        return
    with pytest.raises(SystemExit):
        module.main(["--help"])
    shown = capsys.readouterr().out
    assert [word for word in words if word.startswith("--") and word not in shown] == []


def check_command(words: list[str], capsys) -> str:
    """Check one command and return what it runs; "" if that is no program of the repository."""
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", read("Makefile"), flags=re.M), words[1]
        return words[1]
    if words[0] == "sbatch":
        assert (ROOT / words[1]).exists()
        check_flags("pretrain", words[4:], capsys)
        return words[1]
    if "-m" in words and "torchrun" not in words:
        start = words.index("-m") + 1
        assert (ROOT / (words[start].replace(".", "/") + ".py")).exists(), words[start]
        if "--help" not in words:
            check_flags(words[start], words[start + 1 :], capsys)
        return words[start]
    programs = [word for word in words if word.endswith((".py", ".sh"))]
    if not programs:
        return ""
    program = programs[0]
    flags = words[words.index(program) + 1 :]
    if program in SCRIPTS and "--help" not in flags:
        check_flags(Path(program).stem, flags, capsys)
    elif program not in SCRIPTS:
        source = read(program)
        assert [flag for flag in flags if flag.startswith("--") and flag not in source] == []
    return program


@pytest.mark.parametrize("page", PAGES)
def test_every_command_parses(page, capsys):
    for words in commands(read(page), inline=page not in OF_THE_PAST):
        check_command(words, capsys)


def test_commands_are_found_and_wrong_ones_fail(capsys):
    text = "```bash\npython -u pretrain.py --data_dirs A \\\n    --lr 1\n```\nRun `make nothing`."
    right, wrong = commands(text, inline=True)
    assert check_command(right, capsys) == "pretrain.py"
    with pytest.raises(AssertionError):
        check_command(wrong, capsys)
    for unknown in ("python pretrain.py --no_such_flag", "python -m tools.reencode A B --nothing"):
        with pytest.raises((AssertionError, UserError)):
            check_command(unknown.split(), capsys)


def test_the_readme_shows_every_script_and_the_two_targets():
    shown = [" ".join(words) for words in commands(read("README.md"), inline=False)]
    assert shown[:2] == ["make demo", "make test"]
    for script in SCRIPTS:
        (command,) = [line for line in shown if f"python {script}" in line]
        assert command.count(" --") <= 4


def slug(heading: str) -> str:
    """Return the anchor that GitHub gives to a heading."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


def broken_links(page: str, text: str) -> list[str]:
    """Return the relative links of a page whose file or anchor does not exist."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(text)):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        headings = []
        if file.is_file() and file.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", without_code(file.read_text()), flags=re.M)
        if not file.exists() or (anchor and anchor not in map(slug, headings)):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_resolves(page):
    assert broken_links(page, read(page)) == []


def test_broken_links_are_found():
    text = "[a](README.md) [b](docs/nothing.md) [c](docs/data.md#no-such-heading) [d](#start)"
    assert broken_links("README.md", text) == ["docs/nothing.md", "docs/data.md#no-such-heading"]


@pytest.mark.parametrize("page", [page for page in PAGES if page not in OF_THE_PAST])
def test_every_named_file_exists(page):
    named = re.findall(r"`([\w./]+\.(?:py|sh|sbatch|txt))`", read(page))
    folders = ("", "util", "data", "tools", "tests")
    missing = [
        name for name in named if not any((ROOT / folder / name).exists() for folder in folders)
    ]
    assert missing == []


def rows_of(lines: list[str]) -> list[dict[str, str]]:
    """Return the rows of a Markdown table as dictionaries by column."""
    cells = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def foreign_rows(text: str) -> list[dict[str, str]]:
    """Return the rows of marked tables that their source does not have."""
    foreign = []
    for source, table in re.findall(r"<!-- rows of (\S+) -->\n((?:\|.*\n)+)", text):
        lines = [line for line in read(source).splitlines() if line.startswith("|")]
        starts = [index - 1 for index, line in enumerate(lines) if line.startswith("| ---")]
        known = []
        for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
            known += rows_of(lines[start:end])
        shown = rows_of(table.splitlines())
        foreign += [row for row in shown if not any(row.items() <= each.items() for each in known)]
    return foreign


@pytest.mark.parametrize("page", PAGES)
def test_f14_measured_tables_are_those_of_the_results(page):
    assert foreign_rows(read(page)) == []


def test_f14_a_wrong_number_in_a_marked_table_is_found():
    text = read("README.md")
    assert text.count("<!-- rows of ") == 1
    assert len(foreign_rows(text.replace("83.1 (", "83.2 ("))) == 1
    assert sum(read(page).count("<!-- rows of ") for page in PAGES) >= 8


def test_f14_the_readme_has_the_probes_of_the_results():
    lines = (RESULTS / "learning_medium.md").read_text().splitlines()
    table = rows_of([line for line in lines if line.startswith("|")])
    (row,) = [row for row in table if row["labels a class"] == "16"]
    columns = ("pretrained", "attentive probe, --probe", "linear probe, --probe")
    finetuned, attentive, linear = (row[name].partition(" ")[0] for name in columns)
    text = " ".join(read("README.md").split())
    assert f"finetuned {finetuned}, attentive probe {attentive}, linear {linear}." in text


def body(table: str) -> list[str]:
    """Return the rows of Markdown tables, without their headers."""
    lines = table.splitlines()
    heads = {index - 1 for index, line in enumerate(lines) if line.startswith("| ---")}
    return [line for index, line in enumerate(lines) if line[:1] == "|" and index not in heads]


@pytest.mark.parametrize(
    ("name", "benchmark"),
    [
        ("learning", "learning"),
        ("learning_medium", "learning"),
        ("learning_small", "learning"),
        ("readers", "readers"),
        ("train_step_vit-h14_pretrain_cuda", "train_step"),
        ("train_step_vit-h14_pretrain_cuda_before", "train_step"),
        ("train_step_tiny_pretrain_cpu", "train_step"),
        ("epoch_end", "epoch_end"),
        ("epoch_end_cuda", "epoch_end"),
    ],
)
def test_tables_of_results_are_made_from_the_json(name, benchmark):
    table = import_module(f"benchmarks.{benchmark}").table
    more = [name] if benchmark == "epoch_end" else []
    made = table(result(name), *more)
    assert body((RESULTS / f"{name}.md").read_text()) == body(made)


def test_the_table_of_the_data_pipeline_is_made_from_the_json():
    made = import_module("benchmarks.data_pipeline").tables()
    assert body((RESULTS / "data_pipeline.md").read_text()) == body(made)


def test_the_table_of_attention_is_made_from_the_json():
    written = (RESULTS / "attention_cuda.md").read_text()
    for shape, kernels in result("attention_cuda")["shapes"].items():
        cells = [f"{kernel['ms']} ms, {kernel['tflops']} TFLOP/s" for kernel in kernels.values()]
        assert f"| {shape} | {' | '.join(cells)} |" in written


def test_the_table_of_the_profile_is_made_from_the_json():
    profile = result("profile_vit-h14_pretrain_cuda")
    written = (RESULTS / "profile_vit-h14_pretrain_cuda.md").read_text()
    for kind, ms in profile["kinds_ms"].items():
        assert f"| {kind} | {ms} |" in written
    for row in profile["kernels"]:
        assert f"| {row['kind']} | {row['calls']:.0f} | {row['ms']:.2f} |" in written


def speed_claims() -> dict[str, list[str]]:
    """Return the numbers about training steps in prose, computed from the results, by page."""
    cpu = {row["variant"]: row for row in result("train_step_tiny_pretrain_cpu")["rows"]}
    gpu = {row["variant"]: row for row in result("train_step_vit-h14_pretrain_cuda")["rows"]}
    sdpa, ours = (cpu[name]["median_ms"] for name in ("plain sdpa", "ours"))
    compiled = gpu["ours compiled"]
    mfu = f"{compiled['mfu_datasheet']:.1%}".replace("%", " %")
    cudnn = f"{gpu['ours compiled, cudnn']['clips_per_s']:.0f}"
    waits = [run["first_wait_in_steps"] for run in result("epoch_end_cuda")["runs"]]
    wait = f"{100 * min(waits):.1f} to {100 * max(waits):.1f} % of a step"
    memory = f"{compiled['peak_gib']:.1f} GiB"
    ceiling = result("train_step_vit-h14_pretrain_cuda")["ceiling_tflops"]
    return {
        "README.md": [f"{memory} at 64 clips"],
        "docs/performance.md": [
            f"in both, ours is {sdpa / ours:.2f} times as fast",
            f"counts {cpu['ours']['syncs']} host reads",
            f"a wait of {wait}",
            f"reaches {ceiling:.0f} TFLOP/s",
        ],
        "docs/troubleshooting.md": [
            f"{wait} even",
            f"trains on {cudnn} clips/s",
            f"make that {round(float(cudnn) / 16)} videos per second",
            f"takes {memory} ({compiled['peak_gib'] * 2**30 / 1e9:.1f} GB)",
        ],
        "docs/finetuning.md": [f"is {mfu} (pretraining, H200)"],
        "benchmarks/recipes.md": [
            f"lower: {mfu} on an H200",
            f"{compiled['clips_per_s']:.0f} clips/s on an H200, {cudnn} with `--attn cudnn`",
            f"{memory} at 64 clips on an H200",
        ],
    }


def gpu_claims() -> dict[str, list[str]]:
    """Return the numbers in prose that compare versions of the step on a GPU, by page."""
    now, before = (
        {row["variant"]: row["median_ms"] for row in result(name)["rows"]}
        for name in ("train_step_vit-h14_pretrain_cuda", "train_step_vit-h14_pretrain_cuda_before")
    )
    plain = "ours compiled"
    cudnn = f"{plain}, cudnn"
    residual = f"{cudnn}, bf16 residual"
    saved = [f"{before[name] - now[name]:.1f}" for name in (plain, cudnn)]
    profile = result("profile_vit-h14_pretrain_cuda")
    counted = result("ledger_vit-h14")["rows"]
    gb = next(row["gb"] for row in counted[::-1] if row["variant"] == "ours compiled")
    bandwidth = gb["elementwise"] / profile["kinds_ms"]["elementwise"]
    return {
        "docs/performance.md": [
            f"took {profile['median_ms']} ms",
            f"reach {bandwidth:.1f} TB/s",
            f"and {saved[0]} ({saved[1]} with cuDNN) were measured",
            f"by computation, and {now[cudnn] - now[residual]:.1f} as measured",
        ],
        "CHANGELOG.md": [
            f"{now[plain]:.1f} ms instead of {before[plain]:.1f}",
            f"{now[cudnn]:.1f} instead of {before[cudnn]:.1f}",
        ],
    }


def data_claims() -> dict[str, list[str]]:
    """Return the numbers about reading files in prose, computed from the results, by page."""
    static = result("static_clip")
    files = result("readers")["files"].values()
    ratios = [
        file["decord"][repeats] / file["auto"][repeats]
        for file in files
        for repeats in file["auto"]
    ]
    clips = result("data_clips")["result"]["files"]
    times = [file[f"seconds_at_{repeats}"] for file in clips.values() for repeats in (1, 4)]
    against_all = [time["window"] / time["pyav"] for time in times]
    auto = {name: file["auto"] for name, file in result("readers")["files"].items()}
    small = auto["340x256 GOP 16"]
    saved = 100 * (static["step"]["ratio"] - 1)
    return {
        "docs/data.md": [
            f"{min(ratios):.2f} to {max(ratios):.2f} times as fast as `decord`",
            f"{min(against_all):.1f} to {max(against_all):.1f} times as fast, crops included",
        ],
        "docs/troubleshooting.md": [
            f"{auto['640x360 GOP 250']['1']:.1f} ms from a 640x360",
            f"{small['1']:.1f} ms from a 340x256",
            f"costs {small['4']:.1f} ms per clip",
        ],
        "docs/finetuning.md": [
            f"{static['embedding']['ratio']:.1f} times as fast, which saves {saved:.1f} % of a step"
        ],
    }


def demo_claims() -> dict[str, list[str]]:
    """Return the numbers about the demo in prose, computed from its results, by page."""
    demo = result("demo")
    loss = demo["real clips"]["train_loss"]
    motion = demo["motion"]["train_loss"]
    accuracy = demo["accuracy"]
    last = len(loss) - 1
    epochs = ", ".join(f"{loss[epoch]:.2f} ({epoch})" for epoch in (10, 100, 150, 200, last))
    later = ", ".join(f"{motion[epoch]:.2f} ({epoch})" for epoch in (2, 4, 8))
    pretrained, scratch = accuracy["pretrained"], accuracy["scratch"]
    return {
        "docs/troubleshooting.md": [f"starts at {loss[0]:.2f} and reaches {loss[10]:.2f} after 10"],
        "docs/pretraining.md": [f"{pretrained:.0f} % pretrained, {scratch:.0f} % from scratch"],
        "benchmarks/recipes.md": [
            f"{loss[0]:.2f} (epoch 0), {epochs}",
            f"{motion[0]:.2f} (epoch 0), {later}",
            f"{demo['real clips']['val_loss']:.2f} (at the end)",
            f"{pretrained:.1f} % pretrained, {scratch:.1f} % from scratch",
            f"{accuracy['images']:.1f} % of 400 images",
            f"{demo['host_memory_gib']:.2f} GiB of host memory",
        ],
    }


@pytest.mark.parametrize("claims", [speed_claims, gpu_claims, data_claims, demo_claims])
def test_numbers_in_prose_are_those_of_the_results(claims):
    for page, phrases in claims().items():
        text = " ".join(read(page).split())
        assert [phrase for phrase in phrases if phrase not in text] == [], page


def parameters(model: torch.nn.Module) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def models_of(name: str) -> tuple[VideoEncoder, MaskedAutoencoderViT, VisionTransformer]:
    """Return the encoder, the autoencoder and the classifier of a named size, without storage."""
    size = named_size(name)
    with torch.device("meta"):
        encoder = VideoEncoder(**size, **CLIP)
        classifier = VisionTransformer(**size, **CLIP, num_classes=400)
        autoencoder = MaskedAutoencoderViT(**size, **CLIP, **DECODER)
    return encoder, autoencoder, classifier


def table_after(page: str, header: str) -> list[dict[str, str]]:
    """Return the rows of the table of a page whose header line starts with `header`."""
    lines = read(page).splitlines()
    (start,) = [index for index, line in enumerate(lines) if line.startswith(header)]
    table = itertools.takewhile(lambda line: line.startswith("|"), lines[start:])
    return rows_of(list(table))


def test_model_sizes_in_the_readme_are_computed():
    for row in table_after("README.md", "| model | encoder parameters"):
        encoder, autoencoder, classifier = models_of(row["model"].strip("`"))
        pretraining = autoencoder.flops_per_clip(0.9, "random")
        assert row["encoder parameters"] == f"{parameters(encoder) / 1e6:.1f} M"
        assert row["tokens"] == str(encoder.num_tokens)
        assert row["pretraining GFLOP"] == f"{pretraining / 1e9:.0f}"
        assert row["finetuning GFLOP"] == f"{classifier.flops_per_clip() / 1e9:.0f}"


def memory_of(model: VideoEncoder, tokens: int) -> tuple[float, float]:
    """Return the computed fixed memory and that of a clip's tokens in the encoder, in bytes."""
    width, depth = model.config["embed_dim"], model.config["depth"]
    return 16 * parameters(model), 34 * (tokens + 1) * width * depth


def clips_that_fit(fixed: float, clip: float) -> list[str]:
    """Return how many clips fit into 90 % of 24, 40 and 80 GB."""
    return [str(int((0.9 * memory * 1e9 - fixed) / clip)) for memory in (24, 40, 80)]


def test_batch_sizes_in_troubleshooting_are_computed():
    for row in table_after("docs/troubleshooting.md", "| model | pretraining 24 GB"):
        name, *shown = row.values()
        encoder, autoencoder, classifier = models_of(name.strip("`"))
        tokens = encoder.num_tokens
        fixed, clip = memory_of(autoencoder, int(tokens * 0.1))
        clip += 34 * (tokens + 1) * DECODER["decoder_embed_dim"] * DECODER["decoder_depth"]
        expected = clips_that_fit(fixed, clip) + clips_that_fit(*memory_of(classifier, tokens))
        assert shown == expected
        if name == "`vit_huge_patch14`":
            of_64_clips = f"The formula gives {(fixed + 64 * clip) / 1e9:.1f} GB."
    assert of_64_clips in " ".join(read("docs/troubleshooting.md").split())


def test_costs_of_finetuning_are_computed():
    for row in table_after("docs/finetuning.md", "| model | TFLOP per clip"):
        letter, patch_size = row["model"].removeprefix("ViT-").split("/")
        size = {"L": "large", "H": "huge", "g": "giant"}[letter]
        _, _, classifier = models_of(f"vit_{size}_patch{patch_size}")
        flops = classifier.flops_per_clip()
        rate = 0.4 * 989e12 / flops
        fixed, clip = memory_of(classifier, classifier.num_tokens)
        hours = 240_000 * 50 * 2 / rate / 3600
        assert row["TFLOP per clip"] == f"{flops / 1e12:.1f}"
        assert abs(int(row["clips/s per H100"]) - rate) < 1
        assert row["memory: fixed + per clip"] == f"{fixed / 1e9:.1f} GB + {clip / 1e9:.1f} GB"
        assert abs(int(row["Kinetics-400 recipe above"].split()[0]) - hours) < 2


def test_the_table_of_faults_names_every_numbered_test():
    described = re.findall(r"^\| (T\d\d) \|", read("docs/reliability.md"), flags=re.M)
    sources = [path.read_text() for path in (ROOT / "tests").glob("test_*.py")]
    tested = re.findall(r"^def test_(t\d\d)_", "\n".join(sources), flags=re.M)
    assert described == sorted({number.upper() for number in tested})


def test_the_readme_is_short():
    text = read("README.md")
    assert len(text.splitlines()) <= 130
    assert len(text.encode()) <= 9216


def test_python_examples_import_what_exists():
    for page in PAGES:
        for block in re.findall(r"^```python\n(.*?)^```$", read(page), flags=re.S | re.M):
            compile(block, page, "exec")
            for module, name in re.findall(r"^from (\S+) import (\w+)$", block, flags=re.M):
                assert hasattr(import_module(module), name), page


def odd_lines(text: str) -> list[str]:
    """Return lines that are too long, broken inside a code span, or with room for the next word."""
    odd = [line for line in text.splitlines() if len(line) > LINE and line[0] not in "|#"]
    lines = without_code(text).splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if line.startswith(("|", "#", "<", "![")):
            continue
        odd += [line] if line.count("`") % 2 else []  # a code span broken in two
        ends = not following.strip() or re.match(r"\s*([*\-|#<]|\d+\. |!\[|```)", following)
        if line.strip() and not ends and len(line) < EARLY_BREAK:
            word = re.match(r"\s*(\S*`[^`]*`\S*|\S+)", following)[1]
            odd += [line] if len(line) + 1 + len(word) <= LINE else []
    return odd


@pytest.mark.parametrize("page", [page for page in PAGES if page != GENERATED])
def test_prose_is_wrapped_at_100_columns(page):
    assert odd_lines(read(page)) == []


def test_odd_lines_are_found():
    assert odd_lines("A line\nthat breaks early.\n") == ["A line"]
    assert odd_lines("word " * 30) == ["word " * 30]
    assert odd_lines("A `code\nspan`.")[0] == "A `code"
    assert odd_lines("A line.\n\nAnother one.\n* an item\n* another\n") == []
