"""Data that the original program wrote, and the stub tokenizer that it was run with."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent / "data" / "tfrecords"
SETS: dict[str, dict[str, Any]] = json.loads((FOLDER / "meta.json").read_text())


class StubTokenizer:
    """Three times each byte of UTF-8, plus one; the end of text as in GPT-2."""

    name = "stub"
    n_tokens = 50257
    eot_id = 50256
    eot_text = "<|endoftext|>"
    bos_id = None
    fingerprint = "0" * 64

    def encode(self, text: str) -> list[int]:
        return [3 * byte + 1 for byte in text.encode()]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i // 3 for i in ids if i != self.eot_id).decode(errors="replace")

    def token_bytes(self) -> None:
        return None


@functools.cache
def expected(name: str) -> np.ndarray:
    """Return the sequences of a data set of the original."""
    with np.load(FOLDER / "expected.npz") as arrays:
        return arrays[name].astype(np.int64)
