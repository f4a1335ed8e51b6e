"""The house rules that a machine can check, over every file of the package."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "deltaloom"
SOURCES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))
DELTAS = PACKAGE / "deltas"
METHODS = sorted(path.stem for path in DELTAS.glob("*.py") if not path.stem.startswith("_") and path.stem != "base")
COMMON = {"auto"}  # a method's name, and in many settings the word for letting a part decide
# A method's name that is also another part's own word: `prompt` is a column of the data, `lora` a format of `convert`.
HOMONYMS = {"prompt": PACKAGE / "data", "lora": PACKAGE / "jobs" / "convert.py"}
MOST_LINES, MOST_FUNCTION_LINES, DEEPEST = 500, 60, 3


def short(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def docstrings(tree: ast.AST) -> set[int]:
    """The ids of the nodes that are docstrings."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                found.add(id(first.value))
    return found


def faults_in(tree: ast.Module) -> list[str]:
    """What one source file does that no source file may do."""
    faults = []
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or line) - line + 1
            if length > MOST_FUNCTION_LINES:
                faults.append(f"{line}: {node.name} has {length} lines")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "hasattr":
            faults.append(f"{line}: hasattr")
        if isinstance(node, ast.Name) and node.id == "NotImplementedError":
            faults.append(f"{line}: NotImplementedError")
        if isinstance(node, ast.ImportFrom) and node.module == "pickle":
            faults.append(f"{line}: pickle")
        if isinstance(node, ast.Import) and any(alias.name == "pickle" for alias in node.names):
            faults.append(f"{line}: pickle")
        if isinstance(node, ast.Attribute) and node.attr == "load" and ast.unparse(node.value) == "torch":
            faults.append(f"{line}: torch.load")
        if isinstance(node, ast.Assert):
            faults.append(f"{line}: assert")
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            faults.append(f"{line}: bare except")
    return faults


def quoted_methods(tree: ast.Module) -> list[str]:
    """Method names that occur as string literals outside docstrings."""
    texts = docstrings(tree)
    return [f"{node.lineno}: '{node.value}'" for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and str(node.value).replace("-", "_") in METHODS and id(node) not in texts
            and node.value not in COMMON]


@pytest.mark.parametrize("path", SOURCES, ids=short)
def test_a_source_file_keeps_the_rules(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MOST_LINES
    assert faults_in(tree_of(path)) == []
    todos = [number for number, line in enumerate(lines, 1) if re.search(r"\b(TODO|FIXME|XXX)\b", line)]
    assert todos == []


@pytest.mark.parametrize("path", [path for path in SOURCES if not (path.parent == DELTAS and path.stem in METHODS)], ids=short)
def test_method_names_stay_in_their_own_file(path):
    own = {f"'{name}'" for name, home in HOMONYMS.items() if path.is_relative_to(home)}
    assert [text for text in quoted_methods(tree_of(path)) if text.split(": ")[1] not in own] == []


@pytest.mark.parametrize("method", METHODS)
def test_a_method_never_names_or_imports_another(method):
    tree = tree_of(DELTAS / f"{method}.py")
    imported = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    others = {f"deltaloom.deltas.{other}" for other in METHODS if other != method}
    assert others.isdisjoint(imported)
    assert [text for text in quoted_methods(tree) if f"'{method}'" not in text.replace("-", "_")] == []


def test_classes_are_at_most_three_deep_in_the_package():
    bases: dict[str, list[str]] = {}
    for path in SOURCES:
        for node in ast.walk(tree_of(path)):
            # Settings is how every part validates its values; the depth of a family counts from its own first class.
            if isinstance(node, ast.ClassDef) and node.name != "Settings":
                bases[node.name] = [ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases]

    def depth(name: str) -> int:
        return 1 + max((depth(base) for base in bases[name] if base in bases and base != name), default=0)

    assert {name: depth(name) for name in bases if depth(name) > DEEPEST} == {}


@pytest.mark.parametrize("path", TESTS, ids=short)
def test_a_test_file_asserts_something(path):
    tree = tree_of(path)
    checks = [node for node in ast.walk(tree) if isinstance(node, ast.Assert)
              or (isinstance(node, ast.Call) and re.search(r"(raises|assert_\w+|fail)$", ast.unparse(node.func)))]
    assert checks


def test_no_machine_path_in_any_text_file():
    # Spelt in two parts, so that this file does not hold what it looks for.
    strange = re.compile("/" + r"(work|root|opt)/")
    kinds = {".py", ".md", ".toml", ".yaml", ".txt", ""}
    places = [ROOT / name for name in ("src", "tests", "examples", "docs", "benchmarks")]
    files = [path for place in places for path in place.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    files += [path for path in ROOT.iterdir() if path.is_file() and path.name != ".git"]  # a file in a linked checkout
    assert [short(path) for path in files
            if path.suffix in kinds and strange.search(path.read_text(encoding="utf-8", errors="replace"))] == []


def readme_tree() -> list[str]:
    """The paths of the code block under `## The tree` in README.md; each line is `path  comment`."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "## The tree" in text, "README.md needs a section '## The tree'"
    block = text.split("## The tree", 1)[1].split("```")[1]
    return [line.split()[0] for line in block.splitlines()[1:] if line.strip()]


def test_the_readmes_tree_is_the_folders_tree():
    listed = readme_tree()
    assert len(set(listed)) == len(listed)
    assert [path for path in listed if not (ROOT / path).exists()] == [], "entries without a file"
    assert sorted({short(path) for path in SOURCES} - set(listed)) == [], "files without an entry"
    folders = {f"{path.name}/" for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
    passing = {"runs/", "dist/", "build/"}
    assert sorted(folders - passing - set(listed)) == [], "top-level folders without an entry"


@pytest.mark.parametrize("bad", ["x = hasattr(a, 'b')", "import pickle", "torch.load('x')", "raise NotImplementedError",
                                 "assert x", "try:\n    f()\nexcept:\n    pass", "def f():\n" + "    x = 1\n" * 60])
def test_the_checks_can_fail(bad):
    assert faults_in(ast.parse(bad))
