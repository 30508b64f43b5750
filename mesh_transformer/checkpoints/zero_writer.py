"""Checkpoints of fattorib's ZeRO-transformer and transformer, written.

    params_42000          a training state without its optimizer's, as Flax packs it; or
    params_42000.pth      a state dict of the programs' ports to PyTorch
    model_config.yaml     what their `model_getter` is to make, by the name "converted"

`zero_transformer` has the names. Of a table of positions, of which the programs use one row for all
tokens, all rows are that one.

The port computes ALiBi alone. It is written for as it was while blocks had the names that they are
given: of two norms, `ln1` and `ln2`, it took `use_alibi`, false if left out; of one, `ln`, it does
not take that key. All its layers have biases, which are zeros in a model without, as the programs'
own export has them (torch_compatability of github.com/fattorib/ZeRO-transformer).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import yaml

from mesh_transformer import storage
from mesh_transformer.checkpoints import flax_writer, pytorch
from mesh_transformer.checkpoints.families import described
from mesh_transformer.checkpoints.family import Family
from mesh_transformer.checkpoints.renaming import Renamed
from mesh_transformer.checkpoints.source import Array, Source
from mesh_transformer.checkpoints.zero_transformer import (
    FLAX,
    NAME,
    PORT,
    SHARED_ROW,
    SIZES,
    TABLES,
    TORCH,
    port_name,
    zero_biases,
)
from mesh_transformer.config import ModelConfig
from mesh_transformer.model.positions import alibi_slopes

_INSIDE = "params/params/"  # of a training state


def check(model: ModelConfig) -> None:
    """Refuse a model that these programs do not compute.

    Raises:
        CheckpointError: Every reason is listed.
    """
    described(model, (FLAX,), NAME)


def check_torch(model: ModelConfig) -> None:
    """Refuse what `check` does and models without ALiBi, and to write PyTorch's files without it.

    Raises:
        CheckpointError: See there; or there is no PyTorch.
    """
    described(model, (TORCH,), PORT)
    pytorch.check("params_N.pth")


def write_flax(
    folder: str,
    source: Source,
    model: ModelConfig,
    *,
    dtype: np.dtype[Any],
    advance: Callable[[int], object],
) -> None:
    """Write a folder with a file of Flax's, as `foreign.Foreign.write` says."""
    _, keys = described(model, (FLAX,), NAME)
    weights = _Weights(source, FLAX, model, dtype, advance)
    params = {"params": flax_writer.nested(weights.arrays)}
    tree = {"step": source.step, "params": params, "opt_state": None}

    def read(name: str) -> np.ndarray:
        return weights.read(name.removeprefix(_INSIDE))

    path = storage.join(folder, f"params_{source.step}")
    flax_writer.write_tree(path, tree, read)
    told = ["block_size", "alibi_attn", *(["fused_residuals"] * keys["fused_residuals"])]
    _write_config(folder, {key: keys[key] for key in (*_size_keys(), *told)} | {"dropout": 0.0})


def write_torch(
    folder: str,
    source: Source,
    model: ModelConfig,
    *,
    dtype: np.dtype[Any],
    advance: Callable[[int], object],
) -> None:
    """Write a folder with a file of PyTorch's, with its masks and slopes, as `write_flax` does."""
    _, keys = described(model, (TORCH,), PORT)
    weights = _Weights(source, TORCH, model, dtype, advance)
    names = {port_name(it, model): it for it in weights.arrays}
    mask = np.tri(model.seq, dtype=np.uint8)[None, None]
    made = {"mask": mask, "slopes": alibi_slopes(model.n_heads)}
    first, *others = (f"blocks.{i}.attn." for i in range(model.layers))
    constants = {first + name: it for name, it in made.items()}
    arrays = {theirs: weights.arrays[name] for theirs, name in names.items()}
    if not model.qkv_bias:
        constants |= zero_biases(arrays)
    arrays |= {name: Array(it.shape, it.dtype) for name, it in constants.items()}
    copies = {block + name: first + name for block in others for name in made}

    def read(name: str) -> np.ndarray:
        return constants[name] if name in constants else weights.read(names[name])

    path = storage.join(folder, f"params_{source.step}.pth")
    pytorch.write(path, arrays, read, copies={"lm_head.weight": "wte.weight", **copies})
    told = ["num_ctx", *(["use_alibi"] * (model.residual == "sequential"))]
    _write_config(folder, {key: keys[key] for key in (*_size_keys(), *told)})


class _Weights(Renamed):
    """Weights by these programs' names, with all rows of a table of positions."""

    def __init__(
        self,
        source: Source,
        family: Family,
        model: ModelConfig,
        dtype: np.dtype[Any],
        advance: Callable[[int], object],
    ) -> None:
        super().__init__(source, family, model, dtype, advance)
        self.arrays = {
            name.removesuffix(SHARED_ROW): Array((model.seq, *it.shape), dtype)
            if name.endswith(SHARED_ROW)
            else it
            for name, it in self.arrays.items()
        }

    def read(self, name: str) -> np.ndarray:
        """Make one array."""
        made = super().read(name + SHARED_ROW if name in TABLES else name)
        return np.broadcast_to(made, self.arrays[name].shape)


def _size_keys() -> list[str]:
    return [row.theirs for row in SIZES]


def _write_config(folder: str, keys: dict[str, Any]) -> None:
    text = yaml.safe_dump({"converted": keys}, sort_keys=False)
    storage.write_text_atomically(storage.join(folder, "model_config.yaml"), text)
