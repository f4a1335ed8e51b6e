"""The pages of docs/methods and docs/compressors are those that the docstrings make."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.toys import toy, toy_batch

DOCS = Path(__file__).parents[1] / "docs"


def test_the_methods_pages_are_current() -> None:
    spec = importlib.util.spec_from_file_location("make_methods", DOCS / "make_methods.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = {path.relative_to(DOCS).as_posix(): path.read_text(encoding="utf-8")
               for folder in ("methods", "presets", "compressors") for path in (DOCS / folder).glob("*.md")}
    assert written == module.pages(), "run python docs/make_methods.py"


def test_the_readmes_library_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    block = text.split("## As a library", 1)[1].split("```python", 1)[1].split("```", 1)[0]
    first, second = block.split("\n\n", 2)[1:]  # training and saving, then loading: each on a model of its own
    monkeypatch.chdir(tmp_path)
    for part in (first, second):
        exec("import deltaloom\n" + part, {"model": toy("llama"), "batch": toy_batch("llama", rows=2)})
    assert (tmp_path / "delta" / "delta.json").is_file()
    assert (tmp_path / "again" / "delta.json").is_file()
