"""Healing: a short delta tuning of the compressed model on text that the user gives, folded into its weights afterwards.

    W <- W + delta(W), trained on the task's own loss; by default low-rank deltas of all linear layers

Repairs what pruning, dropping and decomposition broke, at a small part of what training anew would cost (LLM-Pruner,
arXiv 2305.11627, heals in the same way). Rows that have nothing to do with how the model is used heal it for something else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from deltaloom.compress._factors import opened_factors
from deltaloom.compress._learning import TrainingStep, free_layers, learn, methods_of, narrowed
from deltaloom.compress.base import Facts, Work
from deltaloom.deltas.base import Method
from deltaloom.deltas.lora import LoRA
from deltaloom.train.feed import MICRO_TOKENS
from deltaloom.train.settings import TrainSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Heal(TrainingStep):
    """Tune deltas on the compressed model and fold them in; by default low-rank ones of rank 8 on all linears."""

    name: ClassVar[str] = "heal"

    train: TrainSettings = TrainSettings(epochs=1, learning_rate=5e-4)
    """As the `train` section of a run file; by default one epoch at a learning rate of 5e-4."""

    def sketch(self, model: PreTrainedModel) -> None:
        """Nothing changes its shape.

        Raises:
            TargetError: a method finds nothing to train.
        """
        with opened_factors(model):
            for method in narrowed(self._methods(), self.layers):
                method.sites(model)

    def apply(self, work: Work) -> Facts:
        """Train and fold in."""
        methods = narrowed(narrowed(self._methods(), self.layers), free_layers(work))
        return learn(work, methods, work.task, self.train, micro_tokens=MICRO_TOKENS, seed=self.seed)

    def _methods(self) -> list[Method]:
        return methods_of(self.deltas, self.name) or [LoRA(rank=8, alpha=16)]
