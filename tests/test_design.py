"""The rules of the repository, held by reading its source. Every rule is shown a bad example."""

import ast
from importlib import import_module

import pytest
from source_rules import (
    REPEATED_LINES,
    REPEATED_TOKENS,
    ROOMS,
    ROOT,
    SCRIPTS,
    call_faults,
    flag_faults,
    function_faults,
    import_circles,
    import_faults,
    module_name,
    namespace_faults,
    repeated,
    telling_lines,
    telling_tokens,
    test_file_faults,
)

from util.args import RETIRED

PRODUCT = sorted(path for room in (".", *ROOMS) for path in (ROOT / room).glob("*.py"))
SOURCES = {module_name(path): path.read_text() for path in PRODUCT}
TREES = {name: ast.parse(source) for name, source in SOURCES.items()}
TESTS = {path.stem: ast.parse(path.read_text()) for path in sorted(ROOT.glob("tests/*.py"))}


@pytest.mark.parametrize("name", TREES)
def test_a_file_keeps_the_rules(name):
    tree = TREES[name]
    assert import_faults(name, tree) == []
    assert call_faults(name, tree) == []
    assert function_faults(tree) == []
    assert namespace_faults(name, tree) == []


@pytest.mark.parametrize("name", TESTS)
def test_a_test_file_keeps_the_rules(name):
    assert test_file_faults(TESTS[name]) == []


def test_the_root_holds_only_the_users_names():
    root = {path.stem for path in ROOT.glob("*.py")}
    engines = {"engine_pretrain", "engine_finetune"}
    assert root == {*SCRIPTS, "models_vit", "models_mae", *engines}


def test_no_file_is_a_drawer():
    assert not [path for path in PRODUCT if path.stem in ("misc", "utils", "common", "helpers")]


def test_no_module_imports_itself_in_a_circle():
    assert import_circles(TREES) == []


def test_no_block_is_repeated():
    lines = {name: telling_lines(source) for name, source in SOURCES.items()}
    tokens = {name: telling_tokens(source) for name, source in SOURCES.items()}
    assert repeated(lines, REPEATED_LINES) == []
    assert repeated(tokens, REPEATED_TOKENS) == []


def test_every_flag_is_declared_and_read():
    declaring = [TREES[name] for name in TREES if name in SCRIPTS or name == "util.args"]
    reading = [TREES[name] for name in TREES if not name.startswith("tools.")]
    assert flag_faults(declaring, reading) == []
    assert all(flag.startswith("--") for flag in RETIRED)


@pytest.mark.parametrize("name", [name for name in TREES if name.startswith("tools.")])
def test_every_flag_of_a_tool_is_declared_and_read(name):
    shared = [TREES[other] for other in TREES if other.startswith(("tools.", "util.args"))]
    unread = [fault for fault in flag_faults([TREES[name]], shared) if "never read" in fault]
    undeclared = [fault for fault in flag_faults(shared, [TREES[name]]) if "declared" in fault]
    assert unread + undeclared == []


EIGHT_LINES = "\n".join(f"step_{i} = {i} + start" for i in range(8))
LONG_LINE = "x = [" + ", ".join(f"f({i})" for i in range(20)) + "]"


@pytest.mark.parametrize(
    ("check", "source"),
    [
        (lambda tree: import_faults("models_vit", tree), "import util.dist"),
        (lambda tree: import_faults("models_vit", tree), "import json"),
        (
            lambda tree: import_faults("engine_pretrain", tree),
            "from data.loader import train_loader",
        ),
        (lambda tree: import_faults("util.optim", tree), "import finetune"),
        (lambda tree: import_faults("util.optim", tree), "from data import transforms"),
        (lambda tree: import_faults("data.manifest", tree), "from util import args"),
        (lambda tree: import_faults("finetune", tree), "import pretrain"),
        (lambda tree: import_faults("finetune", tree), "from tools import reencode"),
        (lambda tree: import_circles({"util.a": tree}), "from util import a"),
        (lambda tree: call_faults("data.manifest", tree), "print(1)"),
        (lambda tree: call_faults("util.checkpoint", tree), "torch.load(path)"),
        (
            lambda tree: call_faults("util.checkpoint", tree),
            "model.load_state_dict(state, strict=False)",
        ),
        (lambda tree: call_faults("pretrain", tree), "build(**vars(args))"),
        (lambda tree: call_faults("pretrain", tree), "def build(**kwargs): return kwargs"),
        (lambda tree: call_faults("pretrain", tree), "try: run()\nexcept Exception: pass"),
        (lambda tree: call_faults("pretrain", tree), "run() if wanted else None"),
        (function_faults, "def bare(): return 1"),
        (function_faults, "def long():\n  '''Doc.'''\n" + "  x = 1\n" * 101),
        (function_faults, "def wide(a, b, c, d, e, f, g):\n  '''Doc.'''"),
        (lambda tree: namespace_faults("util.optim", tree), "def plan(args): return args.lr"),
        (lambda tree: repeated({name: telling_lines(EIGHT_LINES) for name in "ab"}, 8), ""),
        (lambda tree: repeated({name: telling_tokens(LONG_LINE) for name in "ab"}, 40), ""),
        (lambda tree: flag_faults([tree], []), "parser.add_argument('--unread')"),
        (lambda tree: flag_faults([], [tree]), "args.undeclared"),
        (test_file_faults, "from test_models import tiny"),
        (test_file_faults, f"def test_{'x' * 61}(): pass"),
    ],
)
def test_every_rule_can_fail(check, source):
    assert check(ast.parse(source))


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_every_flag_with_its_meaning(script):
    parser = import_module(script).get_parser()
    shown = [action for action in parser._actions if action.help != "==SUPPRESS=="]
    assert [action.dest for action in shown if not action.help] == []
    assert len(parser.format_help().splitlines()) < 250
