"""The layout of the repository: which file may import which, how long and how wide files are."""
import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ROOT

import grpo

CORE = ("model", "tinylora", "grpo", "gsm8k", "train")
PACKAGES = ("fast", "methods", "support", "tools")
LINES = 300  # of a core file
BYTES = 60_000  # of the five together
OTHERS = 350  # lines of any other file, tests included
WIDTH = 100  # columns

# What a module may import of this project: modules, or packages with all that is in them.
ALLOWED = {
    "model": {"support.errors", "support.checkpoint"},
    "tinylora": {"model", "support.adapter_file", "support.checkpoint", "support.directions",
                 "support.errors", "support.files", "support.scaling"},
    "grpo": {"model", "tinylora", "support.errors", "support.ranks"},
    "gsm8k": {"support"},
    "train": {"model", "tinylora", "grpo", "gsm8k", "support"},
    "support": {"support"},
    "fast": {"model", "tinylora", "grpo", "support", "fast"},
    "methods": {"model", "tinylora", "grpo", "support", "methods"},
    "tools": {*CORE, *PACKAGES},
}
# Only inside a function, where a flag asks for it.
LAZY = {"train": {"fast", "methods", "tools"}}
PUBLISHED = {"torch", "numpy", "safetensors", "tokenizers", "tqdm"}  # what the core may import
OTHER_PUBLISHED = {"support": {"jinja2", "huggingface_hub", "wandb"}, "tools": {"matplotlib"}}


def python_files():
    """Every .py file on the disk, but for what git and Python put there."""
    found = []
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).parts
        if not any(part.startswith(".") or part in ("runs", "__pycache__") for part in parts):
            found.append(path)
    return sorted(found)


def sources():
    """(module name, path) of the core and of the packages."""
    for name in CORE:
        yield name, ROOT / f"{name}.py"
    for package in PACKAGES:
        for path in sorted((ROOT / package).glob("*.py")):
            module = package if path.stem == "__init__" else f"{package}.{path.stem}"
            yield module, path


MODULES = dict(sources())
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def imported_by(node):
    """The dotted names that one import statement, or a call of import_module, brings in."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert not node.level, "relative imports hide where a name comes from"
        # `from support import ranks` brings in support.ranks
        names = [f"{node.module}.{alias.name}" for alias in node.names]
        return [name if name in MODULES else node.module for name in names]
    if isinstance(node, ast.Call):
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if name in ("import_module", "__import__"):
            assert isinstance(node.args[0], ast.Constant), "an import that cannot be read"
            return [node.args[0].value]
    return []


def imports(tree):
    """(dotted name, is it inside a function) of everything that a module imports."""
    lazy = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            lazy |= {id(inner) for inner in ast.walk(node)}
    return [(name, id(node) in lazy) for node in ast.walk(tree) for name in imported_by(node)]


def arrows(name):
    """The modules of this project that a module imports: {(name, is it inside a function)}."""
    ours = {*CORE, *PACKAGES}
    return {(target, lazy) for target, lazy in imports(TREES[name])
            if target.split(".")[0] in ours}


@pytest.mark.parametrize("name", MODULES)
def test_arrows(name):
    """No file imports what it must not: the core never needs fast/, methods/ or tools/, support/
    never needs the core, and --engine plain works without the other folders."""
    package = name.split(".")[0]
    for target, lazy in arrows(name):
        allowed = ALLOWED[package] | (LAZY.get(package, set()) if lazy else set())
        assert target in allowed or target.split(".")[0] in allowed, f"{name} imports {target}"


def test_train_imports_the_other_packages_only_where_a_flag_asks():
    """These imports exist (or the test above says nothing), and none is at the top of the file."""
    others = [(target, lazy) for target, lazy in arrows("train")
              if target.split(".")[0] in LAZY["train"]]
    assert {target.split(".")[0] for target, _ in others} == {"fast", "methods", "tools"}
    assert all(lazy for _, lazy in others)


def test_no_circle():
    """Lazy imports count too: a file that imports a file that imports it cannot be read alone."""
    edges = {name: {target for target, _ in arrows(name)} - {name} for name in MODULES}
    for name in MODULES:  # a package's __init__ stands for the modules that it imports
        edges[name] = {target for target in edges[name] if target in MODULES}
    done = set()

    def visit(name, path):
        assert name not in path, " -> ".join([*path[path.index(name):], name])
        if name not in done:
            for target in sorted(edges[name]):
                visit(target, [*path, name])
            done.add(name)
    for name in MODULES:
        visit(name, [])
    assert done == set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_only_known_packages_are_imported(name):
    """A package that requirements.txt does not have; pickle, which runs what a file says."""
    package = name.split(".")[0]
    known = PUBLISHED | OTHER_PUBLISHED.get(package, set()) | {*CORE, *PACKAGES}
    for target, _ in imports(TREES[name]):
        root = target.split(".")[0]
        assert root in known or root in sys.stdlib_module_names, f"{name} imports {target}"
        assert root not in ("pickle", "marshal", "shelve"), f"{name} imports {target}"
    for node in ast.walk(TREES[name]):  # torch.load and torch.save are pickle
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert not (node.value.id == "torch" and node.attr in ("load", "save")), name


def test_update_has_at_most_six_parameters():
    """It had twenty."""
    code = grpo.update.__code__
    assert code.co_argcount + code.co_kwonlyargcount <= 6
    assert not code.co_flags & 0x0C  # no *args, no **kwargs


# -------------------------------------------------------------------------------- length and width

def test_the_top_level_is_the_five_files_and_their_tests():
    """What a reader finds first."""
    names = {path.name for path in ROOT.glob("*.py")}
    assert names == {f"{name}.py" for name in CORE} | {"test_tinylora.py"}


def test_the_five_files_can_be_read_in_one_sitting():
    paths = [ROOT / f"{name}.py" for name in CORE]
    lengths = {path.name: len(path.read_text().splitlines()) for path in paths}
    assert max(lengths.values()) <= LINES, lengths
    sizes = {path.name: path.stat().st_size for path in paths}
    assert sum(sizes.values()) <= BYTES, sizes


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short_and_narrow(path):
    """No line over 100 columns (lines had 189); no file over 350 lines; one statement a line."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    assert len(lines) <= OTHERS
    wide = {number: len(line) for number, line in enumerate(lines, 1) if len(line) > WIDTH}
    assert not wide, wide
    crowded = list(crowded_lines(ast.parse(text)))
    assert not crowded, crowded


def bodies(node):
    """The lists of statements in a statement, with the line on which each header begins."""
    for name in ("body", "orelse", "finalbody"):
        body = getattr(node, name, None)
        if isinstance(body, list) and body:
            yield body
    for handler in getattr(node, "handlers", []):
        yield from bodies(handler)


def crowded_lines(tree):
    """Lines with two statements: `a; b`, or `if a: b`."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.expr, ast.mod)) and not isinstance(node, ast.Module):
            continue
        for body in bodies(node):
            for first, second in zip(body, body[1:]):
                if second.lineno == first.end_lineno:
                    yield second.lineno
            is_block = isinstance(node, (ast.stmt, ast.ExceptHandler))
            if is_block and body is node.body and body[0].lineno == header_end(node):
                yield body[0].lineno


def header_end(node):
    """The last line of a block's header: `for ... :`, `def f(...):`."""
    inner = [getattr(node, name, None) for name in ("test", "iter", "target", "args", "returns",
                                                     "type", "subject")]
    for item in getattr(node, "items", []):
        inner += [item.context_expr, item.optional_vars]
    inner += getattr(node, "bases", [])
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        a = node.args
        inner += [*a.args, *a.kwonlyargs, *a.defaults, a.vararg, a.kwarg]
    ends = [getattr(x, "end_lineno", None) or node.lineno for x in inner if x is not None]
    return max([node.lineno, *ends])


CROWDED = ["a = 1; b = 2", "if a: b", "for a in b: c", "def f(): return 1", "with a: b",
           "while a: b", "class A: b = 1", "try: a\nexcept B: c", "def f(\n        a): return a"]
FINE = ["if a:\n    b\nelse:\n    c", "a = [b for c in d if e]", "x = lambda a: a",
        "def f(a,\n      b):\n    return a", "with a as b, \\\n        c:\n    d",
        "a = '''\n; if x: y\n'''", "try:\n    a\nfinally:\n    b"]


@pytest.mark.parametrize("text", CROWDED + FINE)
def test_the_search_for_crowded_lines_finds_them(text):
    assert bool(list(crowded_lines(ast.parse(text)))) == (text in CROWDED)


def test_every_test_file_is_in_the_list():
    text = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    assert not [f.name for f in (ROOT / "tests").glob("test_*.py") if f"({f.name})" not in text]


def test_every_bug_of_the_list_has_its_test():
    """A test renamed or dropped, and the list in README.md still names it."""
    rows = re.findall(r"^\| (\d+) \| .* \| (.*) \|$",
                      (ROOT / "tests" / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 26))
    for _, named in rows:
        for file, tests in (part.split(": ") for part in named.split("; ")):
            folder = ROOT if file == "test_tinylora" else ROOT / "tests"
            text = (folder / f"{file}.py").read_text(encoding="utf-8")
            for test in tests.split(", "):
                assert f"\ndef {test}(" in text, test


def test_what_git_has_is_what_is_looked_at():
    """A file that the search above leaves out by its folder's name."""
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("needs git and the repository")
    tracked = {ROOT / name for name in listed.stdout.split("\n") if name}
    assert {path for path in tracked if path.exists()} <= set(python_files())
