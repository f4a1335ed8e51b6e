"""A model cut in two after its k-th block: the front for the party, the back for the owner.

    front = tokenizer, embeddings, blocks 0..k-1          (deltas are attached here, under the names of the whole model)
    back  = blocks k..n-1, final norm
    head  = at the owner with the back, or at the party with the front

Both halves are models of the whole model's class, built from its configuration with fewer blocks; what a half does not hold is
absent. What belongs where is the table of architectures' word, and every cut is tried on a few tokens before it is given out:
front and back together give the whole model's last hidden states bit for bit, or the cut is refused.

Tied embeddings: the output matrix then is the table of tokens, so the party holds it too. `Half.tied` says so.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from deltaloom import attention
from deltaloom.architectures import FAMILIES, Before, Halves
from deltaloom.errors import RefusedError, SettingsError
from deltaloom.models.identity import backbone_prefix, fingerprint
from deltaloom.models.quiet import quiet_transformers
from deltaloom.private.messages import BackFacts
from deltaloom.private.replay import run_back, run_front

Part = Literal["front", "back"]
Holder = Literal["owner", "party"]
TASKS = ("causal-lm", "sequence-classification")
PER_BLOCK = ("layer_types", "mlp_layer_types", "no_rope_layers")  # lists of configurations with an entry for each block
PROBE = 5  # tokens of the longer of two rows


@dataclass(frozen=True)
class Half:
    """A front or a back: the model and what must agree with the other half.

    `fingerprint` is the whole model's, `config` its configuration; `tied`: the head's matrix is the table of tokens; `front`:
    the front's own hash, see `front_hash`.
    """

    part: Part
    model: PreTrainedModel
    config: PreTrainedConfig
    task: str
    cut: int
    head: Holder
    tied: bool
    fingerprint: str
    front: str = ""

    @property
    def blocks(self) -> int:
        """Blocks of the whole model."""
        return int(self.config.num_hidden_layers)

    @property
    def has_head(self) -> bool:
        """Whether the head is in this half."""
        return (self.part == "front") == (self.head == "party")

    @property
    def is_decoder(self) -> bool:
        """Whether a place sees only those before it."""
        return halves_of(self.config).scored == "last"

    def facts(self) -> BackFacts:
        """What a back tells parties."""
        output = self.model.get_output_embeddings() if self.task == "causal-lm" else None
        outputs = 0 if not self.has_head else int((self.config.num_labels if output is None else self.config.vocab_size) or 0)
        longest = getattr(self.config, "max_position_embeddings", None)  # some configurations have none
        return BackFacts(self.fingerprint, self.config.model_type, self.task, self.cut, self.blocks,
                         int(self.config.hidden_size), outputs, longest, str(self.model.dtype).removeprefix("torch."),
                         self.front)


class Absent(nn.Module):
    """Stands where a half has nothing."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Refuses."""
        raise RefusedError("this half of the model does not hold what was asked for", got=self.name)


class Given(nn.Module):
    """Embeddings of a back: the hidden states that came over the cut, as they are."""

    def forward(self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None,
                position_ids: Tensor | None = None, **others: Any) -> Tensor | None:
        """(batch, time, d_model)"""
        return inputs_embeds


class NoPositions(nn.Module):
    """Positions of a back: they were added in the front."""

    def forward(self, position_ids: Tensor) -> Tensor:
        """Zero, whatever the positions."""
        return torch.zeros((), device=position_ids.device)


def halves_of(config: PreTrainedConfig) -> Halves:
    """How models of this configuration are cut.

    Raises:
        RefusedError: models of this family are not.
    """
    family = FAMILIES.get(config.model_type)
    if family is None or family.halves is None:
        legal = sorted(name for name, known in FAMILIES.items() if known.halves is not None)
        raise RefusedError("models of this family cannot be cut in two", got=config.model_type, legal=legal)
    return family.halves


def split(model: PreTrainedModel, task: str, cut: int, *, head: Holder = "owner") -> tuple[Half, Half]:
    """(front, back) of a model after `cut` blocks, 1 <= cut < blocks; they share the model's memory, which stays as it is.

    The model is one as loaded, without deltas. `head` says who holds the head, a classifier's pooler included.

    Raises:
        SettingsError: the cut or the task is not legal. RefusedError: the family, or this model, cannot be cut exactly.
    """
    _check(model, task, cut)
    tied = _is_tied(model)
    whole = copy.deepcopy(model.config)
    facts = (fingerprint(model), front_hash(model, cut))
    made = {part: Half(part, _built(type(model), whole, cut, part, head), whole, task, cut, head, tied, *facts)
            for part in ("front", "back")}
    for half in made.values():
        fill(half, tensors_of(model, half.part, cut, head))
        if task == "causal-lm":
            half.model.generation_config = copy.deepcopy(model.generation_config)
        half.model.set_attn_implementation(model.config._attn_implementation)
    _try(model, made["front"], made["back"])
    for half in made.values():
        attention.install(half.model)
    return made["front"], made["back"]


def empty(config: PreTrainedConfig, cls: type[PreTrainedModel], part: Part, task: str, cut: int, head: Holder, tied: bool,
          print_of: str) -> Half:
    """A half without values, from the whole model's configuration; `fill` gives it its tensors.

    Raises:
        SettingsError: the cut lies outside of the model.
    """
    _check_place(config, cut)
    half = Half(part, _built(cls, config, cut, part, head), config, task, cut, head, tied, print_of)
    attention.install(half.model)
    return half


def tensors_of(model: nn.Module, part: Part, cut: int, head: Holder) -> dict[str, Tensor]:
    """The tensors of one half by their names in it; they are the model's own, not copies.

    Raises:
        RefusedError: a tensor belongs to no known place.
    """
    halves = halves_of(model.config)  # type: ignore[arg-type]
    prefix = backbone_prefix(model)
    found, unknown = {}, []
    for name, tensor in model.state_dict().items():
        place = _place(name, prefix, halves, cut)
        if place is None:
            unknown.append(name)
        elif (("front" if head == "party" else "back") if place[0] == "head" else place[0]) == part:
            found[place[1]] = tensor
    if unknown:
        raise RefusedError("this model holds tensors that belong to neither half", problems=unknown[:20])
    return found


def front_hash(model: nn.Module, cut: int) -> str:
    """The sha256, in hex, of embeddings and first `cut` blocks, every value of them as float32; of a model, or of a front.

    An emulator whose front has the model's hash carries the model's front: what is tuned on it may be plugged in.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors_of(model, "front", cut, "owner").items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().data)
    return digest.hexdigest()


def fill(half: Half, tensors: Mapping[str, Tensor]) -> None:
    """Give a half its tensors, without copies; names and shapes have been checked or come from the model itself."""
    half.model.load_state_dict(dict(tensors), strict=True, assign=True)
    if half.part == "front" and half.tied and half.has_head:
        output, tokens = half.model.get_output_embeddings(), half.model.get_input_embeddings()
        if isinstance(output, nn.Linear) and isinstance(tokens, nn.Embedding):
            output.weight = tokens.weight
    half.model.requires_grad_(False).eval()


def part_config(whole: PreTrainedConfig, cut: int, part: Part) -> PreTrainedConfig:
    """The configuration of one half: fewer blocks, and their entries of what is listed by block."""
    kept = slice(0, cut) if part == "front" else slice(cut, None)
    blocks = range(int(whole.num_hidden_layers))[kept]
    values = whole.to_dict()
    values[whole.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(blocks)
    for name in PER_BLOCK:
        if isinstance(values.get(name), list):
            values[name] = values[name][kept]
    return type(whole).from_dict(values)


def _check(model: PreTrainedModel, task: str, cut: int) -> None:
    if task not in TASKS:
        raise SettingsError("a model can be cut in two for these tasks only", got=task, legal=TASKS)
    halves_of(model.config)
    _check_place(model.config, cut)
    attention.check_supported(model)


def _check_place(config: PreTrainedConfig, cut: int) -> None:
    blocks = int(config.num_hidden_layers)
    if not 1 <= cut < blocks:
        raise SettingsError("the cut must leave at least one block on each side", got=cut, legal=f"1 to {blocks - 1}")


def _is_tied(model: PreTrainedModel) -> bool:
    output, tokens = model.get_output_embeddings(), model.get_input_embeddings()
    return output is not None and getattr(output, "weight", None) is tokens.weight


def _place(name: str, prefix: str, halves: Halves, cut: int) -> tuple[Literal["front", "back", "head"], str] | None:
    """(where a tensor of the whole model belongs, its name there)."""
    own = name.removeprefix(prefix)
    if not name.startswith(prefix) or own.startswith("pooler."):
        return "head", name
    if own.startswith(f"{halves.blocks}."):
        index, _, rest = own.removeprefix(f"{halves.blocks}.").partition(".")
        front = int(index) < cut
        return ("front", name) if front else ("back", f"{prefix}{halves.blocks}.{int(index) - cut}.{rest}")
    if any(own.startswith(f"{path}.") for path in halves.before):
        return "front", name
    if halves.norm is not None and own.startswith(f"{halves.norm}."):
        return "back", name
    return None


def _built(cls: type[PreTrainedModel], whole: PreTrainedConfig, cut: int, part: Part, head: Holder) -> PreTrainedModel:
    """A half without values: fewer blocks, and stand-ins where it has nothing."""
    with init_empty_weights(include_buffers=False), quiet_transformers():
        model = cls(part_config(whole, cut, part))
    backbone = model.base_model
    halves = halves_of(whole)
    if part == "front":
        if halves.norm is not None:
            _put(backbone, halves.norm, nn.Identity())
    else:
        for path, kind in halves.before.items():
            _put(backbone, path, _stand_in(path, kind))
    if (part == "front") == (head == "owner"):
        for name, module in list(model.named_children()):
            if module is not backbone and _holds_tensors(module):
                setattr(model, name, Absent(name))
        if "pooler" in dict(backbone.named_children()):
            setattr(backbone, "pooler", None)  # noqa: B010  # a plain assignment is no attribute that mypy knows
    return model


def _stand_in(path: str, kind: Before) -> nn.Module:
    """What a back has in the place of something that ran in the front."""
    return {"tokens": Absent(path), "positions": NoPositions(), "dropout": nn.Identity(), "all": Given()}[kind]


def _holds_tensors(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(root.get_submodule(parent) if parent else root, leaf, module)


@torch.no_grad()
def _try(model: PreTrainedModel, front: Half, back: Half) -> None:
    """Run whole and halves on two short rows; refuse unless every bit is the same.

    Raises:
        RefusedError: they differ: this model does something at its ends, or by block number, that the table does not know.
    """
    vocabulary = int(model.config.vocab_size)
    ids = (torch.arange(2 * PROBE) * 7919 % vocabulary).view(2, PROBE).to(model.device)
    mask = torch.ones_like(ids)
    mask[1, PROBE - 2:] = 0
    modes = _modes([model, front.model, back.model])
    try:
        for each in (model, front.model, back.model):
            each.eval()
        inputs = {"input_ids": ids, "attention_mask": mask}
        whole = run_front(model, inputs, front.is_decoder)
        hidden = run_front(front.model, inputs, front.is_decoder)
        lengths = (PROBE, PROBE - 2)
        again = run_back(back.model, hidden[mask.bool()], lengths, (0, 0), "masked", back.is_decoder)
    finally:
        for module, mode in modes:
            module.training = mode
    if not torch.equal(again[mask.bool()], whole[mask.bool()]):
        raise RefusedError("front and back of this model do not give what the whole one gives", got=model.config.model_type,
                           hint="Its configuration uses something that depends on the number of a block.")


def _modes(models: Iterable[nn.Module]) -> list[tuple[nn.Module, bool]]:
    return [(module, module.training) for model in models for module in model.modules()]
