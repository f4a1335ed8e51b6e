"""The tuned model: wrappers around layers, routing between named deltas, prompts and prefixes, merging."""

from deltaloom.tuned.model import Attached, Tuned, attach

__all__ = ["Attached", "Tuned", "attach"]
