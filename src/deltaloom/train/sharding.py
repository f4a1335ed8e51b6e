"""A frozen base spread over the processes, for one that does not fit one device: PyTorch's FSDP2, block by block.

Each process keeps its part of every block's tensors and gets the others' only while that block runs. What trains stays whole in
every process, and its gradients are summed as without sharding: deltas are small, and controllers see whole gradients. Outside
the blocks (embeddings, last norm, head) nothing is spread.
"""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from deltaloom.compact.face import compact_layers
from deltaloom.errors import RefusedError, SettingsError, listed
from deltaloom.sites import all_sites
from deltaloom.train.settings import TrainSettings
from deltaloom.train.team import Team
from deltaloom.tuned import Tuned


def check_shard(settings: TrainSettings, team: Team) -> None:
    """That there is something to spread the base over, if it is to be.

    Raises:
        SettingsError: the team has one member.
    """
    if settings.shard and team.size == 1:
        raise SettingsError("train.shard spreads the base over several processes, and there is one", got="train.shard: true",
                            hint="Start the run with torchrun --nproc-per-node N -m deltaloom tune RUN.yaml, or leave it out.")


def shard_base(tuned: Tuned, team: Team) -> None:
    """Spread the blocks of the frozen model over the team and move everything to its devices; all processes call this.

    From now on they have to call the model equally often, which `team` sees to.

    Raises:
        RefusedError: the model has no blocks, or its layers hold their weights in buffers.
    """
    blocks = _blocks(tuned)
    compact = sorted(compact_layers(tuned.model))
    if compact:
        raise RefusedError("train.shard spreads parameters, and compact layers hold their weights in buffers",
                           got=listed(compact, 4), hint="Leave out base.quantise, or train.shard.")
    mesh = init_device_mesh(team.device.type, (team.size,))
    own = {parameter for lane in tuned.lanes for part in tuned.attached(lane) for _, module in part.named_deltas()
           for parameter in module.parameters()}
    for block in blocks:
        # Each block is a root of its own: a root around them would have to be called first, and tasks call parts of the model.
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=own)
    tuned.to(team.device)
    team.lockstep = True


def _blocks(tuned: Tuned) -> list[nn.Module]:
    with tuned.bare() as model:
        sites = all_sites(model)
    stacks = dict.fromkeys(site.stack for site in sites if site.kind == "linear" and site.layer is not None)
    found = [block for path in stacks for block in tuned.model.get_submodule(path).children()]
    if not found:
        raise RefusedError("train.shard spreads the blocks of a model, and this one has none", got=type(tuned.model).__name__)
    return found
