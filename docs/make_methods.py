"""Writes docs/methods/NAME.md from each method's own docstring and settings: python docs/make_methods.py"""

from __future__ import annotations

from pathlib import Path

from deltaloom.jobs.methods import MethodFacts, catalogue

FOLDER = Path(__file__).parent / "methods"


def page(method: MethodFacts) -> str:
    """One page: the formula and paper as the file states them, and a table of settings."""
    rows = [f"| `{s.name}` | `{s.type.replace(' | ', ' or ')}` | `{s.default}` | {s.about} |" for s in method.settings]
    use = "In a run file: `- {method: " + method.name + "}`."
    return "\n".join([f"# {method.name}", "", "```text", method.text, "```", "", use, "",
                      "| setting | type | default | meaning |", "|---|---|---|---|", *rows, ""])


def pages() -> dict[str, str]:
    """File name -> content of every page."""
    return {f"{method.name}.md": page(method) for method in catalogue()}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
