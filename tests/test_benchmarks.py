"""The scripts in benchmarks/ still fit the library: they run rarely, and must not be found broken when the quiet hour comes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_every_script_loads() -> None:
    """All modules in one process; what belongs to the peers is imported by them only where it is used."""
    modules = [".".join(path.relative_to(BENCHMARKS).with_suffix("").parts) for path in sorted(BENCHMARKS.rglob("*.py"))
               if path.name != "__init__.py"]
    packages = {path.name for path in BENCHMARKS.iterdir() if (path / "__init__.py").exists()}
    scripts = [name for name in modules if name not in packages]  # evidence.py starts the package of its name
    assert len(scripts) > 15
    code = "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(name)"
    done = subprocess.run([sys.executable, "-c", code, *scripts], cwd=BENCHMARKS.parent, capture_output=True, text=True,
                          env={"PYTHONPATH": f"{BENCHMARKS.parent / 'src'}:{BENCHMARKS}", "PATH": "/usr/bin:/bin"}, check=False)
    assert done.returncode == 0, done.stderr
