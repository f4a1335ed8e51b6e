"""Importing the words of the package, the reports or the command line must not import torch."""

import importlib.util
import subprocess
import sys

import pytest

LIGHT = ["deltaloom", "deltaloom.errors", "deltaloom.settings", "deltaloom.events", "deltaloom.report", "deltaloom.models",
         "deltaloom.deltas", "deltaloom.cli.main"]
HEAVY = ["torch", "transformers", "pyarrow", "sklearn", "optuna"]


def loaded_by(module: str) -> list[str]:
    code = f"import sys, {module}; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.parametrize("module", LIGHT)
def test_a_light_module_stays_light(module):
    assert importlib.util.find_spec(module) is not None
    assert loaded_by(module) == []


def test_the_check_can_fail():
    assert "torch" in loaded_by("torch")
