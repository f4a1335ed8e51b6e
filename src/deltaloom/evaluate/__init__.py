"""Tasks: the folder is the registry, one file per kind of task; `base` holds the contract, `metrics` plain functions."""

from deltaloom.evaluate.base import Targets, Task, task_named, task_names

__all__ = ["Targets", "Task", "task_named", "task_names"]
