"""Writes docs/methods/NAME.md, docs/presets and docs/compressors from each one's own text: python docs/make_methods.py"""

from __future__ import annotations

from pathlib import Path

from deltaloom.jobs.methods import MethodFacts, catalogue, compressors, presets

DOCS = Path(__file__).parent
PRESET_USE = "In a run file: `- {preset: NAME}`; the resolved run file holds the list."
METHOD_USE = "In a run file: `- {method: NAME}`."
COMPRESSOR_USE = "`deltaloom compress MODEL -o DIR --method NAME`, or in the list `compress` of a run file: `- {method: NAME}`."


def page(method: MethodFacts, use: str) -> str:
    """One page: the formula and paper as the file states them, and a table of settings."""
    rows = [f"| `{s.name}` | `{s.type.replace(' | ', ' or ')}` | `{s.default}` | {s.about} |" for s in method.settings]
    table = ["", "| setting | type | default | meaning |", "|---|---|---|---|", *rows] if rows else []
    return "\n".join([f"# {method.name}", "", "```text", method.text, "```", "", use.replace("NAME", method.name), *table, ""])


def pages() -> dict[str, str]:
    """Path below docs -> content of every page."""
    return ({f"methods/{method.name}.md": page(method, METHOD_USE) for method in catalogue()}
            | {f"presets/{each.name}.md": page(each, PRESET_USE) for each in presets()}
            | {f"compressors/{each.name}.md": page(each, COMPRESSOR_USE) for each in compressors()})


if __name__ == "__main__":
    for name, text in pages().items():
        (DOCS / name).parent.mkdir(exist_ok=True)
        (DOCS / name).write_text(text, encoding="utf-8")
