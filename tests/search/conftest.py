from tests.jobs.small import command, models

__all__ = ["command", "models"]
