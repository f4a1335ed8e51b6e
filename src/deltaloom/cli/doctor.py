"""`deltaloom doctor`: the machine and the versions."""

from __future__ import annotations

from deltaloom.cli.output import Json, Verbose, give, say


def doctor(as_json: Json = False, verbose: Verbose = False) -> None:
    """Show versions, processor, memory, disk, precision and caches, and what would not work.

    Example: `deltaloom doctor`
    """
    from deltaloom.jobs.doctor import examine

    facts, problems = examine()
    for key, value in facts.items():
        say(f"{key:16} {value}")
    for problem in problems:
        say(f"problem: {problem}")
    if not problems:
        say("No problem found.")
    give({"facts": facts, "problems": problems}, as_json)
