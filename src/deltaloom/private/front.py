"""The party's model: a tuned front with the back behind it, called as a whole model is.

    model = FrontModel(tuned, front, remote, labels="home")
    train(tuned, Learner(task, model), feed, ..., ahead=channel.window, before_step=remote.begin)
    task.predict_all(model, examples)          # or jobs.scoring.score(task, model, ...)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import SequenceClassifierOutput

from deltaloom.attention import Segments
from deltaloom.data.batches import Batch, learned_places
from deltaloom.errors import RefusedError
from deltaloom.evaluate._classes import class_loss
from deltaloom.evaluate.base import Task
from deltaloom.evaluate.causal_lm import PlaceLosses
from deltaloom.kernels.cross_entropy import token_losses
from deltaloom.private.account import text_name
from deltaloom.private.cut import Half
from deltaloom.private.messages import Layout, Output
from deltaloom.private.remote import Packing, RemoteBack
from deltaloom.private.replay import class_logits, packed, row_mask, run_front, unpacked
from deltaloom.tuned import Tuned

Labels = Literal["owner", "home"]


class FrontModel(PlaceLosses):
    """A tuned front and the remote back as one model, for tasks and evaluation.

    `labels`: "owner" sends labels, and losses come back; "home" asks for outputs at the label positions, and they stay.

    Raises:
        RefusedError: a soft prompt at the front, or labels for an owner without a head.
    """

    def __init__(self, tuned: Tuned, front: Half, remote: RemoteBack, labels: Labels = "owner") -> None:
        super().__init__()
        if tuned.prompts:
            raise RefusedError("a soft prompt in front of the embeddings is not sent over a cut",
                               hint="Use a prefix: keys and values of the front's own blocks.")
        if labels == "owner" and front.has_head:
            raise RefusedError("the head is at the party, so that the owner can compute no loss", got="labels: owner",
                               legal="labels: home")
        self.tuned = tuned
        self.front = front
        self.remote = remote
        self.labels = labels

    @property
    def config(self) -> Any:
        """The front's configuration."""
        return self.front.model.config

    @property
    def output(self) -> Output:
        """What the back gives: the last hidden state if the head is here, else logits."""
        return "hidden" if self.front.has_head else "logits"

    def at_cut(self, inputs: dict[str, Any], lengths: Tensor | None = None) -> tuple[Tensor, Packing]:
        """(hidden states at the cut (tokens, d_model), how they lie); rows are right-padded or packed."""
        packing = packing_of(inputs, lengths)
        if self.remote.guards:
            packing = replace(packing, texts=_names(inputs["input_ids"], packing))
        hidden = run_front(self.front.model, inputs, self.front.is_decoder)
        return packed(hidden, packing.layout, packing.lengths), packing

    def forward(self, **inputs: Any) -> SequenceClassifierOutput:
        """The logits (rows, classes) of a classifier; differentiable, waits for the owner."""
        if self.front.task == "causal-lm":
            raise RefusedError("a split language model gives no logits of every place", hint="Use `place_losses` or decoding.")
        hidden, packing = self.at_cut(inputs)
        places = self.class_places(inputs, packing)
        outputs = self.remote(hidden, packing, places, self.output)
        return SequenceClassifierOutput(logits=self.class_outputs(outputs, packing, places))

    def class_places(self, inputs: dict[str, Any], packing: Packing) -> Tensor:
        """The place of each row that the classifier reads, in the packed rows, (rows,); as transformers chooses it."""
        starts = torch.tensor([0, *packing.lengths]).cumsum(0)[:-1]
        if not self.front.is_decoder:
            return starts
        ids, pad = inputs["input_ids"], self.config.get_text_config().pad_token_id
        if pad is None:
            return starts + ids.shape[1] - 1
        return starts + (torch.arange(ids.shape[1]) * (ids.cpu() != pad)).argmax(-1)

    def class_outputs(self, outputs: Tensor, packing: Packing, places: Tensor) -> Tensor:
        """Logits (rows, classes) of the back's outputs (rows, d_model or classes); the head runs here if it is here."""
        if not self.front.has_head:
            return outputs
        flat = outputs.new_zeros(sum(packing.lengths), outputs.shape[-1]).index_copy(0, places.to(outputs.device), outputs)
        starts = torch.tensor([0, *packing.lengths]).cumsum(0)[:-1]
        return class_logits(self.front.model, unpacked(flat, row_mask(packing.lengths, flat.device)),
                            (places - starts).to(flat.device))

    def place_losses(self, batch: Batch, places: Tensor, wanted: Tensor) -> Tensor:
        """Losses (n,) at flat places of the batch's (rows, time); for evaluation, without gradients."""
        hidden, packing = self.at_cut(batch.inputs, batch.lengths)
        inside = places_inside(places, packing)
        with torch.no_grad():
            if self.labels == "owner":
                return self.remote.scores(hidden, packing, inside, wanted)
            return self.token_losses(self.remote(hidden, packing, inside, self.output), wanted)

    def token_losses(self, outputs: Tensor, wanted: Tensor) -> Tensor:
        """Losses (n,) of the back's outputs at label positions, (n, d_model) or (n, vocabulary)."""
        if not self.front.has_head:
            return F.cross_entropy(outputs.float(), wanted, reduction="none")
        head = self.front.model.get_output_embeddings()
        if type(head) is not nn.Linear:  # one with deltas, or a subclass
            return F.cross_entropy(head(outputs).float(), wanted, reduction="none")
        return token_losses(outputs, head.weight, head.bias, wanted)


class Learner:
    """What the training loop asks for its losses: a task whose model's back is remote.

    The losses are promises (see `RemoteBack.promise`): their values are there after their backward passes.
    """

    def __init__(self, task: Task, model: FrontModel) -> None:
        self.task = task
        self.model = model

    def loss(self, tuned: Tuned, batch: Batch) -> tuple[Tensor, Tensor | float]:
        """(the promised sum, what to divide it by), as `task.loss` gives them for a whole model."""
        if tuned is not self.model.tuned:
            raise RefusedError("the loop trains another model than the one in front of the back")
        if batch.labels is None:
            raise RefusedError("these rows have no target to learn from")
        hidden, packing = self.model.at_cut(batch.inputs, batch.lengths)
        if self.model.front.task == "causal-lm":
            return self._language(hidden, packing, batch, batch.labels)
        return self._classes(hidden, packing, batch, batch.labels)

    def _language(self, hidden: Tensor, packing: Packing, batch: Batch, labels: Tensor) -> tuple[Tensor, float]:
        places = learned_places(labels) if batch.places is None else batch.places
        wanted, inside = wanted_labels(batch, labels), places_inside(places, packing)
        model, remote = self.model, self.model.remote
        if model.labels == "owner":
            return remote.loss(hidden, packing, inside, wanted), len(places)
        loss = remote.promise(hidden, packing, inside, model.output, lambda out: model.token_losses(out, wanted).sum())
        return loss, len(places)

    def _classes(self, hidden: Tensor, packing: Packing, batch: Batch, labels: Tensor) -> tuple[Tensor, Tensor | float]:
        places, weights = self.model.class_places(batch.inputs, packing), self.task.targets.weights
        count: Tensor | float = len(labels) if weights is None else torch.tensor(weights, device=labels.device)[labels].sum()
        model, remote = self.model, self.model.remote
        if model.labels == "owner":
            return remote.loss(hidden, packing, places, labels, weights), count
        return remote.promise(hidden, packing, places, model.output, lambda out: class_loss(
            model.class_outputs(out, packing, places), labels, weights)[0]), count


def wanted_labels(batch: Batch, labels: Tensor) -> Tensor:
    """What a batch's outputs at label positions are to be, (n,), in the order in which their gradients are sent: the next tokens
    of a language model, the classes of a classifier."""
    if labels.ndim == 1:
        return labels
    return labels.flatten()[(learned_places(labels) if batch.places is None else batch.places) + 1]


def packing_of(inputs: dict[str, Any], lengths: Tensor | None = None) -> Packing:
    """How the rows of a model's inputs lie.

    Raises:
        RefusedError: padding on the left, or inside a row.
    """
    segments = inputs.get("segments")
    if isinstance(segments, Segments):
        return Packing(segments.lengths, "packed")
    mask, ids = inputs.get("attention_mask"), inputs["input_ids"]
    layout: Layout = "padded"
    if isinstance(mask, Tensor):
        lengths, layout = mask.sum(1), "masked"
        if not torch.equal(mask.bool().cpu(), row_mask(lengths.tolist(), torch.device("cpu"))):
            raise RefusedError("rows that are sent over a cut are padded on the right only, to the longest of them",
                               got="an attention mask with zeros elsewhere")
    return Packing(tuple(lengths.tolist()) if lengths is not None else (ids.shape[1],) * len(ids), layout)


def _names(ids: Tensor, packing: Packing) -> tuple[str, ...]:
    """Names of the texts in a model's inputs."""
    flat = packed(ids.cpu()[..., None], packing.layout, packing.lengths)[:, 0]
    return tuple(text_name(part.tolist()) for part in flat.split(packing.lengths))


def places_inside(places: Tensor, packing: Packing) -> Tensor:
    """Flat places of (rows, longest) as places of the rows without padding."""
    if packing.layout == "packed":
        return places
    real = row_mask(packing.lengths, places.device).flatten()
    return real.long().cumsum(0)[places] - 1
