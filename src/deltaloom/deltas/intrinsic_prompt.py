"""Intrinsic prompt: a prompt of a few numbers, in a subspace that was learned from the prompts of other tasks.

    model([P; embed(x)]),     P = mean + z directions,     z (length, k) trained, zero at first

Addition-based delta tuning. `mean` and `directions` are a decoder that `deltaloom subspace learn` finds in the trained prompts of
several tasks: their mean, and the directions in which their rows differ most, each as long as the rows' deviation along it. The
decoder is kept once for all tasks, in its own folder, and is frozen; a task's file holds length times k numbers. A decoder
belongs to one backbone, which is checked, and a delta to one decoder, whose sha256 is kept with it.
After Qin et al. 2021 (arXiv 2110.07867), who learn a nonlinear autoencoder of whole prompts from a hundred tasks. From the few
tasks that most people have it would remember and not generalise, and principal components of whole prompts would be fewer than
the tasks; rows that share their directions give enough of them from a handful of prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from deltaloom.deltas._decoder import Decoder, read_decoder, read_record
from deltaloom.deltas._tokens import check_reads_embeddings
from deltaloom.deltas.base import AttachContext, Attachment, InputDelta, Method
from deltaloom.errors import CheckpointError
from deltaloom.models.identity import fingerprint
from deltaloom.sites import Kind, Site


class DecodedPrompt(InputDelta):
    """The rows, made from z (length, k)."""

    changes_at_birth = "the model reads the mean of the learned prompts from the start"

    mean: Tensor
    directions: Tensor

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.coordinates = nn.Parameter(torch.zeros(decoder.record.length, decoder.record.directions))
        self.register_buffer("mean", decoder.mean, persistent=False)
        self.register_buffer("directions", decoder.directions, persistent=False)

    def rows(self) -> Tensor:
        """mean + z directions, (length, d_model)."""
        return self.mean + self.coordinates @ self.directions


class IntrinsicPrompt(Method):
    """A prompt in a learned subspace."""

    name: ClassVar[str] = "intrinsic-prompt"
    kinds: ClassVar[tuple[Kind, ...]] = ("input",)

    targets: str | tuple[str, ...] = "input"
    """The input embeddings; a model has one place for a prompt."""
    decoder: str
    """The folder of the decoder; in a run file its path starts at the run file."""
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    """Of the decoder's tensors; a run fills it in, and then no other decoder is taken."""

    def settled(self, base: Path) -> Self:
        """With the decoder's whole path and its sha256.

        Raises:
            CheckpointError: there is no decoder.
        """
        near = base / Path(self.decoder).expanduser()
        folder = near if near.exists() else Path(self.decoder).expanduser()
        found = read_record(folder).sha256
        return type(self)(**{**self.given(), "decoder": str(folder.resolve()), "sha256": self.sha256 or found})

    def attach(self, sites: Sequence[Site], context: AttachContext) -> Attachment:
        """The one prompt.

        Raises:
            CheckpointError: the decoder is missing, damaged, another one than the delta was trained with, or of another backbone.
            RefusedError: a classifier that reads the last token cannot find it behind a prompt.
        """
        check_reads_embeddings(context.model)
        decoder = read_decoder(Path(self.decoder).expanduser())
        if self.sha256 not in (None, decoder.record.sha256):
            raise CheckpointError("this is not the decoder that the delta belongs to", got=f"sha256 {decoder.record.sha256}",
                                  legal=f"sha256 {self.sha256}", hint=f"Put the right decoder to {self.decoder}.")
        own = fingerprint(context.model)
        if own != decoder.record.fingerprint:
            raise CheckpointError("the decoder was learned on another backbone", got=f"fingerprint {own} of this model",
                                  legal=f"fingerprint {decoder.record.fingerprint}", hint="Learn one from prompts of this model.")
        return Attachment({site: DecodedPrompt(decoder) for site in sites})
