"""The rules of the repository, as checks of source text. Each returns the faults that it finds."""

import ast
import io
import re
import tokenize
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPTS = ("pretrain", "finetune", "finetune_on_image")
ENGINES = ("engine_pretrain", "engine_finetune")
ROOMS = ("util", "data", "tools")
OWN = {"models_vit", "models_mae", *ENGINES, *SCRIPTS, *ROOMS}
MAY_IMPORT = {  # module or package: prefixes of the own modules that it may import
    "models_vit": (),
    "models_mae": ("models_vit",),
    "engine_pretrain": ("models_", "util", "data.transforms"),
    "engine_finetune": ("models_", "util", "data.transforms"),
    "util": ("util", "models_"),
    "data": ("data", "util.dist", "util.files", "util.pixels", "util.seeds"),
    "tools": ("models_", "engine_", "util", "data", "tools"),
}
FLAG_MODULES = ("util.args", "util.cli", "util.model_flags")
MODEL_LIBRARIES = {"torch", "flash_attn", "math", "re", "typing"}
MAX_TOKENS = 300  # of a function
MAX_PARAMETERS = 6  # keyword-only constructors of models and data sets excepted
MAX_TEST_NAME = 60 + len("test_")
REPEATED_LINES = 8
REPEATED_TOKENS = 40
Span = tuple[tuple[int, int], tuple[int, int]]  # (line, column) of the start and of the end
NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def module_name(path: Path) -> str:
    """Return "data.manifest" for data/manifest.py."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imported(tree: ast.AST) -> list[str]:
    """Return dotted names of all that is imported; `from util import dist` is util.dist."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module in ROOMS:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module)
    return names


def import_faults(name: str, tree: ast.AST) -> list[str]:
    """Return the imports that the layout forbids."""
    own = [item for item in imported(tree) if item.split(".")[0] in OWN]
    if name in SCRIPTS:
        return [item for item in own if item in SCRIPTS or item.startswith("tools")]
    allowed = MAY_IMPORT.get(name, MAY_IMPORT.get(name.split(".")[0], ()))
    faults = [item for item in own if not item.startswith(tuple(allowed))]
    if name.startswith("models_"):
        libraries = MODEL_LIBRARIES | OWN
        faults += [item for item in imported(tree) if item.split(".")[0] not in libraries]
    return faults


def import_circles(trees: dict[str, ast.AST]) -> list[str]:
    """Return the modules that import themselves, by way of others."""
    graph = {name: set(imported(tree)) & trees.keys() for name, tree in trees.items()}
    circles = []
    for name in graph:
        reached = set()
        todo = list(graph[name])
        while todo:
            module = todo.pop()
            if module not in reached:
                reached.add(module)
                todo += graph[module]
        if name in reached:
            circles.append(name)
    return circles


def call_faults(name: str, tree: ast.AST) -> list[str]:
    """Return the calls and definitions that the style forbids."""
    faults = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            faults += _call_faults(name, node)
        if isinstance(node, (ast.FunctionDef, ast.Lambda)) and node.args.kwarg:
            faults.append("a **kwargs parameter")
        if isinstance(node, ast.ExceptHandler) and isinstance(node.body[0], ast.Pass):
            any_error = node.type is None or ast.unparse(node.type) == "Exception"
            faults += ["an error that is passed over"] * any_error
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.IfExp):
            faults.append("a conditional expression as a statement")
    return faults


def _call_faults(name: str, node: ast.Call) -> list[str]:
    called = ast.unparse(node.func)
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    faults = []
    if called == "print" and name != "util.dist":
        faults.append("print outside util/dist.py")
    if called == "torch.load" and keywords.get("weights_only") != "True":
        faults.append("torch.load without weights_only=True")
    if called.endswith("load_state_dict") and keywords.get("strict") == "False":
        faults.append("strict=False")
    if keywords.get(None, "").startswith("vars("):
        faults.append("**vars(...)")
    return faults


def code_tokens(source: str) -> int:
    """Return the number of tokens of a piece of code, without comments and docstrings."""
    count = len(token_strings(source, skipped=[]))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    return count - sum(ast.get_docstring(node) is not None for node in nodes)


def function_faults(tree: ast.Module) -> list[str]:
    """Return functions that are too long or take too much, and what lacks a docstring.

    Functions inside functions, and methods that start with an underscore, need no docstring.
    """
    faults = []
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    inner = {nested for node in functions for nested in ast.walk(node) if nested is not node}
    for node in functions:
        tokens = code_tokens(ast.unparse(node))
        if tokens > MAX_TOKENS:
            faults.append(f"{node.name} has {tokens} tokens")
        faults += _parameter_faults(node)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            public = not node.name.startswith("_") and node not in inner
            if public and not ast.get_docstring(node):
                faults.append(f"{node.name} has no docstring")
    return faults


def _parameter_faults(node: ast.FunctionDef) -> list[str]:
    positional = [parameter.arg for parameter in node.args.posonlyargs + node.args.args]
    if positional[:1] == ["self"] or positional[:1] == ["cls"]:
        positional = positional[1:]
    keyword_only = node.args.kwonlyargs
    if node.name == "__init__" and keyword_only and not positional:
        return []
    count = len(positional) + len(keyword_only)
    return [f"{node.name} has {count} parameters"] if count > MAX_PARAMETERS else []


def namespace_faults(name: str, tree: ast.AST) -> list[str]:
    """Return functions below scripts, engines and the programs' own that take the flags."""
    if name in (*SCRIPTS, *ENGINES, "util.args", "util.cli", "util.model_flags") or name.startswith(
        "tools."
    ):
        return []
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    takes = {node.name: [parameter.arg for parameter in node.args.args] for node in functions}
    return [f"{function} takes args" for function, names in takes.items() if "args" in names]


PASSED_ON = re.compile(
    r"\w+(: [\w.\[\], |]+)?( ?= ?[\w.\"\[\]()]+)?,|\"\w+\": [\w.]+,"
)  # a parameter, or a value that is only passed on


def telling_lines(source: str) -> list[str]:
    """Return stripped lines without comments, imports, signatures and values passed on."""
    lines = [line.strip() for line in source.splitlines()]
    lines = [line for line in lines if not PASSED_ON.fullmatch(line)]
    quiet = ("#", "import ", "from ", '"""')
    return [line for line in lines if len(line) > 1 and not line.startswith(quiet)]


def telling_tokens(source: str) -> list[str]:
    """Return the tokens of all code but imports, signatures, docstrings and values passed on."""
    skipped: list[Span] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)) or _is_text(node):
            skipped.append(_span(node))
        elif isinstance(node, ast.FunctionDef):
            start = (node.lineno, node.col_offset)
            skipped.append((start, (node.body[0].lineno, node.body[0].col_offset)))
        elif isinstance(node, ast.AnnAssign) or _is_passed_on(node):
            skipped.append(_span(node))
    return token_strings(source, skipped)


def token_strings(source: str, skipped: list[Span]) -> list[str]:
    """Return the tokens outside the skipped spans; an f-string is one token on every Python."""
    strings = []
    open_fstrings = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        name = tokenize.tok_name[token.type]
        if name == "FSTRING_END":
            open_fstrings -= 1
        inside = any(start <= token.start < end for start, end in skipped)
        parts_of_fstring = open_fstrings > 0 or name == "FSTRING_END"
        if token.type not in NO_CODE and not inside and not parts_of_fstring:
            strings.append(token.string)
        if name == "FSTRING_START":
            open_fstrings += 1
    return strings


def _is_text(node: ast.AST) -> bool:
    """Return whether a node is a docstring or another string that stands alone."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_passed_on(node: ast.AST) -> bool:
    """Return whether a node is a keyword of a call with a plain value."""
    return isinstance(node, ast.keyword) and isinstance(node.value, (ast.Name, ast.Attribute))


def _span(node: ast.AST) -> Span:
    return (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)


def repeated(parts: dict[str, list[str]], length: int) -> list[str]:
    """Return where `length` equal parts in a row stand in two places."""
    seen: dict[tuple[str, ...], tuple[str, int]] = {}
    faults = []
    for name, items in parts.items():
        for start in range(len(items) - length + 1):
            block = tuple(items[start : start + length])
            first_name, first_start = seen.setdefault(block, (name, start))
            if first_name != name or start - first_start >= length:
                faults.append(f"{name} repeats {first_name}: {' '.join(block)[:200]}")
    return faults


def flag_faults(declaring: list[ast.AST], reading: list[ast.AST]) -> list[str]:
    """Return flags that nothing reads as args.NAME, and args.NAME that nothing declares."""
    declared = set()
    read = set()
    for node in (node for tree in declaring for node in ast.walk(tree)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("add_argument"):
            declared |= _declared_names(node)
    for node in (node for tree in reading for node in ast.walk(tree)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "args":
            read.add(node.attr)
    unread = [f"--{name} is never read" for name in declared - read]
    undeclared = [f"args.{name} is not declared" for name in read - declared]
    return sorted(unread + undeclared)


def _declared_names(call: ast.Call) -> set[str]:
    if not isinstance(call.args[0], ast.Constant):
        return set()
    target = [keyword.value.value for keyword in call.keywords if keyword.arg == "dest"]
    return set(target) or {call.args[0].value.lstrip("-")}


def test_file_faults(tree: ast.Module) -> list[str]:
    """Return imports of other tests, and names of tests that are too long."""
    faults = [
        f"imports {name}" for name in imported(tree) if name.split(".")[-1].startswith("test_")
    ]
    for node in ast.walk(tree):
        is_test = isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        if is_test and len(node.name) > MAX_TEST_NAME:
            faults.append(f"{node.name} has {len(node.name)} characters")
    return faults


test_file_faults.__test__ = False  # a rule, no test
