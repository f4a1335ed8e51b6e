"""Which components stay: importance from gradients, a budget over time, rules from scores to what is kept. Pure tensors."""

from deltaloom.allocation.importance import GATHERINGS, SENSITIVITIES, Importance
from deltaloom.allocation.rules import RULES, Scores, keep_within, relative_scores
from deltaloom.allocation.schedule import Schedule

__all__ = ["GATHERINGS", "RULES", "SENSITIVITIES", "Importance", "Schedule", "Scores", "keep_within", "relative_scores"]
