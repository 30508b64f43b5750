"""A run's folder of mesh-transformer-jax: which of its steps count, by its `meta.json`.

    {"step": 20, "checkpoints": [10, 20], "aux": {"10": {...}, "20": {...}}}

The original's commands load the last step of "checkpoints" and know of no others. "aux" says how
far a step had read its data.
"""

from __future__ import annotations

import json
import re
from typing import Any

from mesh_transformer import storage
from mesh_transformer.checkpoints.layout import CheckpointError

_META = "meta.json"
_STEP = re.compile(r"step_(\d+)")


def newest(folder: str) -> str | None:
    """Name the step folder that a run's folder means; None if it has none.

    Raises:
        CheckpointError: Its `meta.json` is damaged.
    """
    steps = [int(match[1]) for name in storage.children(folder) if (match := _STEP.fullmatch(name))]
    if (meta := _read(folder)) is not None:
        # The original deletes steps before it writes their list anew.
        steps = [step for step in steps if step in meta["checkpoints"]] or steps
    return storage.join(folder, f"step_{max(steps)}") if steps else None


def enlist(step_folder: str, step: int) -> None:
    """Name a step that was written in the `meta.json` beside it, so that the original loads it.

    Of a folder that is not named `step_N` nothing is said: it is no run's.

    Raises:
        CheckpointError: The `meta.json` that is there is damaged.
    """
    folder, _, name = step_folder.rstrip("/").rpartition("/")
    if name != f"step_{step}":
        return
    folder = folder or "."
    meta = _read(folder) or {"aux": {}}
    there = [n for n in meta.get("checkpoints", []) if storage.exists(f"{folder}/step_{n}")]
    meta["checkpoints"] = sorted({*there, step})
    meta["step"] = meta["checkpoints"][-1]
    meta["aux"] = {str(step): {}} | meta["aux"]
    storage.write_text_atomically(storage.join(folder, _META), json.dumps(meta))


def _read(folder: str) -> dict[str, Any] | None:
    path = storage.join(folder, _META)
    if not storage.exists(path):
        return None
    try:
        meta = json.loads(storage.read_text(path))
        steps = [int(n) for n in meta.get("checkpoints", [])]
        aux = dict(meta.get("aux", {}))
    except (ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    return meta | {"checkpoints": steps, "aux": aux}
