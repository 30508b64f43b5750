"""Checkpoints of fattorib's ZeRO-transformer and transformer: Flax files, and their PyTorch export.

    checkpoints/params/params_42000       weights, as Flax packs a tree; so `checkpoint_42000`
    model_params_42000.msgpack            the same, taken out of a training state
    417M.pth                              a state dict by the programs' own PyTorch port

They hold no configuration. The models are GPT-2's with ALiBi or without any positions, with a tied
head; the newer program's without biases and with scales alone in its norms. Trained is what Flax
computes: GELU by its approximation and 1e-6 in the norms, where the ports to PyTorch have the exact
one and 1e-5. The older program's table of positions gives all tokens its row 1, which is the bias
of an embedding.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from mesh_transformer import storage
from mesh_transformer.checkpoints import flax_files, pytorch
from mesh_transformer.checkpoints.family import Family, Row, norm, pair
from mesh_transformer.checkpoints.layout import CheckpointError
from mesh_transformer.checkpoints.named import NamedSource, Stored
from mesh_transformer.checkpoints.source import Array
from mesh_transformer.config import ModelConfig

_NAME = "ZeRO-transformer"
_STEP = re.compile(r"(?:params|checkpoint)_(\d+)")
_BLOCK = "layers/block/"
_B, _P = "TransformerBlock_{}/", "blocks.{}."
_LAYERS = {
    "CausalAttention_0/query_proj": "attention/q",
    "CausalAttention_0/key_proj": "attention/k",
    "CausalAttention_0/value_proj": "attention/v",
    "CausalAttention_0/residual_out": "attention/o",
    "MLPBlock_0/fc_in": "ff/in",
    "MLPBlock_0/fc_residual": "ff/out",
}
_TORCH_LAYERS = {
    **{f"attn.{word}": f"attention/{word[0]}" for word in ("query", "key", "value")},
    **{"attn.fc_resid": "attention/o", "mlp.fc1": "ff/in", "mlp.fc_resid": "ff/out"},
}
_SHARED_ROW = " (row 1)"  # ends the name of what all tokens are given of a table of positions
_TABLES = ("wpe/embedding", "wpe.weight")
_OURS: Mapping[str, Any] = {
    **{"norm_epsilon": 1e-6, "activation": "gelu_new", "tie_embeddings": True, "head_bias": False},
    **{"final_norm": True, "gated": False, "embed_norm": False, "embed_scale": 1.0, "window": 0},
    "qk_norm": False,
}


def _flax_norm(theirs: str, ours: str) -> tuple[Row, Row]:
    return Row(f"{theirs}/scale", f"{ours}/scale"), Row(f"{theirs}/bias", f"{ours}/offset")


def _flax_layer(theirs: str, ours: str) -> tuple[Row, Row]:
    return Row(f"{theirs}/kernel", f"{ours}/w"), Row(f"{theirs}/bias", f"{ours}/b")


def _table(rows: tuple[Row, ...], constants: str) -> Family:
    return Family(
        name=_NAME, model_type="", architecture="", prefix="", keys=(), same={}, ours=_OURS,
        also={}, begin_id=0, eot_id=0, rows=rows, constants=constants,
    )  # fmt: skip


FLAX = _table(
    (
        Row("wte/embedding", "embed/embeddings"),
        Row(_TABLES[0] + _SHARED_ROW, "embed/b"),
        *_flax_norm(_B + "LayerNorm_0", _BLOCK + "norm"),
        *_flax_norm(_B + "LayerNorm_1", _BLOCK + "ff_norm"),
        *(row for it in _LAYERS.items() for row in _flax_layer(_B + it[0], _BLOCK + it[1])),
        *_flax_norm("LayerNorm_0", "final_norm"),
    ),
    "(?!)",
)
TORCH = _table(
    (
        Row("wte.weight", "embed/embeddings"),
        Row(_TABLES[1] + _SHARED_ROW, "embed/b"),
        *norm(_P + "ln1", _BLOCK + "norm"),
        *norm(_P + "ln2", _BLOCK + "ff_norm"),
        *(row for it in _TORCH_LAYERS.items() for row in pair(_P + it[0], _BLOCK + it[1])),
        *norm("norm", "final_norm"),
    ),
    r"lm_head\.weight|blocks\.\d+\.attn\.(mask|slopes)",
)


class _Row(NamedTuple):
    """One row of a stored table."""

    table: Stored
    at: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.table.shape[1:]

    @property
    def array(self) -> Array:
        return self.table.array._replace(shape=self.shape)

    def read(self) -> np.ndarray:
        return np.ascontiguousarray(self.table.read()[self.at])


def find(path: str) -> str | None:
    """Name the file that a path means: the newest of a folder's; None if it is none of these."""
    name = path.rpartition("/")[2]
    if name.endswith(".pth") or _STEP.fullmatch(name):
        return path if storage.exists(path) and not storage.children(path) else None
    if name.endswith(".msgpack"):
        return path if storage.exists(path) else None
    for folder in (path, storage.join(path, "params")):
        steps = {match[0]: int(match[1]) for it in storage.children(folder)
                 if (match := _STEP.fullmatch(it))}  # fmt: skip
        if steps:
            return storage.join(folder, max(steps, key=lambda it: steps[it]))
    return None


class ZeroTransformer(NamedSource):
    """A file of weights, checked against a model.

    Raises:
        CheckpointError: It is damaged, or of another model; every difference is listed, with the
            keys of the configuration that would make up for it.
    """

    def __init__(self, path: str, model: ModelConfig) -> None:
        is_torch = path.endswith(".pth")
        stored = _torch(path) if is_torch else _flax(path)
        for table in _TABLES:
            if table in stored and len(stored[table].shape) == 2 and stored[table].shape[0] > 1:
                stored[table + _SHARED_ROW] = _Row(stored.pop(table), 1)
        family = TORCH if is_torch else FLAX
        known = _known(stored)
        ours = vars(model)
        if wrong := [key for key, value in known.items() if ours[key] != value]:
            listed = [f"{key} is {ours[key]!r}, {known[key]!r} in the file" for key in wrong]
            heading = f"{path}, of {_NAME}, does not fit the configuration:"
            raise CheckpointError("\n  - ".join([heading, *listed]))
        what = f"weights of {_NAME}, {'PyTorch' if is_torch else 'Flax'}"
        super().__init__(path, what, family, model, known, stored, "configuration")
        match = re.search(r"_(\d+)(?:\.msgpack)?$", path)
        self.step = int(match[1]) if match else 0


def _flax(path: str) -> dict[str, Stored]:
    """List weights by the names below "params", leaving out what else a training state has."""
    listed = flax_files.read_tree(path)
    if any(name.startswith("params/") for name in listed):
        listed = {name: it for name, it in listed.items() if name.startswith("params/")}
    return {re.sub("^(params/)+", "", name): it for name, it in listed.items()}


def _torch(path: str) -> dict[str, Stored]:
    """List weights; where a block has one norm, its port calls it `ln`."""
    return {
        re.sub(r"(blocks\.\d+\.)ln\.", r"\1ln1.", name): it
        for name, it in pytorch.read_header(path).items()
    }


def _known(stored: Mapping[str, Stored]) -> dict[str, Any]:
    """Say what names and shapes tell of the model; its heads and positions they do not."""
    names = [name.replace(".", "/") for name in stored]
    layers = {
        m[1] for name in names if (m := re.match(r"(?:TransformerBlock_|blocks/)(\d+)", name))
    }
    known = {**_OURS, "layers": len(layers)}
    table = next((stored[it].shape for it in ("wte/embedding", "wte.weight") if it in stored), ())
    if len(table) == 2:
        known |= {"n_vocab": table[0], "d_model": table[1]}

    def has(pattern: str) -> bool:
        return any(re.search(pattern, name) for name in names)

    known["residual"] = "sequential" if has("/(LayerNorm_1|ln2)/") else "parallel"
    known["norm"] = "layernorm" if has("(LayerNorm_0|ln1|^norm)/bias") else "layernorm-nobias"
    known["qkv_bias"] = has("/query(_proj)?/bias")
    known["o_bias"] = has("attn/fc_resid/bias|/residual_out/bias")
    known["ff_bias"] = has("/(fc_in|fc1)/bias")
    known["embed_bias"] = has("^wpe/")
    return known
