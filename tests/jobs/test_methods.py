import subprocess
import sys
from pathlib import Path

import pytest

from deltaloom import deltas
from deltaloom.compress.base import Compressor
from deltaloom.deltas.base import Method, method_from
from deltaloom.errors import SettingsError
from deltaloom.jobs.methods import catalogue, compressors, method_text, one_or_all
from deltaloom.registry import class_named, names_in

NAMES = names_in("deltaloom.deltas")


def test_the_catalogue_is_every_file_sorted():
    stems = sorted(path.stem for path in Path(deltas.__path__[0]).glob("*.py") if path.stem != "base" and path.stem[0] != "_")
    assert [method.name for method in catalogue()] == [stem.replace("_", "-") for stem in stems]
    assert all(method.summary.endswith(".") and not method.fault for method in catalogue())


@pytest.mark.parametrize("name", NAMES)
def test_settings_are_those_of_the_class_with_defaults_as_written(name):
    facts = {setting.name: setting for setting in one_or_all(name)[0].settings}
    fields = class_named("deltaloom.deltas", name, Method, "method").model_fields
    assert set(facts) == set(fields)
    for key, setting in facts.items():
        if setting.default not in ("required", "made anew") and not setting.default.isupper():
            assert setting.default == repr(fields[key].default), key
    assert [key for key, setting in facts.items() if not setting.about] == []


@pytest.mark.parametrize("name", names_in("deltaloom.compress"))
def test_settings_of_a_compressor_are_those_of_its_class(name):
    found = {fact.name: fact for fact in compressors()}[name]
    assert found.summary.endswith((".", ":")) and not found.fault
    fields = class_named("deltaloom.compress", name, Compressor, "compressor").model_fields
    assert {setting.name for setting in found.settings} == set(fields)
    assert [setting.name for setting in found.settings if not setting.about] == []


def test_it_needs_no_torch():
    code = ("import sys; from deltaloom.jobs.methods import catalogue, method_text\n"
            "method_text(catalogue(), full=True); print('torch' in sys.modules, 'transformers' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False False\n"


def test_a_faulty_file_does_not_hide_the_others(tmp_path):
    for name in ("lora", "norms"):
        (tmp_path / f"{name}.py").write_text((Path(deltas.__path__[0]) / f"{name}.py").read_text())
    (tmp_path / "broken.py").write_text("class Broken(:\n")
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "nameless.py").write_text('"""A file without a method."""\n')
    found = {method.name: method for method in catalogue(tmp_path)}
    assert list(found) == ["binary", "broken", "lora", "nameless", "norms"]
    assert [name for name, method in found.items() if method.fault] == ["binary", "broken", "nameless"]
    assert "broken.py" in found["broken"].fault and found["lora"].settings
    text = method_text(list(found.values()), full=False)
    assert "broken.py cannot be read" in text and "LoRA" in text


@pytest.mark.parametrize(("asked", "answer"), [("qlora", "quantise the base and use lora"), ("rslora", "rslora: true"),
                                               ("pissa", "init: pissa"), ("adapter", "bottleneck"), ("lorra", "'lora'"),
                                               ("bit-fit", "'bitfit'")])
def test_a_name_that_is_no_method_is_answered(asked, answer):
    with pytest.raises(SettingsError, match=rf"deltas\.2: unknown method; got '{asked}'") as error:
        method_from({"method": asked}, "deltas.2")
    assert answer in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_answers_name_no_method_that_exists(name):
    assert set(class_named("deltaloom.deltas", name, Method, "method").asked_as).isdisjoint(NAMES)
