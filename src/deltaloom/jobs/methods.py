"""The catalogues of methods, presets and compressors, read as text: no torch, and a faulty file hides no other."""

from __future__ import annotations

import ast
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from deltaloom import compress, deltas
from deltaloom.deltas.presets import KEY, Preset, preset, preset_names
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


def compressors() -> list[MethodFacts]:
    """Every compressor, by its file in the compress folder."""
    return catalogue(Path(compress.__path__[0]))


def presets() -> list[MethodFacts]:
    """Every preset, with the list that it stands for."""
    return [MethodFacts(name, preset(name).summary, _preset_text(preset(name)), ()) for name in preset_names()]


def _preset_text(found: Preset) -> str:
    entries = [yaml.safe_dump(entry, sort_keys=False, default_flow_style=True, width=1000).strip() for entry in found.deltas]
    lines = [found.summary, "", found.text, "", f"{{{KEY}: {found.name}}} in a run file stands for", "",
             *(f"  - {entry}" for entry in entries)]
    return "\n".join(lines)


def one_or_all(name: str | None) -> list[MethodFacts]:
    """All methods, or the one method, preset or compressor of that name.

    Raises:
        SettingsError: there is no such method.
    """
    found = catalogue()
    if name is None:
        return found
    found += presets() + compressors()
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
        lines += [method.name, "", method.fault or method.text, *(["", "Settings:"] if method.settings else [])]
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
    return MethodFacts(name, text.split("\n", 1)[0], text, tuple(_settings_of(tree, classes[0], path.parent).values()))


def _settings_of(tree: ast.Module, class_name: str, folder: Path) -> dict[str, SettingFacts]:
    """The annotated fields of a class and of its bases in the folder, its own first."""
    found: dict[str, SettingFacts] = {}
    node = next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name), None)
    if node is not None:
        found.update((fact.name, fact) for fact in _fields(node, tree, folder))
        for base in node.bases:
            inherited = _settings_of(_home_of(tree, ast.unparse(base), folder), ast.unparse(base), folder)
            found.update((key, fact) for key, fact in inherited.items() if key not in found)
    return found


def _home_of(tree: ast.Module, name: str, folder: Path) -> ast.Module:
    """The file of the folder that a name is imported from; this one, if it is from elsewhere."""
    package = f"deltaloom.{folder.name}."
    for node in tree.body:
        if (isinstance(node, ast.ImportFrom) and (node.module or "").startswith(package)
                and name in [alias.name for alias in node.names]):
            return ast.parse((folder / f"{(node.module or '').removeprefix(package)}.py").read_text(encoding="utf-8"))
    return tree


def _fields(node: ast.ClassDef, tree: ast.Module, folder: Path) -> list[SettingFacts]:
    found = []
    for statement, following in zip(node.body, [*node.body[1:], ast.Pass()], strict=True):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        kind, about = ast.unparse(statement.annotation), ""
        if kind.startswith("ClassVar"):
            continue
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            about = " ".join(str(following.value.value).split())
        meant = _alias(_home_of(tree, kind, folder), kind) if kind.isidentifier() else None
        if meant is not None:  # a type that several share, with what it means
            kind, about = ast.unparse(meant.elts[0]), about or next(filter(None, map(_described, meant.elts)), "")
        found.append(SettingFacts(statement.target.id, kind, _default(statement.value), about or _described(statement.value)))
    return found


def _alias(tree: ast.Module, name: str) -> ast.Tuple | None:
    """The parts of `name = Annotated[type, ...]` in a file."""
    for node in tree.body:
        if (isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [name]
                and isinstance(node.value, ast.Subscript) and ast.unparse(node.value.value) == "Annotated"
                and isinstance(node.value.slice, ast.Tuple)):
            return node.value.slice
    return None


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
