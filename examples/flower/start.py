"""A whole federation on this machine: a SuperLink, two SuperNodes, each beside its data owner's process, and one `flwr run`.

    python examples/flower/start.py FOLDER [MODEL]

In earnest each of these processes is started by whom it belongs to, with Flower's TLS and node authentication.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from deltaloom.checkpoint import native

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from party import Party  # noqa: E402

BIN = Path(sys.executable).parent
NAMES = ("ada", "bob")
# Nothing is fetched and nobody is told while this runs.
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
         "PYTHONUNBUFFERED": "1"}


class Federation:
    """The processes, each with a log in the folder and a group of its own, so that none is left behind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        home = self.folder / "flwr"
        home.mkdir(parents=True, exist_ok=True)
        self.environment = os.environ | QUIET | {"FLWR_HOME": str(home), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
        self.running: list[subprocess.Popen] = []

    def start(self, log: str, *command: object) -> subprocess.Popen:
        with (self.folder / f"{log}.log").open("ab") as output:
            process = subprocess.Popen([str(part) for part in command], cwd=self.folder, env=self.environment, stdout=output,
                                       stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True)
        self.running.append(process)
        return process

    def stop(self) -> None:
        for how, patience in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 3.0)):
            for process in self.running:
                try:
                    os.killpg(process.pid, how)
                except ProcessLookupError:
                    continue
            until = time.monotonic() + patience
            while any(process.poll() is None for process in self.running) and time.monotonic() < until:
                time.sleep(0.1)


def run(folder: Path, source: str = "bundled:minilm", *, rounds: int = 2, patience: float = 600.0) -> Path:
    """Where the common delta lies."""
    federation = Federation(folder)
    folder = federation.folder
    if not (folder / "begin").is_dir():
        native.save(Party(source).tuned, folder / "begin")
    port, *others = free_ports(1 + len(NAMES))
    try:
        for part, name in enumerate(NAMES):
            federation.start(name, sys.executable, HERE / "party.py", folder, name, part, len(NAMES), source)
        federation.start("superlink", BIN / "flower-superlink", "--insecure", "--disable-runtime-dependency-installation",
                         "--port", port)
        wait_for(lambda: answers(port), patience, "the SuperLink")
        for name, other in zip(NAMES, others, strict=True):
            federation.start(f"node-{name}", BIN / "flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}",
                             "--port", other, "--node-config", f'mailbox="{folder / name}.sock"')
        here = f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
        (folder / "flwr" / "config.toml").write_text(here, encoding="utf-8")
        shutil.copytree(HERE / "app", folder / "app", dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        done = federation.start("run", BIN / "flwr", "run", folder / "app", "here", "--stream", "--run-config",
                                f'folder="{folder}" rounds={rounds}')
        wait_for(lambda: (folder / "common").is_dir() or done.poll() is not None, patience, "the rounds")
        if not (folder / "common").is_dir():
            raise SystemExit(f"the run ended without a result; {folder / 'run.log'} says why")
        wait_for(lambda: all((folder / name / "delta").is_dir() for name in NAMES), 60, "the parties")
    finally:
        federation.stop()
    return folder / "common"


def free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


def answers(port: int) -> bool:
    with socket.socket() as trial:
        trial.settimeout(1)
        return trial.connect_ex(("127.0.0.1", port)) == 0


def wait_for(ready, patience: float, what: str) -> None:
    until = time.monotonic() + patience
    while not ready():
        if time.monotonic() > until:
            raise SystemExit(f"{what} did not get ready within {patience:g} seconds; the logs say why")
        time.sleep(0.2)


if __name__ == "__main__":
    print("The common delta:", run(Path(sys.argv[1]), *sys.argv[2:3]))
