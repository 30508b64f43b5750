"""The file `metrics.jsonl` of a run: a JSON object for each optimizer step, and each validation.

    {"step": 7, "train/loss": ..., "train/last_loss": ..., "train/grad_norm": ...,
     "train/micro_grad_norm": ..., "train/learning_rate": ...,
     "sequences_processed": ..., "tokens_processed": ...,
     "noise/G_noise": ..., "noise/S_noise": ..., "noise/G_noise_avg": ..., "noise/S_noise_avg": ...,
     "noise/B_simple": ..., "noise/B_simple_tokens": ...,
     "train/step_seconds": ..., "train/tokens_per_sec": ..., "train/mfu": ...,
     "pod/hosts": ..., "pod/restarts": ..., "pod/goodput": ...}
    {"step": 7, "val/loss_pile": ..., "val/accuracy_pile": ..., "val/bits_per_byte_pile": ...}

Losses are in nats per token. `noise_scale` explains the noise scale, which is in sequences where
it does not say tokens, and `throughput` MFU. What begins with pod/ is there if a driver has hosts,
and counts from its start. null is a value that is not known. NaN and the infinities, which JSON
lacks, are the strings "NaN", "Infinity" and "-Infinity". Numbers are written in full: what is read
has the bits of what was written.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from typing import Any

from mesh_transformer import storage
from mesh_transformer.errors import UserError

NAME = "metrics.jsonl"
TIMING = (
    *("train/step_seconds", "train/tokens_per_sec", "train/mfu"),
    *("pod/hosts", "pod/restarts", "pod/goodput"),
)
"""The fields that differ between a run and its repetition; all others are equal to the bit."""

Line = dict[str, Any]


def read(path: str) -> list[Line]:
    """Read a metrics file; a last line that a kill has cut off is left out.

    Args:
        path: The file, or the folder of its run; local or remote.

    Raises:
        FileNotFoundError: There is no such file.
        UserError: A line before the last is not a line of metrics.
    """
    if not path.endswith(".jsonl"):
        path = storage.join(path, NAME)
    texts = storage.read_bytes(path).decode("utf-8", errors="replace").splitlines()
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
            int(line["step"])
            lines.append({key: _number(value) for key, value in line.items()})
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            if number < len(texts):
                raise UserError(
                    f"{path}: line {number} is not a line of metrics: {text!r}; take it out, or "
                    "move the file away to begin another"
                ) from error
    return lines


def drop_after(path: str, step: int) -> list[Line]:
    """Take the lines of later steps out of a metrics file, as those steps will be taken again.

    Args:
        path: The file; if there is none, there are no lines.
        step: The step that a run goes on from; 0 drops every line.

    Returns:
        The lines that are left.
    """
    try:
        lines = read(path)
    except FileNotFoundError:
        return []
    kept = [line for line in lines if step > 0 and line["step"] <= step]
    text = "".join(map(_json, kept))
    if text.encode() != storage.read_bytes(path):
        storage.write_text_atomically(path, text)
    return kept


def validated(path: str, step: int) -> set[str]:
    """Name the validation sets that have a line of a step in a metrics file, if there is one."""
    try:
        lines = read(path)
    except FileNotFoundError:
        return set()
    keys = {key for line in lines if line["step"] == step for key in line}
    return {key.removeprefix("val/loss_") for key in keys if key.startswith("val/loss_")}


class MetricsFile:
    """A metrics file open for more lines; a killed process loses none that `write` returned from.

    Args:
        path: Where it is. A remote file, as object stores cannot append, is continued in a local
            one and put in its bucket at each `flush`.
    """

    def __init__(self, path: str) -> None:
        self._path = self._local_path = path
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        if storage.is_remote(path):
            self._scratch = tempfile.TemporaryDirectory(prefix="mesh-transformer-")
            self._local_path = storage.join(self._scratch.name, NAME)
            if storage.exists(path):
                storage.write_bytes_atomically(self._local_path, storage.read_bytes(path))
        self._file = storage.open(self._local_path, "a")

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line."""
        self._file.write(_json(line))
        self._file.flush()

    def flush(self) -> None:
        """Make every line so far durable: on the disk or in the bucket."""
        os.fsync(self._file.fileno())
        if self._scratch is not None:
            storage.write_bytes_atomically(self._path, storage.read_bytes(self._local_path))

    def close(self) -> None:
        """Flush and close the file; a second call does nothing."""
        if self._file.closed:
            return
        self.flush()
        self._file.close()
        if self._scratch is not None:
            self._scratch.cleanup()


def _json(line: Mapping[str, Any]) -> str:
    return json.dumps({key: _text(value) for key, value in line.items()}, allow_nan=False) + "\n"


def _text(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _number(value: Any) -> Any:
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value
