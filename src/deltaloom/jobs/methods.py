"""The catalogue of methods, read from their files as text: it needs no torch, and a faulty file does not hide the others."""

from __future__ import annotations

import ast
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deltaloom import deltas
from deltaloom.errors import SettingsError, did_you_mean
from deltaloom.registry import names_of


@dataclass(frozen=True)
class SettingFacts:
    """One setting of a method: its type and default as written, and what it means."""

    name: str
    type: str
    default: str
    about: str


@dataclass(frozen=True)
class MethodFacts:
    """A method as its file describes it."""

    name: str
    summary: str
    text: str
    settings: tuple[SettingFacts, ...]
    fault: str = ""  # why its file cannot be read

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def catalogue(folder: Path | None = None) -> list[MethodFacts]:
    """Every method, by its file in the deltas folder; one whose file is faulty says so and hides no other."""
    place = folder or Path(deltas.__path__[0])
    return [_read(place / f"{name.replace('-', '_')}.py", name) for name in names_of(place)]


def one_or_all(name: str | None) -> list[MethodFacts]:
    """All methods, or the one of that name.

    Raises:
        SettingsError: there is no such method.
    """
    found = catalogue()
    if name is None:
        return found
    legal = [method.name for method in found]
    if name not in legal:
        raise SettingsError("unknown method", got=name, legal=legal, hint=did_you_mean(name, legal))
    return [method for method in found if method.name == name]


def method_text(methods: list[MethodFacts], *, full: bool) -> str:
    """What the terminal shows."""
    lines = []
    for method in methods:
        if not full:
            lines.append(f"{method.name:12} {method.fault or method.summary}")
            continue
        lines += [method.name, "", method.fault or method.text, "", "Settings:"]
        lines += [f"  {s.name}: {s.type} = {s.default}\n      {s.about}" for s in method.settings]
    return "\n".join(lines)


def _read(path: Path, name: str) -> MethodFacts:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError) as error:
        return MethodFacts(name, "", "", (), f"its file {path.name} cannot be read: {error}")
    text = ast.get_docstring(tree) or ""
    classes = [node.name for node in tree.body if isinstance(node, ast.ClassDef) and _class_value(node, "name") == name]
    if not classes:
        return MethodFacts(name, "", text, (), f"its file {path.name} defines no method of that name")
    return MethodFacts(name, text.split("\n", 1)[0], text, tuple(_settings_of(tree, classes[0]).values()))


def _settings_of(tree: ast.Module, class_name: str) -> dict[str, SettingFacts]:
    """The annotated fields of a class and of its bases in the deltas folder, its own first."""
    found: dict[str, SettingFacts] = {}
    node = next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name), None)
    if node is not None:
        found.update((fact.name, fact) for fact in _fields(node))
        for base in node.bases:
            inherited = _settings_of(_home_of(tree, ast.unparse(base)), ast.unparse(base))
            found.update((key, fact) for key, fact in inherited.items() if key not in found)
    return found


def _home_of(tree: ast.Module, class_name: str) -> ast.Module:
    """The file of the deltas folder that a class is imported from; this one, if it is from elsewhere."""
    package = f"{deltas.__name__}."
    for node in tree.body:
        if (isinstance(node, ast.ImportFrom) and (node.module or "").startswith(package)
                and class_name in [alias.name for alias in node.names]):
            path = Path(deltas.__path__[0]) / f"{(node.module or '').removeprefix(package)}.py"
            return ast.parse(path.read_text(encoding="utf-8"))
    return tree


def _fields(node: ast.ClassDef) -> list[SettingFacts]:
    found = []
    for statement, following in zip(node.body, [*node.body[1:], ast.Pass()], strict=True):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        written = ast.unparse(statement.annotation)
        if written.startswith("ClassVar"):
            continue
        about = ""
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            about = " ".join(str(following.value.value).split())
        found.append(SettingFacts(statement.target.id, written, _default(statement.value), about or _described(statement.value)))
    return found


def _default(value: ast.expr | None) -> str:
    if value is None:
        return "required"
    if isinstance(value, ast.Call):  # Field(default, ...)
        return ast.unparse(value.args[0]) if value.args else "made anew"
    return ast.unparse(value)


def _described(value: ast.expr | None) -> str:
    if isinstance(value, ast.Call):
        for keyword in value.keywords:
            if keyword.arg == "description" and isinstance(keyword.value, ast.Constant):
                return str(keyword.value.value)
    return ""


def _class_value(node: ast.ClassDef, name: str) -> object:
    for statement in node.body:
        if (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.target.id == name
                and isinstance(statement.value, ast.Constant)):
            return statement.value.value
    return None
