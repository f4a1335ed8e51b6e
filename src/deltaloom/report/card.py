"""The model card of a run folder: a README.md in Markdown that can be published, without paths, secrets or rows of the data."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from html import escape

import yaml

from deltaloom.report import text
from deltaloom.report.tables import RunFacts, Setting

_PATH = re.compile(r"^(/|~|\.{1,2}[/\\]|[A-Za-z]:[/\\]|\\\\|file:)")
# The folders of an absolute path inside a text.
_FOLDERS = re.compile(r"(?<![\w:/\\.])(?:~|[A-Za-z]:)?(?:[/\\][\w.\-]+)+[/\\](?=[\w.\-])")
_PATH_KEYS = frozenset({"from", "train", "eval", "path", "file", "output", "model"})
_MARKDOWN = re.compile(r"([\\`*_\[\]|#~])")
_SHOWN_SETTINGS = ("deltas.", "train.", "base.", "seed", "data.max_length", "data.format", "data.template")


def model_card(facts: RunFacts) -> str:
    """README.md for a run folder: header for a model hub, how to use it, what it reached, how it was trained.

    Of files only their names are told, of the data only counts and label names, of warnings only kinds and counts (their
    messages may quote rows or folders).
    """
    parts = [_header(facts), f"# {_plain(facts.name)}", _introduction(facts), _usage(facts), _results(facts), _data(facts),
             _training(facts), _warnings(facts),
             "## Licence\n\nThe licence of this delta has not been stated: add `license:` to the header above. "
             "The base model and the training data keep their own licences and terms, which this card does not replace."]
    return "\n\n".join(part for part in parts if part) + "\n"


def base_model(model: str) -> str:
    """The base model as a card may name it: a hub id or `bundled:` name as it is, of a path only the last part."""
    name = model.strip()
    if _PATH.match(name) or "\\" in name or name.count("/") > 1 or name.lower().endswith(".gguf"):
        return _last_part(name)
    return name


def _header(facts: RunFacts) -> str:
    header: dict[str, object] = {"library_name": "deltaloom"}
    if facts.model:
        header["base_model"] = text.one_line(base_model(facts.model).partition("@")[0])
    words = ["delta-tuning", *facts.methods, *([facts.task] if facts.task else [])]
    header["tags"] = [text.one_line(word, 100) for word in dict.fromkeys(words)]
    return "---\n" + yaml.safe_dump(header, sort_keys=False, allow_unicode=True, width=1000) + "---"


def _introduction(facts: RunFacts) -> str:
    methods = " + ".join(_plain(method) for method in facts.methods) or "unknown method"
    sizes = facts.sizes
    lines = [f"A delta ({methods}) for {_code(base_model(facts.model) or 'an unknown model')}"
             + (f", task {_code(facts.task)}" if facts.task else "")
             + ". It is a small set of trained tensors on top of the frozen base model, which is needed to use it."]
    if sizes.delta_bytes is not None or sizes.trainable_parameters is not None:
        lines.append(f"Size: {text.byte_size(sizes.delta_bytes)}, {text.count(sizes.trainable_parameters)} trained parameters, "
                     f"{text.share(sizes.trainable_share)} of the base model's {text.count(sizes.total_parameters)}"
                     + (f", and a new head of {text.count(sizes.head_parameters)}." if sizes.head_parameters else "."))
    if facts.status != "completed":
        lines.append(f"**The training ended early or its record is cut: {_plain(facts.status)}.**")
    return "\n\n".join(lines)


def _usage(facts: RunFacts) -> str:
    """Two ways: the command line on this folder, and the library."""
    source = base_model(facts.model) or "MODEL"
    labels = _labels(facts)
    arguments = [json.dumps(source, ensure_ascii=False), f"task={json.dumps(facts.task or 'causal-lm')}"]
    arguments += [f"labels=[{', '.join(json.dumps(label, ensure_ascii=False) for label in labels)}]"] if labels else []
    codec = facts.setting("base.quantise")
    arguments += [f"quantise={json.dumps(str(codec))}"] if codec else []
    code = ["import deltaloom", "from deltaloom.models import load_model", "", f"base = load_model({', '.join(arguments)})",
            'model = deltaloom.load(base.model, "delta")  # called like the base model']
    commands = ["pip install deltaloom", "deltaloom predict . --data rows.jsonl -o predictions.jsonl"]
    return "\n".join(("## Use", "", "In this folder:", "", "```sh", *commands, "```", "", "```python",
                      *(text.printable(line).replace("```", "'''") for line in code), "```"))


def _labels(facts: RunFacts) -> list[str]:
    """Label names in the model's order (the per-class results have the same)."""
    names = facts.data.label_order or [row.label for row in facts.classes]
    return [text.one_line(name, 200) for name in names] if len(names) <= 50 else []


def _results(facts: RunFacts) -> str:
    if not facts.metrics:
        return ""
    rows = [(metric.name, text.measured(metric.base), text.measured(metric.value), text.signed(metric.gain),
             f"{text.measured(metric.low)} to {text.measured(metric.high)}" if metric.low is not None and metric.high is not None
             else text.DASH) for metric in facts.metrics]
    rows_used = f" on {facts.data.eval_rows:,} evaluation rows" if facts.data.eval_rows is not None else ""
    majority = ", ".join(f"{_plain(metric.name)} {text.measured(metric.majority)}"
                         for metric in facts.metrics if metric.majority is not None)
    return (f"## Results\n\nBefore and after tuning{rows_used}; losses are per token or row in nats.\n\n"
            + _table(("metric", "before", "after", "gain", "95% interval"), rows)
            + (f"\n\nAlways giving the most frequent answer reaches {majority}." if majority else ""))


def _data(facts: RunFacts) -> str:
    data = facts.data
    rows = [("training file", _names(facts.setting("data.train"))), ("evaluation file", _names(facts.setting("data.eval"))),
            ("format", data.format), ("training rows", text.count(data.rows) if data.rows is not None else ""),
            ("evaluation rows", text.count(data.eval_rows) if data.eval_rows is not None else "")]
    rows += [(f"label {text.one_line(label, 80)}", f"{number:,} rows") for label, number, _ in data.labels[:30]]
    known = [row for row in rows if row[1]]
    return "## Data\n\n" + _table(("what", "value"), known) if known else ""


def _training(facts: RunFacts) -> str:
    sizes = facts.sizes
    rows = [(setting.key, _shown(setting)) for setting in facts.settings if setting.key.startswith(_SHOWN_SETTINGS)]
    rows += [("training time", text.duration(sizes.seconds)), ("tokens", text.count(sizes.tokens)),
             ("peak memory of training", text.byte_size(sizes.peak_memory_bytes))]
    known = [(key, value) for key, value in rows if value not in ("", "null", text.DASH)]
    return "## Training\n\n" + _table(("setting", "value"), known) if known else ""


def _warnings(facts: RunFacts) -> str:
    if not facts.warnings:
        return ""
    return "## Warnings\n\n" + _table(("kind", "times"), [(warning.kind, f"{warning.count:,}") for warning in facts.warnings])


def _shown(setting: Setting) -> str:
    """The value, with the names of files only."""
    key = setting.key.rpartition(".")[2]
    items = setting.value.strip("[]").split(", ")
    if key in _PATH_KEYS or any(_PATH.match(item) for item in items):
        return _names(setting.value)
    return _FOLDERS.sub("", setting.value)


def _names(value: str) -> str:
    return ", ".join(_last_part(item) for item in value.strip("[]").split(", ")) if value not in ("", "null") else ""


def _last_part(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def _plain(value: str) -> str:
    """One line that Markdown and HTML leave as it is."""
    return _MARKDOWN.sub(r"\\\1", escape(text.one_line(value, 500), quote=False))


def _code(value: str) -> str:
    return "`" + text.one_line(value, 300).replace("`", "'") + "`"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_plain(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)
