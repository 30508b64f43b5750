"""Formats of other programs that weights are written in, by the names that --format has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from mesh_transformer.checkpoints import cerebras_writer, jaxseq, zero_writer
from mesh_transformer.checkpoints.zero_transformer import NAME, PORT
from mesh_transformer.config import ModelConfig


class Foreign(NamedTuple):
    """A format.

    Attributes:
        program: Whose it is, for messages.
        check: Refuses a model that it cannot hold, by an error that names each key.
        write: Writes a folder of it, which is there already, and empty: of a `Source` and the
            configuration of its model, which `check` lets pass, with weights in `dtype`. `advance`
            is called with the bytes of each array that is made. A `CheckpointError` says that the
            source is not of the model, or that a weight is too large for the dtype.
        check_sizes: Refuses weights that its files have no room for in a dtype.
        knows_padding: Whether it can say where the padding of a vocabulary begins.
        folds_bias: Whether a bias of the embedding goes into its table.
    """

    program: str
    check: Callable[[ModelConfig], None]
    write: Callable[..., None]
    check_sizes: Callable[[ModelConfig, np.dtype[Any]], None] = lambda model, dtype: None
    knows_padding: bool = False
    folds_bias: bool = True


FOREIGN = {
    "jaxseq": Foreign("JAXSeq", jaxseq.check, jaxseq.write, jaxseq.check_sizes, knows_padding=True),
    "zero": Foreign(NAME, zero_writer.check, zero_writer.write_flax, folds_bias=False),
    "zero-torch": Foreign(PORT, zero_writer.check_torch, zero_writer.write_torch, folds_bias=False),
    "cerebras": Foreign(cerebras_writer.PROGRAM, cerebras_writer.check, cerebras_writer.write),
}
