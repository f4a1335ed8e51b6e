"""Healing: a short delta tuning of the compressed model on text that the user gives, folded into its weights afterwards.

    W <- W + delta(W), trained on the task's own loss; by default low-rank deltas of all linear layers

Repairs what pruning, dropping and decomposition broke, at a small part of what training anew would cost (LLM-Pruner,
arXiv 2305.11627, heals in the same way). Rows that have nothing to do with how the model is used heal it for something else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, field_validator

from deltaloom.compress._factors import opened_factors
from deltaloom.compress._learning import free_layers, learn, methods_of, narrowed, over_defaults
from deltaloom.compress.base import Compressor, Facts, Work
from deltaloom.deltas.base import Method
from deltaloom.deltas.lora import LoRA
from deltaloom.train.feed import MICRO_TOKENS
from deltaloom.train.settings import TrainSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRAIN = TrainSettings(epochs=1, learning_rate=5e-4)


class Heal(Compressor):
    """Tune deltas on the compressed model and fold them in."""

    name: ClassVar[str] = "heal"
    calibrates: ClassVar[bool] = True

    deltas: tuple[dict[str, Any], ...] = ()
    """Records of methods as in a run file, of those that can be folded in; default: low-rank deltas of rank 8 on all linears.
    Of a factored layer NAME the factors are the layers NAME.right and NAME.left."""
    train: TrainSettings = Field(TRAIN, description="as the `train` section of a run file, over defaults of its own")
    layers: tuple[int, ...] | None = None
    """Only these blocks are trained."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Of initial values and of the order of rows."""

    @field_validator("train", mode="before")
    @classmethod
    def _over_defaults(cls, value: Any) -> Any:
        return over_defaults(value, TRAIN)

    @field_validator("deltas")
    @classmethod
    def _known_methods(cls, value: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        methods_of(value, cls.name)
        return value

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
