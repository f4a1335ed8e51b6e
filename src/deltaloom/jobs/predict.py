"""Predictions for files of rows, one JSON line each."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deltaloom.data.read import read_rows
from deltaloom.errors import RefusedError
from deltaloom.events import finite
from deltaloom.files import write_atomic
from deltaloom.generate import generate
from deltaloom.jobs.opening import open_source


def predict(source: str, data: Sequence[Path], output: Path, *, deltas: Sequence[Path] = (),
            weights: str | None = None, task: str | None = None, max_new_tokens: int = 128, overwrite: bool = False,
            overrides: Sequence[str] = (), say: Callable[[str], None] = print) -> dict[str, Any]:
    """Write a line for each row: where it came from, and the label, value, tags or text that the model gives.

    Raises:
        RefusedError: the output file exists. DataError: rows that cannot be used.
    """
    if output.is_dir():
        raise RefusedError("the output is a folder, not a file", got=str(output), hint="Name the file to write.")
    if output.exists() and not overwrite:
        raise RefusedError("the output file exists", got=str(output), hint="Pass --overwrite, or choose another name.")
    opened = open_source(source, deltas=deltas, weights=weights, task=task, overrides=overrides)
    bound = opened.task
    found = read_rows([str(path) for path in data], bound.settings, Path.cwd(), accepts=bound.formats, numbers=bound.numbers,
                      need_targets=False)
    say(f"Data: {len(found)} rows; {found.detected}")
    if bound.generates:
        opened.model.eval()
        texts = generate(opened.model, bound.tokenizer, bound.prompts(found.rows), max_new_tokens=max_new_tokens)  # type: ignore[arg-type]
        answers: list[dict[str, Any]] = [{"text": text} for text in texts]
    else:
        answers = bound.predict_all(opened.model, bound.encode(found.rows))
    lines = [json.dumps(finite({"row": index, "where": row.where, **answer}), ensure_ascii=False)
             for index, (row, answer) in enumerate(zip(found.rows, answers, strict=True))]
    write_atomic(output, "".join(line + "\n" for line in lines))
    say(f"Wrote {len(lines)} predictions to {output}")
    return {"rows": len(lines), "path": str(output)}
