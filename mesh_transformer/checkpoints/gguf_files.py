"""GGUF files (llama.cpp's), read one array at a time by the package gguf, which need not be there.

A file has a model's sizes, its tokenizer and its weights, mostly quantised: these are read as the
float32 numbers that they stand for. llama.cpp computes LLaMA's rotary positions from neighbouring
features, and files have them in that order; the other architectures have them in halves.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from mesh_transformer import storage
from mesh_transformer.checkpoints.families import keys_by
from mesh_transformer.checkpoints.family import (
    BOOLEAN,
    Choice,
    Family,
    Keys,
    Number,
    Row,
    Size,
    norm,
    pair,
)
from mesh_transformer.checkpoints.family_keys import ROOT_SCALE, rotary
from mesh_transformer.checkpoints.layout import CheckpointError
from mesh_transformer.checkpoints.named import NamedSource
from mesh_transformer.checkpoints.npz import BFLOAT16
from mesh_transformer.checkpoints.source import Array
from mesh_transformer.config import ModelConfig
from mesh_transformer.model.positions import rotary_frequencies

_MAGIC = b"GGUF"
_B, _BLOCK = "blk.{}.", "layers/block/"
_SCALING = {"factor": "factor", "original_context_length": "original_max_position_embeddings"}
_LLAMA3: Mapping[str, float] = {
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 8192,
}
"""How all published LLaMA 3.1 to 3.3 are stretched, whose files say only what comes of it."""


def _rows(*, fused: bool = False, pairs: bool = False) -> tuple[Row, ...]:
    """Return the rows of an architecture.

    Args:
        fused: Whether queries, keys and values are one array.
        pairs: Whether features that are turned together are neighbours.
    """
    turned = tuple(
        row._replace(pairs=pairs)
        for name in "qk"
        for row in pair(f"{_B}attn_{name}", f"{_BLOCK}attention/{name}")
    )
    several = (*turned, *pair(_B + "attn_v", _BLOCK + "attention/v"))
    return (
        Row("token_embd.weight", "embed/embeddings"),
        *norm("token_embd_norm", "embed/norm"),
        Row("position_embd.weight", "positions/embeddings"),
        *norm(_B + "attn_norm", _BLOCK + "norm"),
        *(pair(_B + "attn_qkv", _BLOCK + "attention/[qkv]") if fused else several),
        Row(_B + "attn_q_norm.weight", _BLOCK + "attention/q_norm/scale"),
        Row(_B + "attn_k_norm.weight", _BLOCK + "attention/k_norm/scale"),
        *pair(_B + "attn_output", _BLOCK + "attention/o"),
        *norm(_B + "ffn_norm", _BLOCK + "ff_norm"),
        *pair(_B + "ffn_gate", _BLOCK + "ff/gate"),
        *pair(_B + "ffn_up", _BLOCK + "ff/in"),
        *pair(_B + "ffn_down", _BLOCK + "ff/out"),
        *norm("output_norm", "final_norm"),
        Row("output.weight", "unembed/w", transposed=True),
    )


_SIZES = (
    Size("vocab_size", "n_vocab"),
    Size("context_length", "seq"),
    Size("embedding_length", "d_model"),
    Size("block_count", "layers"),
    Size("feed_forward_length", "d_ff"),
    Size("attention.head_count", "n_heads"),
    Size("attention.head_count_kv", "n_kv_heads", nullable=True),
    Size("attention.key_length", "d_head", nullable=True),
    Choice("qkv_bias", "qkv_bias", BOOLEAN, False),
    Choice("o_bias", "o_bias", BOOLEAN, False),
    Choice("ff_bias", "ff_bias", BOOLEAN, False),
    Choice("tied", "tie_embeddings", BOOLEAN, False),
)
_EPSILON = Number("attention.layer_norm_epsilon", "norm_epsilon", 1e-5)
_RMS_EPSILON = Number("attention.layer_norm_rms_epsilon", "norm_epsilon", 1e-5)
_SAME: Mapping[str, Any] = {
    **dict.fromkeys(("expert_count", "attention.sliding_window"), 0),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "logit_scale")),
    **dict.fromkeys(("attention.scale", "attention.clamp_kqv", "residual_scale")),
    **dict.fromkeys(("embedding_scale", "rope.scaling.attn_factor", "embedding_length_out")),
    "attention.causal": True,
}
_OURS = {"embed_bias": False, "head_bias": False, "residual": "sequential"}
_LLAMA = {
    **{**_OURS, "norm": "rmsnorm-mean", "pe": "rotary-half", "gated": True},
    "activation": "silu",
}
_GPT = {**_OURS, "norm": "layernorm"}


def _family(name: str, rows: tuple[Row, ...], ours: Mapping[str, Any], *keys: Keys) -> Family:
    return Family(
        name=f"{name} in GGUF", model_type="", architecture="", prefix="", keys=(*_SIZES, *keys),
        same=_SAME, ours=ours, also={}, begin_id=0, eot_id=0, rows=rows,
        constants=r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd",
    )  # fmt: skip


_NEOX_KEYS: tuple[Keys, ...] = (
    rotary(),
    _EPSILON,
    Size("rope.dimension_count", "pe_rotary_dims"),
    Choice(
        "use_parallel_residual", "residual", {True: "parallel-untied", False: "sequential"}, True
    ),
)
ARCHITECTURES = {
    "llama": _family("LLaMA", _rows(pairs=True), _LLAMA, rotary(), _RMS_EPSILON),
    "qwen2": _family("Qwen2", _rows(), _LLAMA, rotary(), _RMS_EPSILON),
    "qwen3": _family("Qwen3", _rows(), {**_LLAMA, "qk_norm": True}, rotary(), _RMS_EPSILON),
    # Its scales have the 1 that is added to them already.
    "gemma": _family(
        "Gemma", _rows(), {**_LLAMA, "activation": "gelu_new"}, rotary(), _RMS_EPSILON, ROOT_SCALE
    ),
    "gpt2": _family("GPT-2", _rows(fused=True), {**_GPT, "pe": "fixed"}, _EPSILON),
    "gptneox": _family(
        "GPT-NeoX",
        _rows(fused=True),
        {**_GPT, "pe": "rotary-half", "activation": "gelu"},
        *_NEOX_KEYS,
    ),
    "bloom": _family(
        "BLOOM", _rows(fused=True), {**_GPT, "pe": "alibi", "embed_norm": True}, _EPSILON
    ),
}
"""By the name that files have for it."""


class Quantised(NamedTuple):
    """An array in a file.

    Attributes:
        path: Of the file.
        tensor: The package's own; mapped, not read.
    """

    path: str
    tensor: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(n) for n in self.tensor.shape[::-1])

    @property
    def kind(self) -> str:
        return str(self.tensor.tensor_type.name)

    @property
    def array(self) -> Array:
        """What reading it gives.

        Raises:
            CheckpointError: The package cannot dequantise it.
        """
        plain = {"F16": np.dtype(np.float16), "BF16": BFLOAT16, "F32": np.dtype(np.float32)}
        if self.kind not in plain and not _can_dequantise(self.tensor.tensor_type):
            raise CheckpointError(
                f"{self.tensor.name} in {self.path} is {self.kind}, which the package gguf does "
                "not dequantise; take a file of another quantisation (Q8_0, Q4_K, F16 ...)"
            )
        return Array(self.shape, plain.get(self.kind, np.dtype(np.float32)))

    def read(self) -> np.ndarray:
        """Copy it into memory, dequantised."""
        array = self.array
        data = self.tensor.data
        if self.kind == "BF16":
            return np.array(data).view(BFLOAT16).reshape(array.shape)
        if self.kind in ("F16", "F32"):
            return np.array(data).reshape(array.shape)
        numbers: np.ndarray = _gguf(self.path).dequantize(data, self.tensor.tensor_type)
        return numbers.reshape(array.shape)


@functools.cache
def _can_dequantise(kind: Any) -> bool:
    """Say whether the package knows how, by a block of zeros."""
    package = _gguf("")
    try:
        package.dequantize(np.zeros((1, package.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def find(path: str) -> str | None:
    """Name the file that a path means: itself, or a folder's only one; None if there is none.

    Raises:
        CheckpointError: A folder has several.
    """
    named = [name for name in storage.children(path) if name.endswith(".gguf")]
    inside = [name for name in named if storage.is_file(storage.join(path, name))]
    if len(inside) > 1:
        raise CheckpointError(f"{path} holds {', '.join(inside)}: name the one to read")
    if inside:
        return storage.join(path, inside[0])
    if not storage.is_file(path):
        return None
    begin = bytearray(len(_MAGIC))
    n_read = storage.read_into(path, 0, memoryview(begin))
    return path if path.endswith(".gguf") or begin[:n_read] == _MAGIC else None


class Gguf(NamedSource):
    """A GGUF file, checked against its own metadata.

    Raises:
        CheckpointError: It is damaged, of a model that ours does not compute, or its arrays are not
            those that it says; or the package gguf is not there.
    """

    def __init__(self, path: str) -> None:
        if storage.is_remote(path):
            raise CheckpointError(
                f"{path}: GGUF files are read from a local disk only; copy it to one"
            )
        reader = _opened(path)
        stored = {tensor.name: Quantised(path, tensor) for tensor in reader.tensors}
        about = _metadata(reader)
        if about.get("split.count", 1) != 1:
            raise CheckpointError(
                f"{path} is one of {about['split.count']} files of a model: make them one first, "
                "with llama-gguf-split --merge"
            )
        architecture = str(about.get("general.architecture"))
        family = ARCHITECTURES.get(architecture)
        if family is None:
            raise CheckpointError(
                f"{path} is of the architecture {architecture!r}; of GGUF files are read "
                f"{', '.join(ARCHITECTURES)}"
            )
        start = f"{architecture}."
        own = {name.removeprefix(start): it for name, it in about.items() if name.startswith(start)}
        known = keys_by(family, _described(path, own, stored), path)
        kinds = " and ".join(sorted({it.kind for it in stored.values()}))
        model = ModelConfig(**known)
        turned = own.get("rope.dimension_count", model.pe_rotary_dims)
        if model.pe_rotary_dims not in (0, turned):
            raise CheckpointError(
                f"{path} turns {turned} features of each head; {family.name} is computed with all "
                f"{model.pe_rotary_dims} here"
            )
        super().__init__(path, f"{family.name}, {kinds}", family, model, known, stored, "metadata")


def _metadata(reader: Any) -> dict[str, Any]:
    """Return what a file says of its model; float32 numbers as they would be written in JSON."""
    about: dict[str, Any] = {}
    for name, field in reader.fields.items():
        if not name.startswith("tokenizer."):
            value = field.contents()
            is_single = [kind.name for kind in field.types] == ["FLOAT32"]
            about[name] = float(str(np.float32(value))) if is_single else value
    return about


def _described(
    path: str, about: Mapping[str, Any], stored: Mapping[str, Quantised]
) -> dict[str, Any]:
    """Add to a file's metadata what its arrays' names and shapes say."""
    table = stored["token_embd.weight"].shape if "token_embd.weight" in stored else ()
    base: Any = about.get("rope.freq_base", 10_000.0)
    more: dict[str, Any] = {
        "qkv_bias": "blk.0.attn_q.bias" in stored or "blk.0.attn_qkv.bias" in stored,
        "o_bias": "blk.0.attn_output.bias" in stored,
        "ff_bias": "blk.0.ffn_up.bias" in stored,
        "tied": "output.weight" not in stored,
        "max_position_embeddings": about.get("context_length"),
        **({"vocab_size": table[0]} if len(table) == 2 else {}),
        "rope_theta": base,
    }
    kind = about.get("rope.scaling.type", "none")
    if kind != "none":
        scaling = {
            theirs: about[f"rope.scaling.{name}"]
            for name, theirs in _SCALING.items()
            if f"rope.scaling.{name}" in about
        }
        more["rope_scaling"] = {"rope_type": kind, **scaling}
    if "rope_freqs.weight" in stored:
        factors_R = stored["rope_freqs.weight"].read()
        more["rope_scaling"] = _llama3(path, factors_R, float(base))
    return {**about, **more}


def _llama3(path: str, factors_R: np.ndarray, theta: float) -> dict[str, Any]:
    """Say how frequencies are stretched that are divided by these factors.

    Raises:
        CheckpointError: Otherwise than LLaMA 3.1 and its followers have it.
    """
    numbers = {**_LLAMA3, "factor": float(factors_R.max())}
    plain_R, _ = rotary_frequencies(2 * factors_R.size, theta, "none", {})
    stretched_R, _ = rotary_frequencies(2 * factors_R.size, theta, "llama3", numbers)
    if not np.allclose(plain_R / stretched_R, factors_R, rtol=1e-4):
        raise CheckpointError(
            f"{path}: rope_freqs.weight stretches rotary positions otherwise than LLaMA 3.1 does; "
            "take the model as a Hugging Face folder, whose config.json says how"
        )
    return {"rope_type": "llama3", **numbers}


def _opened(path: str) -> Any:
    package = _gguf(path)
    try:
        reader = package.GGUFReader(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except (ValueError, KeyError, IndexError, OverflowError, TypeError) as error:
        raise CheckpointError(f"{path} is cut off or damaged: {error}; copy it again") from error
    if reader.byte_order != "I":
        raise CheckpointError(f"{path} is of big-endian machines; take one of little-endian ones")
    return reader


def _gguf(path: str) -> Any:
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError(
            f'{path} needs the package gguf: pip install -e ".[gguf]" -c constraints.txt, or take '
            "the model as a Hugging Face folder"
        ) from error
    return gguf
