import typing

import pytest

from deltaloom.data.formats import FORMATS
from deltaloom.data.settings import NAMES, DataSettings, FormatName, files_of, resolved
from deltaloom.errors import SettingsError


def test_the_settings_name_every_format_and_column():
    assert set(typing.get_args(FormatName)) == {"auto", *FORMATS}
    assert set(NAMES) == {name for each in FORMATS.values() for name in (*each.needs, *each.targets, *each.may)}


@pytest.mark.parametrize(("values", "words"), [
    ({"train": []}, "at least one file"), ({"train": ""}, "at least one file"), ({"eval_fraction": 0.6}, "eval_fraction"),
    ({"eval": "a", "eval_fraction": 0.1}, "exclude each other"), ({"columns": {"promt": "x"}}, "Did you mean 'prompt'"),
    ({"columns": {"prompt": "x", "completion": "x"}}, "cannot serve two"), ({"format": "chat"}, "format"),
    ({"max_length": 1}, "max_length"), ({"trian": "a"}, "unknown key"),
])
def test_illegal_settings_say_why(values, words):
    with pytest.raises(SettingsError, match=words):
        DataSettings(**values)


def test_paths(tmp_path):
    assert files_of("a") == ["a"] and files_of(["a", "b"]) == ["a", "b"] and files_of(None) == []
    assert resolved("a.jsonl", tmp_path) == tmp_path / "a.jsonl"
    assert resolved(str(tmp_path / "b"), tmp_path / "x") == tmp_path / "b"
    assert "~" not in str(resolved("~/a", tmp_path))
