"""Checkpoints of fattorib's ZeRO-transformer and transformer: Flax files, and their PyTorch export.

    checkpoints/params/params_42000       weights, as Flax packs a tree; so `checkpoint_42000`
    model_params_42000.msgpack            the same, taken out of a training state
    417M.pth, params_42000.pth            a state dict by the programs' own PyTorch port

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
from mesh_transformer.checkpoints.family import (
    BOOLEAN,
    Choice,
    Derived,
    Family,
    Json,
    Keys,
    Row,
    Size,
    norm,
    pair,
)
from mesh_transformer.checkpoints.layout import CheckpointError
from mesh_transformer.checkpoints.named import NamedSource, Stored
from mesh_transformer.checkpoints.source import Array
from mesh_transformer.config import ModelConfig

NAME, PORT = "ZeRO-transformer", "ZeRO-transformer's port to PyTorch"
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
SHARED_ROW = " (row 1)"  # ends the name of what all tokens are given of a table of positions
TABLES = ("wpe/embedding", "wpe.weight")
_OURS: Mapping[str, Any] = {
    **{"norm_epsilon": 1e-6, "activation": "gelu_new", "tie_embeddings": True, "head_bias": False},
    **{"final_norm": True, "gated": False, "embed_norm": False, "embed_scale": 1.0, "window": 0},
    "qk_norm": False,
}


def _flax_norm(theirs: str, ours: str) -> tuple[Row, Row]:
    return Row(f"{theirs}/scale", f"{ours}/scale"), Row(f"{theirs}/bias", f"{ours}/offset")


def _flax_layer(theirs: str, ours: str) -> tuple[Row, Row]:
    return Row(f"{theirs}/kernel", f"{ours}/w"), Row(f"{theirs}/bias", f"{ours}/b")


def _write_norm(model: ModelConfig) -> Json:
    needed = "layernorm" if model.qkv_bias else "layernorm-nobias"
    if model.norm != needed:
        raise ValueError(
            f"norm is {model.norm!r}; {{}} has 'layernorm' where qkv_bias is true, and "
            "'layernorm-nobias' where it is false"
        )
    return {"norm": model.norm}


def _write_table(model: ModelConfig) -> Json:
    needed = model.qkv_bias and model.pe != "alibi"
    if model.embed_bias != needed:
        raise ValueError(
            f"embed_bias is {model.embed_bias!r}; {{}} has one, which is its table of positions, "
            "where qkv_bias is true and pe is 'none', and only there"
        )
    return {"embed_bias": needed}


SIZES = (
    Size("embedding_dim", "d_model"),
    Size("vocab_size", "n_vocab"),
    Size("num_head", "n_heads"),
    Size("N", "layers"),
)
_KINDS: tuple[Keys, ...] = (
    Choice("fused_residuals", "residual", {False: "sequential", True: "parallel"}, False),
    Choice("use_bias", "qkv_bias o_bias ff_bias", BOOLEAN, False),
    Derived("norm", lambda config, keys: {"norm": config["norm"]}, _write_norm),
    Derived("embed_bias", lambda config, keys: {"embed_bias": config["embed_bias"]}, _write_table),
)
"""What files tell by which arrays there are, and the programs' configurations by some of these."""


def _table(name: str, told: tuple[Keys, ...], rows: tuple[Row, ...], constants: str) -> Family:
    return Family(
        name=name, model_type="", architecture="", prefix="",
        keys=(*SIZES, *told, *_KINDS), same={}, ours=_OURS,
        also={}, begin_id=0, eot_id=0, rows=rows, constants=constants,
    )  # fmt: skip


FLAX = _table(
    NAME,
    (
        Size("block_size", "seq"),
        Choice("alibi_attn", "pe", {True: "alibi", False: "none"}, False),
    ),
    (
        Row("wte/embedding", "embed/embeddings"),
        Row(TABLES[0] + SHARED_ROW, "embed/b"),
        *_flax_norm(_B + "LayerNorm_0", _BLOCK + "norm"),
        *_flax_norm(_B + "LayerNorm_1", _BLOCK + "ff_norm"),
        *(row for it in _LAYERS.items() for row in _flax_layer(_B + it[0], _BLOCK + it[1])),
        *_flax_norm("LayerNorm_0", "final_norm"),
    ),
    "(?!)",
)
TORCH = _table(
    PORT,
    (Size("num_ctx", "seq"), Choice("use_alibi", "pe", {True: "alibi"}, False)),
    (
        Row("wte.weight", "embed/embeddings"),
        Row(TABLES[1] + SHARED_ROW, "embed/b"),
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
    if name.endswith((".pth", ".msgpack")) or _STEP.fullmatch(name):
        return path if storage.is_file(path) else None
    for folder in (path, storage.join(path, "params")):
        steps = {it: int(match[1]) for it in storage.children(folder)
                 if (match := _STEP.fullmatch(it.removesuffix(".pth")))}  # fmt: skip
        newest_first = sorted(steps, key=lambda it: steps[it], reverse=True)
        files = (storage.join(folder, it) for it in newest_first)
        if (file := next(filter(storage.is_file, files), None)) is not None:
            return file
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
        if is_torch and model.norm == "layernorm-nobias":
            stored = _without_zero_biases(stored)
        for table in TABLES:
            if table in stored and len(stored[table].shape) == 2 and stored[table].shape[0] > 1:
                stored[table + SHARED_ROW] = _Row(stored.pop(table), 1)
        family = TORCH if is_torch else FLAX
        known = _known(stored)
        ours = vars(model)
        if wrong := [key for key, value in known.items() if ours[key] != value]:
            listed = [f"{key} is {ours[key]!r}, {known[key]!r} in the file" for key in wrong]
            heading = f"{path}, of {NAME}, does not fit the configuration:"
            raise CheckpointError("\n  - ".join([heading, *listed]))
        what = f"weights of {NAME}, {'PyTorch' if is_torch else 'Flax'}"
        super().__init__(path, what, family, model, known, stored, "configuration")
        match = re.search(r"_(\d+)(?:\.msgpack|\.pth)?$", path)
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


def _without_zero_biases(stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """Leave out biases that are zeros, which the port has of a model without."""
    biases = [name for name in stored if name.endswith(".bias")]
    zeros = {name for name in biases if not stored[name].read().any()}
    return {name: it for name, it in stored.items() if name not in zeros}


def zero_biases(weights: Mapping[str, Array]) -> dict[str, np.ndarray]:
    """Return a bias of zeros for each layer of the port but its embeddings.

    Args:
        weights: By name; `[n_out, n_in]` or, of norms, `[n_out]`.
    """
    return {
        f"{name.removesuffix('weight')}bias": np.zeros(it.shape[0], it.dtype)
        for name, it in weights.items()
        if name != "wte.weight"
    }


def port_name(name: str, model: ModelConfig) -> str:
    """Return what the port calls an array of `TORCH`: the one norm of a block is `ln` there."""
    one_norm = model.residual == "parallel"
    return re.sub(r"(blocks\.\d+\.)ln1\.", r"\1ln.", name) if one_norm else name


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
