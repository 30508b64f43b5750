"""Hugging Face folders, read and written one array at a time, without their library.

    config.json                         what the model is
    model.safetensors                   its weights; or, in several files,
    model.safetensors.index.json        which file holds which array, and
    model-00001-of-00003.safetensors    the files
    pytorch_model.bin, or in several    the same by PyTorch itself, which are read but not written

`families` has the names. Our embedding may have a bias, which no family has: where it has one it is
read as zeros, and is added to the embedding when written (`renaming`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mesh_transformer import storage
from mesh_transformer.checkpoints import pytorch, safetensors
from mesh_transformer.checkpoints.families import config_json, config_keys, family_of
from mesh_transformer.checkpoints.family import Family
from mesh_transformer.checkpoints.layout import CheckpointError
from mesh_transformer.checkpoints.named import NamedSource, Stored
from mesh_transformer.checkpoints.renaming import Renamed
from mesh_transformer.checkpoints.source import Array, Source, ahead
from mesh_transformer.config import ModelConfig

CONFIG, GENERATION = "config.json", "generation_config.json"
SHARD_BYTES = 5 * 10**9

_SAFETENSORS, _PYTORCH, _INDEX = "model.safetensors", "pytorch_model.bin", ".index.json"


def is_huggingface(folder: str) -> bool:
    """Say whether a folder is a model of Hugging Face's, whole or not, of whatever family."""
    config = storage.join(folder, CONFIG)
    return storage.exists(config) and b'"model_type"' in storage.read_bytes(config)


def end_ids(folder: str) -> tuple[int, ...]:
    """Return the tokens that end what a model writes, by its generation_config.json or config.json.

    Raises:
        CheckpointError: What stands there is no token id, and no list of them.
    """
    for path in (storage.join(folder, name) for name in (GENERATION, CONFIG)):
        said = read_json(path).get("eos_token_id") if storage.exists(path) else None
        if said is not None:
            ids = said if isinstance(said, list) else [said]
            if not all(type(it) is int and it >= 0 for it in ids):
                raise CheckpointError(
                    f"{path}: eos_token_id is {said!r}; needed is a token id, a list of ids or null"
                )
            return tuple(ids)
    return ()


class HuggingFace(NamedSource):
    """A Hugging Face folder, opened and checked against its own config.json.

    Raises:
        CheckpointError: It is of a model that ours does not compute, it is not whole, or its arrays
            are not those of its configuration; every difference is listed.
    """

    def __init__(self, folder: str) -> None:
        path = storage.join(folder, CONFIG)
        config = read_json(path)
        known = config_keys(config, path)
        family = family_of(config)
        assert family is not None, "config_keys has refused it"
        model = ModelConfig(**known)
        stored, files = _open_files(folder)
        what = f"{family.name} of transformers, {files}"
        full = _with_prefix(stored, family)
        super().__init__(folder, what, family, model, known, full, CONFIG)


def _with_prefix(stored: Mapping[str, Stored], family: Family) -> dict[str, Stored]:
    """Give arrays their full names: the models alone, without heads, are saved without a prefix."""
    if any(name.startswith(family.prefix) for name in stored):
        return dict(stored)
    bare = {row.theirs for row in family.rows if not row.theirs.startswith(family.prefix)}
    return {name if name in bare else family.prefix + name: it for name, it in stored.items()}


def _open_files(folder: str) -> tuple[dict[str, Stored], str]:
    """List the arrays in a folder's files, and say what files these are."""
    for whole, what, read_header in (
        (_SAFETENSORS, "safetensors", safetensors.read_header),
        (_PYTORCH, "PyTorch", pytorch.read_header),
    ):
        if storage.exists(storage.join(folder, whole)):
            return dict(read_header(storage.join(folder, whole))), f"1 {what} file"
        index = storage.join(folder, whole + _INDEX)
        if storage.exists(index):
            names = _files_of(index)
            inside = {name: read_header(storage.join(folder, name)) for name in names}
            stored: dict[str, Stored] = {}
            for arrays in inside.values():
                stored |= arrays
            return stored, f"{len(names)} {what} files"
    raise CheckpointError(
        f"{folder} holds no weights: needed is {_SAFETENSORS} or {_PYTORCH}, or {_SAFETENSORS}"
        f"{_INDEX} or {_PYTORCH}{_INDEX} and the files that it lists"
    )


def _files_of(index: str) -> list[str]:
    """List the files that an index names."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} is damaged: it has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    outside = [name for name in names if re.search(r"[/\\]", name) or name in ("", ".", "..")]
    if outside:
        raise CheckpointError(f"{index} names {outside[0]!r}, which is no file of its folder")
    return names


def write(
    folder: str,
    source: Source,
    model: ModelConfig,
    *,
    dtype: np.dtype[Any],
    shard_bytes: int = SHARD_BYTES,
    ids: Mapping[str, Any] | None = None,
    advance: Callable[[int], object] = lambda n: None,
) -> None:
    """Write a folder that `transformers` reads; config.json comes last.

    Args:
        folder: There already, and empty.
        source: Of the model's arrays.
        dtype: Of the weights.
        shard_bytes: Of one file, at most; an array that is larger has a file for itself.
        ids: As for `families.config_json`.
        advance: Called with the bytes of each array that is written.

    Raises:
        CheckpointError: `transformers` has no such model, the source is not of it, or a weight is
            too large for the dtype.
    """
    config = config_json(model, dtype, ids=ids)
    family = family_of(config)
    assert family is not None, "config_json names one of them"
    weights = Renamed(source, family, model, dtype, advance)
    files = _in_files(weights.arrays, shard_bytes)
    with ahead(weights.read, weights.arrays) as read:
        for name, inside in files.items():
            safetensors.write(storage.join(folder, name), inside, read)
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(array.n_bytes for array in weights.arrays.values())},
            "weight_map": {array: name for name, inside in files.items() for array in inside},
        }
        write_json(storage.join(folder, _SAFETENSORS + _INDEX), index)
    write_json(storage.join(folder, CONFIG), config)


def _in_files(arrays: Mapping[str, Array], shard_bytes: int) -> dict[str, dict[str, Array]]:
    """Deal arrays, in order, to files of at most so many bytes, if an array allows it."""
    parts: list[dict[str, Array]] = [{}]
    n_data = 0
    for name, array in arrays.items():
        more = {**parts[-1], name: array}
        n_data += array.n_bytes
        if parts[-1] and len(safetensors.header(more)) + n_data > shard_bytes:
            more, n_data = {name: array}, array.n_bytes
            parts.append(more)
        else:
            parts[-1] = more
    if len(parts) == 1:
        return {_SAFETENSORS: parts[0]}
    stem, suffix = _SAFETENSORS.split(".")
    return {f"{stem}-{i:05d}-of-{len(parts):05d}.{suffix}": part for i, part in enumerate(parts, 1)}


def read_json(path: str) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        CheckpointError: It is missing, or holds something else.
    """
    try:
        value = json.loads(storage.read_text(path))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged: it holds no JSON object")
    return value


def write_json(path: str, value: Mapping[str, Any]) -> None:
    """Write a file that holds a JSON object."""
    storage.write_text_atomically(path, json.dumps(value, indent=2) + "\n")
