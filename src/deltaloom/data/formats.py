"""Formats: which columns a format needs, how `auto` decides, and how a record becomes a row."""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltaloom.data.records import Problems, Record
from deltaloom.data.rows import ChatRow, ImageRow, Message, PlainRow, PromptRow, Row, TextRow, TokensRow
from deltaloom.errors import DataError, SettingsError, did_you_mean, listed

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
                  "system": "system", "tool": "tool", "observation": "tool"}
ALIASES = {"tags": ("ner_tags", "labels")}  # columns that are taken for ours when ours is absent
# The wording of Stanford Alpaca (Taori et al. 2023), which most models tuned on such data know.
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
ALPACA_INPUT = ("Below is an instruction that describes a task, paired with an input that provides further context. "
                "Write a response that appropriately completes the request.")


@dataclass(frozen=True)
class Reading:
    """How records are to be read: numbers as labels (regression) or class names, with or without targets, through a template."""

    numbers: bool = False
    need_targets: bool = True
    template: str | None = None
    folder: Path = field(default_factory=Path)  # paths of images in a record start here


class BadRow(Exception):
    """Why a record is no row; collected, never shown on its own."""


class Fields:
    """The fields of one record, checked as they are taken."""

    def __init__(self, values: Mapping[str, Any], reading: Reading) -> None:
        self.values, self.reading = values, reading

    def text(self, name: str) -> str:
        """A string that is not blank."""
        value = self.given(name)
        if not isinstance(value, str):
            raise BadRow(f"'{name}' must be text, got {_shown(value)}")
        if not value.strip():
            raise BadRow(f"'{name}' is empty")
        return whole(value, name)

    def optional(self, name: str) -> str:
        """A string; empty if absent or null."""
        return "" if self.values.get(name) in (None, "") else self.text(name)

    def given(self, name: str) -> Any:
        """A value that is there and not null."""
        if self.values.get(name) is None:
            what = "is null" if name in self.values else "is missing"
            near = did_you_mean(name, [key for key in self.values if key != name])
            raise BadRow(f"'{name}' {what}. {near}".rstrip(". ") + ("?" if near else ""))
        return self.values[name]

    def wanted(self, name: str) -> bool:
        """Whether a target has to be read: always when targets are needed, else where there is one."""
        return self.reading.need_targets or self.values.get(name) is not None

    def templated(self, name: str) -> str:
        """The text called `name`, or what the template makes of the record."""
        if self.reading.template is None:
            return self.text(name)
        used = {field: _plain(self.given(field), field) for field in template_fields(self.reading.template)}
        return whole(self.reading.template.format(**used), "template")


def _text_label(where: str, fields: Fields) -> Row:
    label = None
    if fields.wanted("label"):
        value = fields.given("label")
        label = number(value) if fields.reading.numbers else class_name(value)
    return TextRow(where, fields.templated("text"), fields.optional("text_pair") or None, label)


def _prompt_completion(where: str, fields: Fields) -> Row:
    return PromptRow(where, fields.templated("prompt"), fields.text("completion") if fields.wanted("completion") else None)


def _alpaca(where: str, fields: Fields) -> Row:
    if fields.reading.template is not None:
        prompt = fields.templated("prompt")
    else:
        context = fields.optional("input")
        system = fields.optional("system") or (ALPACA_INPUT if context else ALPACA)
        middle = f"### Input:\n{context}\n\n" if context else ""
        prompt = f"{system}\n\n### Instruction:\n{fields.text('instruction')}\n\n{middle}### Response:\n"
    return PromptRow(where, prompt, fields.text("output") if fields.wanted("output") else None)


def _messages(where: str, fields: Fields) -> Row:
    return ChatRow(where, _turns(fields, "messages", "role", "content", {role: role for role in ROLES}))


def _sharegpt(where: str, fields: Fields) -> Row:
    turns = _turns(fields, "conversations", "from", "value", SHAREGPT_ROLES)
    system = fields.optional("system")
    return ChatRow(where, (Message("system", system), *turns) if system and turns[0].role != "system" else turns)


def _turns(fields: Fields, name: str, role_key: str, text_key: str, roles: Mapping[str, str]) -> tuple[Message, ...]:
    items = fields.given(name)
    if not isinstance(items, list) or not items:
        raise BadRow(f"'{name}' must be a list of turns, got {_shown(items)}")
    turns = []
    for index, item in enumerate(items):
        place = f"{name}[{index}]"
        if not isinstance(item, dict):
            raise BadRow(f"{place} must be an object with '{role_key}' and '{text_key}', got {_shown(item)}")
        role, content = item.get(role_key), item.get(text_key)
        if not isinstance(role, str) or role not in roles:
            raise BadRow(f"{place}: {role_key} is {_shown(role)}; legal: {', '.join(roles)}")
        if not isinstance(content, str):
            calls = " (calls of tools are not read)" if item.get("tool_calls") else ""
            raise BadRow(f"{place}: {text_key} must be text, got {_shown(content)}{calls}")
        if not content.strip() and roles[role] != "system":
            raise BadRow(f"{place}: {text_key} is empty")
        turns.append(Message(roles[role], whole(content, place)))
    _check_order([turn.role for turn in turns], name, fields.reading.need_targets)
    return tuple(turns)


def _check_order(roles: list[str], name: str, need_targets: bool) -> None:
    if "system" in roles[1:]:
        raise BadRow(f"{name}: a system turn may only come first, it is turn {roles.index('system', 1)}")
    spoken = roles[1:] if roles[0] == "system" else roles
    if not spoken or spoken[0] != "user":
        raise BadRow(f"{name}: the first turn after a system turn must be the user's, the roles are {', '.join(roles[:6])}")
    if need_targets and "assistant" not in roles:
        raise BadRow(f"{name}: no assistant turn to learn from")


def _plain_text(where: str, fields: Fields) -> Row:
    return PlainRow(where, fields.templated("text"))


def _tokens(where: str, fields: Fields) -> Row:
    words = fields.given("tokens")
    if not isinstance(words, list) or not words or not all(isinstance(word, str) and word.strip() for word in words):
        raise BadRow(f"'tokens' must be a list of words, got {_shown(words)}")
    words = [whole(word, "tokens") for word in words]
    if not fields.wanted("tags"):
        return TokensRow(where, tuple(words))
    tags = fields.given("tags")
    if not isinstance(tags, list) or len(tags) != len(words):
        size = f"{len(tags)} of them" if isinstance(tags, list) else _shown(tags)
        raise BadRow(f"the tags must be a list as long as 'tokens' ({len(words)}), got {size}")
    return TokensRow(where, tuple(words), tuple(class_name(tag) for tag in tags))


def _image(where: str, fields: Fields) -> Row:
    value = fields.given("image")
    label = class_name(fields.given("label")) if fields.wanted("label") else None
    if isinstance(value, dict):  # how Hugging Face's datasets stores an image: {bytes, path}
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and value and "\0" not in value:
        return ImageRow(where, fields.reading.folder / value, label)
    if not isinstance(value, bytes):
        raise BadRow(f"'image' must be the bytes of an image file or a path, got {_shown(value)}")
    return ImageRow(where, value, label)


@dataclass(frozen=True)
class Format:
    """One format: the columns a row must have, those that only a target needs, those it may have, and how to read it."""

    name: str
    needs: tuple[str, ...]
    targets: tuple[str, ...]
    may: tuple[str, ...]
    read: Callable[[str, Fields], Row]
    templated: str | None = None  # the column that a template replaces

    def columns(self, reading: Reading) -> list[str]:
        """The columns that must be there."""
        needs = [name for name in self.needs if reading.template is None or self.templated is None]
        return [*needs, *(self.targets if reading.need_targets else ())]


FORMATS = {each.name: each for each in (
    Format("text-label", ("text",), ("label",), ("text_pair",), _text_label, "text"),
    Format("prompt-completion", ("prompt",), ("completion",), (), _prompt_completion, "prompt"),
    Format("messages", ("messages",), (), (), _messages),
    Format("alpaca", ("instruction",), ("output",), ("input", "system"), _alpaca, "prompt"),
    Format("sharegpt", ("conversations",), (), ("system",), _sharegpt),
    Format("text", ("text",), (), (), _plain_text, "text"),
    Format("tokens", ("tokens",), ("tags",), (), _tokens),
    Format("image", ("image",), ("label",), (), _image),
)}


def choose(name: str, columns: Collection[str], reading: Reading, accepts: Collection[str]) -> Format:
    """The format called `name`, or for `auto` the one of `accepts` that the columns show; depends on nothing but the names.

    Raises:
        DataError: no format fits or several do; the format does not suit the task; a column is nowhere.
    """
    if name != "auto":
        if name not in accepts:
            raise DataError(f"format '{name}' does not suit this task", legal=[*accepts, "auto"])
        missing = _missing(FORMATS[name], columns, reading)
        if missing:
            raise _no_columns(f"format '{name}' needs the column {listed(map(repr, missing))}", columns, missing)
        return _template_fits(FORMATS[name], reading)
    fitting = _fitting(columns, reading, accepts)
    if not fitting:
        elsewhere = _fitting(columns, reading, [each for each in FORMATS if each not in accepts])
        looks = f"The columns look like {elsewhere[0].name}, which this task does not take. " if elsewhere else ""
        wanted = "; ".join(f"{each}: {', '.join(FORMATS[each].columns(reading))}" for each in accepts)
        closest = min((_missing(FORMATS[each], columns, reading) for each in accepts), key=len, default=[])
        raise _no_columns(f"no format of this task fits the columns (needed: {wanted})", columns, closest, looks)
    if len(fitting) > 1:
        raise DataError("the columns fit several formats", got=sorted(columns), legal=[each.name for each in fitting],
                        hint="Say which one is meant with data.format.")
    return _template_fits(fitting[0], reading)


def _fitting(columns: Collection[str], reading: Reading, accepts: Iterable[str]) -> list[Format]:
    """Formats whose columns are all there, without those that another one explains better (text within text-label)."""
    known = [FORMATS[name] for name in accepts]
    found = {each.name: set(each.columns(reading)) for each in known if set(each.columns(reading)) <= set(columns)}
    if reading.template is not None:  # a template replaces the only column of plain text, so anything would fit
        found = {name: needs for name, needs in found.items() if needs or "text" in columns}
    return [FORMATS[name] for name, needs in found.items() if not any(needs < other for other in found.values())]


def _missing(wanted: Format, columns: Collection[str], reading: Reading) -> list[str]:
    return [column for column in wanted.columns(reading) if column not in columns]


def _template_fits(chosen: Format, reading: Reading) -> Format:
    if reading.template is not None and chosen.templated is None:
        hint = "Chats use the tokenizer's chat template." if chosen.name in ("messages", "sharegpt") else None
        raise SettingsError(f"data.template has no place in format '{chosen.name}'",
                            legal=[each.name for each in FORMATS.values() if each.templated], hint=hint)
    return chosen


def _no_columns(what: str, columns: Collection[str], missing: list[str], looks: str = "") -> DataError:
    near = f"{did_you_mean(missing[0], columns)} ".lstrip() if missing else ""
    rename = f"If the file calls it otherwise: data.columns: {{{missing[0]}: NAME_IN_THE_FILE}}." if missing else ""
    return DataError(f"{what}; the file has {listed(map(repr, sorted(columns)))}", hint=f"{looks}{near}{rename}".strip())


def convert(records: Iterable[Record], chosen: Format, columns: Mapping[str, str], reading: Reading,
            problems: Problems) -> list[Row]:
    """The rows of records; what is wrong with a record goes to `problems`."""
    rows = []
    for record in records:
        try:
            rows.append(chosen.read(record.where, Fields(renamed(record.fields, columns, chosen), reading)))
        except BadRow as bad:
            problems.add(record.where, str(bad))
    return rows


def renamed(fields: Mapping[str, Any], columns: Mapping[str, str], chosen: Format | None = None) -> dict[str, Any]:
    """A record's fields under our names too; the file's own names stay for templates."""
    ours = {name: fields[column] for name, column in columns.items() if column in fields}
    named = {**fields, **ours}
    for name, others in ALIASES.items():
        present = [other for other in others if other in named]
        if present and name not in named and chosen is not None and name in chosen.targets:
            named[name] = named[present[0]]
    return named


def visible(found: Collection[str], columns: Mapping[str, str]) -> set[str]:
    """The column names that formats are chosen by: ours in place of those they rename."""
    names = (set(found) - set(columns.values())) | {name for name, column in columns.items() if column in found}
    return names | {name for name, others in ALIASES.items() if "tokens" in names and not names.isdisjoint(others)}


def template_fields(template: str) -> list[str]:
    """The names in braces of a template.

    Raises:
        SettingsError: braces that do not pair, or more than a plain name in them.
    """
    try:
        parts = [(name, spec, conversion) for _, name, spec, conversion in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise SettingsError(f"data.template cannot be read: {error}", got=template,
                            hint="Write {{ and }} for plain braces.") from None
    fancy = [name for name, spec, conversion in parts if not name or spec or conversion or set(name) & set(".[]")]
    if fancy or not parts:
        raise SettingsError("data.template needs column names in braces, and nothing but names there", got=template,
                            hint="For example: 'Data: {prompt}'. Write {{ and }} for plain braces.")
    return list(dict.fromkeys(name for name, _, _ in parts))


def class_name(value: Any) -> str:
    """A class label as its name: text as it is, whole numbers and truth values written out."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        raise BadRow("the label is NaN" if math.isnan(value) else f"the label is {value}: fractions are for task regression")
    if not isinstance(value, str):
        raise BadRow(f"a label must be text, a whole number, or true or false, got {_shown(value)}")
    if not value.strip():
        raise BadRow("the label is empty")
    return whole(value, "label")


def number(value: Any) -> float:
    """A regression label: a finite number, also one that a table holds as text."""
    try:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError
        found = float(value)
    except (ValueError, OverflowError):
        raise BadRow(f"the label of a regression must be a number, got {_shown(value)}") from None
    if not math.isfinite(found):
        raise BadRow(f"the label is {found}")
    return found


def whole(text: str, name: str) -> str:
    """The text, refused if it holds half a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRow(f"'{name}' holds half a surrogate pair (\\ud800 to \\udfff), which is no character") from None
    return text


def _plain(value: Any, name: str) -> str:
    if isinstance(value, (str, int, float)):
        return str(value)
    raise BadRow(f"'{name}' must be text or a number to stand in the template, got {_shown(value)}")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."
