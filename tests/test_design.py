"""The rules of the repository, held by reading its source. `test_every_rule_can_fail` feeds each rule a bad example."""

import ast
import io
import re
import shlex
import sys
import tokenize
from importlib import import_module
from pathlib import Path

import pytest

from util.args import RETIRED

ROOT = Path(__file__).parent.parent
SCRIPTS = ("pretrain", "finetune", "finetune_on_image")
PRODUCT = [
    *sorted(ROOT.glob("*.py")),
    *sorted(ROOT.glob("util/*.py")),
    *sorted(ROOT.glob("data/*.py")),
]
OWN = {
    "models_vit",
    "models_mae",
    "engine_pretrain",
    "engine_finetune",
    "engine_eval",
    "gallery",
    "util",
    "data",
    *SCRIPTS,
}
MAY_IMPORT = {  # module: the own modules that it may import ("x." stands for all of package x)
    "models_vit": (),
    "models_mae": ("models_vit",),
    "engine_pretrain": ("models_", "util", "data.transforms"),
    "engine_finetune": ("models_", "engine_eval", "util", "data.transforms"),
    "engine_eval": ("models_", "util", "data.transforms"),
    "gallery": ("models_", "util", "data.transforms"),
    "util.importer": ("util", "models_", "data.transforms"),
    "util": ("util",),
    "data": ("data", "util.dist", "util.cli"),
}
LONGEST = 600  # tokens of a function
MODEL_LIBRARIES = {"torch", "flash_attn", "re"}


def module_name(path: Path) -> str:
    """data/index.py -> data.index."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imported(tree: ast.AST) -> list[str]:
    """Dotted names of all that a source imports; `from util import dist` counts as util.dist."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            packages = node.module in ("util", "data")
            names += (
                [f"{node.module}.{alias.name}" for alias in node.names]
                if packages
                else [node.module]
            )
    return names


def import_faults(name: str, tree: ast.AST) -> list[str]:
    """Imports that the layout forbids."""
    own = [item for item in imported(tree) if item.split(".")[0] in OWN]
    if name in SCRIPTS:
        return [item for item in own if item in SCRIPTS]
    allowed = MAY_IMPORT.get(name, MAY_IMPORT.get(name.split(".")[0], ()))
    faults = [
        item
        for item in own
        if not any(item == prefix or item.startswith((f"{prefix}.", prefix)) for prefix in allowed)
    ]
    if name.startswith("models_"):
        faults += [
            item for item in imported(tree) if item.split(".")[0] not in MODEL_LIBRARIES | OWN
        ]
    return faults


def call_faults(name: str, tree: ast.AST) -> list[str]:
    """Calls and definitions that the style forbids."""
    faults = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called, keywords = (
                ast.unparse(node.func),
                {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords},
            )
            if called == "print" and name != "util.dist":
                faults.append("print outside util/dist.py")
            if called == "torch.load" and keywords.get("weights_only") != "True":
                faults.append("torch.load without weights_only=True")
            if keywords.get("strict") == "False" and called.endswith("load_state_dict"):
                faults.append("strict=False")
            if keywords.get(None, "").startswith("vars("):
                faults.append("**vars(...)")
        if isinstance(node, (ast.FunctionDef, ast.Lambda)) and node.args.kwarg:
            faults.append("a **kwargs parameter")
        any_error = isinstance(node, ast.ExceptHandler) and (
            node.type is None or ast.unparse(node.type) == "Exception"
        )
        if any_error and isinstance(node.body[0], ast.Pass):
            faults.append("an error that is passed over")
    return faults


def code_tokens(source: str) -> int:
    """Number of tokens of a piece of code, comments and docstrings left out."""
    tree = ast.parse(source)
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    count = sum(token.type not in skipped | {tokenize.ENDMARKER} for token in tokens)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
    return count - sum(ast.get_docstring(node) is not None for node in nodes)


def function_faults(tree: ast.Module) -> list[str]:
    """Functions of more than LONGEST tokens; public ones and classes without a docstring.

    Functions inside functions are not public.
    """
    faults = []
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    inner = {nested for node in functions for nested in ast.walk(node) if nested is not node}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and code_tokens(ast.unparse(node)) > LONGEST:
            faults.append(f"{node.name} has {code_tokens(ast.unparse(node))} tokens")
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            public = not node.name.startswith("_") and node not in inner
            if public and not ast.get_docstring(node):
                faults.append(f"{node.name} has no docstring")
    return faults


PASSED_ON = re.compile(
    r"\w+(: [\w.\[\], |]+)?( ?= ?[\w.\"\[\]()]+)?,|\"\w+\": \w+,"
)  # a parameter, a keyword


def telling_lines(source: str) -> list[str]:
    """Stripped lines without blanks, comments, imports, signatures and values that are only passed on."""
    lines = [line.strip() for line in source.splitlines()]
    lines = [line for line in lines if not PASSED_ON.fullmatch(line)]
    return [
        line
        for line in lines
        if len(line) > 1 and not line.startswith(("#", "import ", "from ", '"""'))
    ]


def duplicate_faults(sources: dict[str, str], length: int = 8) -> list[str]:
    """Blocks of `length` or more equal lines in two places."""
    seen, faults = {}, []
    for name, source in sources.items():
        lines = telling_lines(source)
        for start in range(len(lines) - length + 1):
            block = tuple(lines[start : start + length])
            place = seen.setdefault(block, (name, start))
            if place[0] != name or start - place[1] >= length:
                faults.append(f"{name} repeats {place[0]}: {block[0]}")
    return faults


def flag_faults(declaring: list[ast.AST], reading: list[ast.AST]) -> list[str]:
    """Flags that nothing reads as args.NAME, and args.NAME that nothing declares."""
    declared, read = set(), set()
    for tree in declaring:
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Call)
                and ast.unparse(node.func).endswith("add_argument")
                and isinstance(node.args[0], ast.Constant)
            ):
                target = [keyword.value.value for keyword in node.keywords if keyword.arg == "dest"]
                declared.add(target[0] if target else node.args[0].value.lstrip("-"))
    for tree in reading:
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == "args"
            ):
                read.add(node.attr)
    return sorted(
        [f"--{name} is never read" for name in declared - read]
        + [f"args.{name} is not declared" for name in read - declared]
    )


def readme_commands(text: str) -> list[list[str]]:
    """Commands of the README's bash blocks that start a Python script or module."""
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [
        shlex.split(line)
        for line in lines
        if re.search(r"\b(python|torchrun)\b.*\.py\b", line) and not line.startswith("#")
    ]


def trees() -> dict[str, ast.Module]:
    """Every product file, parsed."""
    return {module_name(path): ast.parse(path.read_text()) for path in PRODUCT}


@pytest.mark.parametrize("name", trees())
def test_imports_calls_and_functions(name):
    tree = trees()[name]
    assert import_faults(name, tree) == []
    assert call_faults(name, tree) == []
    assert function_faults(tree) == []


def test_no_drawers():
    assert not [path for path in PRODUCT if path.stem in ("misc", "utils", "common", "helpers")]


def test_no_repeated_blocks():
    assert duplicate_faults({module_name(path): path.read_text() for path in PRODUCT}) == []


def test_every_flag_is_declared_and_read():
    everything = trees()
    declaring = [
        everything[name]
        for name in everything
        if name in SCRIPTS or name.startswith(("util.args", "util.export", "data."))
    ]
    assert flag_faults(declaring, list(everything.values())) == []
    assert all(flag.startswith("--") for flag in RETIRED)


def test_measured_tables_in_the_readme_are_those_of_the_results():
    marked = re.findall(r"<!-- rows of (\S+) -->\n((?:\|.*\n)+)", (ROOT / "README.md").read_text())
    assert len(marked) >= 2
    for source, rows in marked:
        measured = (ROOT / source).read_text().splitlines()
        assert [row for row in rows.splitlines() if row not in measured] == [], source


def test_readme_commands_parse():
    commands = readme_commands((ROOT / "README.md").read_text())
    assert commands
    for command in commands:
        script = next(word for word in command if word.endswith(".py"))
        assert (ROOT / script).exists(), f"the README runs {script}"
        if Path(script).stem in SCRIPTS:
            import_module(Path(script).stem).get_parser().parse_args(
                command[command.index(script) + 1 :]
            )


@pytest.mark.parametrize(
    ("check", "source"),
    [
        (lambda tree: import_faults("models_vit", tree), "import util.dist"),
        (lambda tree: import_faults("models_vit", tree), "import json"),
        (
            lambda tree: import_faults("engine_pretrain", tree),
            "from data.loaders import make_loader",
        ),
        (lambda tree: import_faults("util.optim", tree), "import models_vit"),
        (lambda tree: import_faults("data.index", tree), "from util import args"),
        (lambda tree: import_faults("finetune", tree), "import pretrain"),
        (lambda tree: call_faults("data.index", tree), "print(1)"),
        (lambda tree: call_faults("util.checkpoint", tree), "torch.load(path)"),
        (
            lambda tree: call_faults("util.checkpoint", tree),
            "model.load_state_dict(state, strict=False)",
        ),
        (lambda tree: call_faults("pretrain", tree), "build(**vars(args))"),
        (lambda tree: call_faults("pretrain", tree), "def build(**kwargs): return kwargs"),
        (lambda tree: call_faults("pretrain", tree), "try: run()\nexcept Exception: pass"),
        (function_faults, "def bare(): return 1"),
        (function_faults, "def long():\n  '''Doc.'''\n" + "  x = 1\n" * 201),
        (
            lambda tree: duplicate_faults(
                {name: "\n".join(f"step_{i} = {i}" for i in range(8)) for name in "ab"}
            ),
            "",
        ),
        (lambda tree: flag_faults([tree], []), "parser.add_argument('--unread')"),
        (lambda tree: flag_faults([], [tree]), "args.undeclared"),
    ],
)
def test_every_rule_can_fail(check, source):
    assert check(ast.parse(source))


def test_help_is_quick_to_read():
    """--help lists every flag once, with a default or a meaning."""
    for script in SCRIPTS:
        if (ROOT / f"{script}.py").exists():
            parser = import_module(script).get_parser()
            shown = [action for action in parser._actions if action.help != "==SUPPRESS=="]
            assert all(action.help for action in shown), [
                action.dest for action in shown if not action.help
            ]
            assert len(parser.format_help().splitlines()) < 250
    assert sys.version_info >= (3, 10)
