"""The tuned model: wrappers around layers, routing between named deltas, prompts and prefixes, merging."""

from deltaloom.tuned.attached import Attached
from deltaloom.tuned.model import Tuned, attach, restore
from deltaloom.tuned.saved import SavedDelta, SavedMethod, stacked
from deltaloom.tuned.settled import settle

__all__ = ["Attached", "SavedDelta", "SavedMethod", "Tuned", "attach", "restore", "settle", "stacked"]
