"""Checkpoints of Cerebras's model zoo (PyTorch, releases 1.6 to 1.9), read.

    checkpoint_250.mdl    a state dict, or one below "model"
    params.yaml           the run's parameters, of which "model" says what it is

Whether there are biases, and how branches are added, the arrays say; parameters may leave it out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import yaml

from mesh_transformer import storage
from mesh_transformer.checkpoints import pytorch
from mesh_transformer.checkpoints.cerebras_family import (
    AS_GPTJ,
    BIASES,
    FAMILY,
    LAYER,
    UNTIED,
    scaled,
    scales,
)
from mesh_transformer.checkpoints.families import keys_by
from mesh_transformer.checkpoints.family import Json
from mesh_transformer.checkpoints.layout import CheckpointError
from mesh_transformer.checkpoints.named import NamedSource, Stored
from mesh_transformer.checkpoints.source import Key
from mesh_transformer.config import ModelConfig

_STEP = re.compile(r"(?:checkpoint_)?(\d+)\.mdl")
_HDF5 = b"\x89HDF"


def find(path: str) -> str | None:
    """Name the file that a path means: itself, or a folder's newest; None if there is none."""
    if path.endswith(".mdl"):
        return path if storage.is_file(path) else None
    names = [name for name in storage.children(path) if name.endswith(".mdl")]
    newest_first = sorted(names, key=lambda name: (_step(name), name), reverse=True)
    files = (storage.join(path, name) for name in newest_first)
    return next(filter(storage.is_file, files), None)


class Cerebras(NamedSource):
    """A file of weights, checked against the parameters beside it.

    Raises:
        CheckpointError: It is damaged, of a model that ours does not compute, or its arrays are not
            those of its parameters; every difference is listed.
    """

    def __init__(self, path: str) -> None:
        if storage.is_remote(path):
            raise CheckpointError(f"{path}: .mdl files are read from a local disk only")
        begin = bytearray(len(_HDF5))
        storage.read_into(path, 0, memoryview(begin))
        if begin == _HDF5:
            raise CheckpointError(
                f"{path} is HDF5, as Cerebras's releases from 2.0 write; convert it to a Hugging "
                "Face folder with their own converter, and name that"
            )
        where, config = _parameters(path)
        stored: dict[str, Stored] = {
            _plain(name): it for name, it in pytorch.read_header(path, inside="model").items()
        }
        told = _by_names(config, stored)
        family = AS_GPTJ if told.get(UNTIED) is False else FAMILY
        told = {key: it for key, it in config.items() if key != UNTIED} | told
        known = keys_by(family, told, where)
        what = f"state of a {family.name}"
        super().__init__(path, what, family, ModelConfig(**known), known, stored, where)
        self.step = max(_step(path.rpartition("/")[2]), 0)
        self._scales = scales(ModelConfig(**known))

    def read(self, key: Key) -> np.ndarray:
        """Read one array, scaled if Cerebras scales it with another and we do not."""
        return scaled(super().read(key), self._scales.get(key.path, 1.0))


def _plain(name: str) -> str:
    """Take off what some releases put around names."""
    name = re.sub(r"^(model\.)+", "", name)
    return name.replace("position_embeddings.embed.weight", "position_embeddings.weight")


def _by_names(config: Json, stored: Mapping[str, Stored]) -> dict[str, Any]:
    """Say what is told by which arrays there are: how branches are added, and biases."""
    biases = {key: name.format(0) in stored for key, (_, name) in BIASES.items()}
    if f"{LAYER.format(0)}norm3.weight" not in stored:
        return {**biases, UNTIED: False}
    return {**biases, UNTIED: True} if config.get(UNTIED) else biases


def _parameters(path: str) -> tuple[str, dict[str, Any]]:
    """Read what the file beside a checkpoint says of its model."""
    folder = path.rpartition("/")[0] or "."
    files = [name for name in storage.children(folder) if name.endswith((".yaml", ".yml"))]
    name = "params.yaml" if "params.yaml" in files else files[0] if len(files) == 1 else None
    if name is None:
        found = f"there are {', '.join(files)}" if files else "there is no such file"
        raise CheckpointError(
            f"{path} says nothing of its model: put its run's parameters beside it as params.yaml; "
            f"{found}"
        )
    where = storage.join(folder, name)
    try:
        config = yaml.safe_load(storage.read_text(where))
        section = config.get("model") or config["trainer"]["init"]["model"]
        return where, dict(section)
    except (
        yaml.YAMLError,
        UnicodeDecodeError,
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
    ) as error:
        raise CheckpointError(
            f'{where} is damaged, or has no section "model" with a model\'s parameters ({error})'
        ) from error


def _step(name: str) -> int:
    match = _STEP.search(name)
    return int(match[1]) if match else -1
