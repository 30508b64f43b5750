"""Archives that are damaged in any way: one error, which names the file."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from mesh_transformer.checkpoints import npz
from mesh_transformer.checkpoints.layout import CheckpointError

CONTENTS = [np.arange(5, dtype=np.float32), np.array(7), np.ones((2, 3), np.float16)]


@pytest.mark.thorough
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_whatever_is_damaged_is_told_by_name_or_of_no_matter(save: object, tmp_path: Path) -> None:
    path = tmp_path / "0.npz"
    save(path, *CONTENTS)  # type: ignore[operator]
    pristine, rng, n_told = path.read_bytes(), random.Random(0), 0
    for _ in range(3000):
        damaged = bytearray(pristine)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(damaged))
            damaged[at : at + rng.choice((1, 1, 2, 8))] = rng.randbytes(rng.choice((0, 1, 2, 8)))
            if not damaged:
                break
        path.write_bytes(damaged)
        try:
            for member in npz.members(str(path)):
                npz.describe(member)
                npz.check(member)
                npz.read(member)
        except CheckpointError as error:
            assert str(path) in str(error)
            n_told += 1
    assert n_told > 1500
