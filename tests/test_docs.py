"""The pages of docs/methods are those that the methods' docstrings make."""

from __future__ import annotations

import importlib.util
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def test_the_methods_pages_are_current() -> None:
    spec = importlib.util.spec_from_file_location("make_methods", DOCS / "make_methods.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = {path.name: path.read_text(encoding="utf-8") for path in (DOCS / "methods").glob("*.md")}
    assert written == module.pages(), "run python docs/make_methods.py"
