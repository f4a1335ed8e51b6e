"""What Flower ships: the server's app holds deltaloom's joint rounds, a client's app is a messenger to a party's process."""

from dataclasses import replace
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from deltaloom.checkpoint import native
from deltaloom.private.coordinating import DurableRounds
from deltaloom.private.flower import answer, hold_rounds
from deltaloom.private.means.base import mean_named
from deltaloom.private.rounds import Coordinator, RoundSettings

server = ServerApp()
client = ClientApp()


@server.main()
def rounds(grid: Grid, context: Context) -> None:
    """From the delta in FOLDER/begin to the common one in FOLDER/common; started anew, it goes on where it was."""
    config = context.run_config
    folder = Path(str(config["folder"]))
    begin, record = native.read(folder / "begin")
    settings = RoundSettings(rounds=int(config["rounds"]), parties=int(config["parties"]), quorum=int(config["quorum"]),
                             deadline=float(config["deadline"]), norm_bound=float(config["norm-bound"]) or None)
    machine = Coordinator(settings, mean_named(str(config["mean"]))(), begin.state, run=str(config["name"]))
    held = DurableRounds(machine, folder / "rounds.safetensors",
                         tell=lambda each: print(f"round {each.round}: {each.what} {' '.join(each.parties)}", flush=True))
    common = hold_rounds(grid, held)
    native.write(replace(begin, state=common), folder / "common", base=record.base, replace=True)


@client.train()
def party(message: Message, context: Context) -> Message:
    """No model and no data here: only the way to the process that has them."""
    return answer(message, str(context.node_config["mailbox"]))
