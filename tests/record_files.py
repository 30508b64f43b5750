"""Small TFRecord files of numbered sequences, and readers of them."""

from __future__ import annotations

import io
import zlib
from pathlib import Path

import numpy as np
from original_data import FOLDER

from mesh_transformer.data import framing
from mesh_transformer.data.batches import TokenBatches, ValidationBatches

SEQ = 4
LD = str(FOLDER / "ld.index")
LD_ARGS = {"seq": 8, "n_vocab": 50400}


def numbered(n: int, begin: int = 0, seq: int = SEQ) -> np.ndarray:
    """Sequences whose first token is their number."""
    return np.arange(begin, begin + n)[:, None] + np.arange(seq + 1) * 100


def write(path: Path, sequences: np.ndarray, compress: bool = False) -> Path:
    buffer = io.BytesIO()
    framing.write(buffer, sequences)
    data = buffer.getvalue()
    path.write_bytes(zlib.compress(data) if compress else data)
    return path


def make_set(folder: Path, sizes: list[int]) -> str:
    """Write files of numbered sequences, every third one compressed, and their index."""
    begin, names = 0, []
    for number, size in enumerate(sizes):
        name = f"part{number}{'_zstd' if number % 3 == 2 else ''}.tfrecords"
        write(folder / name, numbered(size, begin), compress=number % 3 == 2)
        names.append(name)
        begin += size
    (folder / "set.index").write_text("# parts\n\n" + "\n".join(names) + "\n")
    return str(folder / "set.index")


def batches(index: str, shape: tuple[int, ...], **more: object) -> TokenBatches:
    return TokenBatches(index, shape=shape, **({"seq": SEQ, "n_vocab": 9999} | more))  # type: ignore[arg-type]


def validation(index: str | Path, batch: int, **more: object) -> ValidationBatches:
    return ValidationBatches(
        str(index),
        batch=batch,
        **({"seq": SEQ, "n_vocab": 9999} | more),  # type: ignore[arg-type]
    )


def first_tokens(array: np.ndarray) -> list[int]:
    return array[..., 0].ravel().tolist()
