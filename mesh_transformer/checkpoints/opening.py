"""Which format a path is in, by its files and never by values, and the source that reads it.

A path may be a run's folder or a step folder of this library's or of mesh-transformer-jax's (full
or slim, of its first or its second model), or a Hugging Face folder; on a local disk, in gs:// or
in s3:// alike. It may also be a file or a folder of JAXSeq, of ZeRO-transformer or of Cerebras's
model zoo, or a GGUF file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from mesh_transformer import storage
from mesh_transformer.checkpoints import (
    cerebras,
    fused,
    gguf_files,
    huggingface,
    jaxseq,
    native_source,
    npz,
    original,
    original_run,
    pieces,
    reading,
    zero_transformer,
)
from mesh_transformer.checkpoints.layout import CheckpointError
from mesh_transformer.checkpoints.source import Source
from mesh_transformer.config import Config, ModelConfig, parse

Format = Literal[
    "native", "original", "fused", "huggingface", "jaxseq", "zero-transformer", "cerebras", "gguf"
]

UNFINISHED = "unfinished"
"""Ends the name of a folder that is being written; of a file in it, until all of it is there."""
REPLACED = "replaced"
"""Ends the name of an old folder while a new one takes its place."""

_BY_FILES: dict[Format, Callable[[str], str | None]] = {
    "gguf": gguf_files.find,
    "cerebras": cerebras.find,
    "zero-transformer": zero_transformer.find,
}
_FILES = (".gguf", ".msgpack", ".pth", ".mdl")
_TELLING: dict[Format, Callable[[str], Source]] = {
    "huggingface": huggingface.HuggingFace,
    "jaxseq": jaxseq.JaxSeq,
    "cerebras": cerebras.Cerebras,
    "gguf": gguf_files.Gguf,
}
"""Sources that hold the configuration of their model themselves."""
_NOT_TRAINED = {
    "per_replica_batch": 1, "warmup_steps": 0, "anneal_steps": 1, "total_steps": 1, "lr": 1e-5,
    "end_lr": 1e-5, "weight_decay": 0.0, "train_set": "none", "ckpt_every": 1, "keep_every": 1,
}  # fmt: skip
"""Keys that a configuration needs and that a checkpoint to be read says nothing of."""


class Found(NamedTuple):
    """A checkpoint, by its format and its own folder; or its file, where it is one."""

    format: Format
    folder: str


def find(path: str) -> Found:
    """Find the checkpoint that a path means: of a run, the newest.

    Raises:
        CheckpointError: There is none, or one that was never finished.
    """
    path = path.rstrip("/") or "/"
    if path.endswith(f".{UNFINISHED}") or storage.exists(storage.join(path, UNFINISHED)):
        raise CheckpointError(f"{path} was never finished; write it again")
    if path.endswith(f".{REPLACED}"):
        raise CheckpointError(
            f"{path} is what a conversion was replacing when it was stopped, perhaps in part: run "
            "it again, or name the folder otherwise if you know it to be whole"
        )
    if (folder := reading.locate(path)) is not None:
        return Found("native", folder)
    if (file := jaxseq.find(path)) is not None:
        return Found("jaxseq", file)
    if huggingface.is_huggingface(path):
        return Found("huggingface", path)
    for folder in (path, original_run.newest(path)):
        if folder and storage.exists(storage.join(folder, UNFINISHED)):
            raise CheckpointError(f"{folder} was never finished; write it again")
        if folder and original.is_original(folder):
            return Found("original", folder)
        if folder and fused.is_fused(folder):
            return Found("fused", folder)
    for format, named in _BY_FILES.items():
        if (file := named(path)) is not None:
            return Found(format, file)
    there = "holds no complete checkpoint" if storage.exists(path) else "does not exist"
    raise CheckpointError(
        f"{path} {there}; needed is the folder (model_dir) of a run that has saved one, a step "
        "folder in it, a step folder of mesh-transformer-jax (with shard_0 or params in it), a "
        "Hugging Face folder (with config.json and weights), or a file of another program's "
        f"({', '.join(_FILES)})"
    )


def open_source(
    found: Found, model: ModelConfig | None, original_cores: int | None = None
) -> Source:
    """Open a checkpoint.

    Args:
        found: As `find` gives it.
        model: What a checkpoint without a configuration of its own is of.
        original_cores: How it is arranged: see `CheckpointConfig`.

    Raises:
        CheckpointError: It is not whole, or of another model; or there is no configuration.
    """
    if found.format == "native":
        return native_source.NativeSource(found.folder)
    if (telling := _TELLING.get(found.format)) is not None:
        return telling(found.folder)
    is_zero = found.format == "zero-transformer"
    if model is None:
        program = "ZeRO-transformer" if is_zero else "mesh-transformer-jax"
        which = "a JSON file with the keys of its model" if is_zero else "the JSON file of the run"
        raise CheckpointError(
            f"{found.folder} is of {program}, whose checkpoints hold no configuration: "
            f"give --config, {which}{'' if is_zero else ' that wrote it'}"
        )
    if is_zero:
        return zero_transformer.ZeroTransformer(found.folder, model)
    if found.format == "fused":
        return fused.Fused(found.folder, model, original_cores)
    return original.Original(found.folder, model)


def verify(found: Found, source: Source, advance: Callable[[int], object]) -> None:
    """Read every array and compare its checksum; of a format that has none, its lengths.

    Args:
        advance: Called with the bytes of each array read.

    Raises:
        CheckpointError: Something is damaged; the message names its file.
    """
    if found.format == "native":
        pieces.verify(found.folder, advance)
        return
    for key, array in source.arrays.items():
        source.read(key)
        advance(array.n_bytes)
    if isinstance(source, original.Original):
        for member in source.unused:
            npz.read(member)


def stored_config(path: str) -> Config:
    """Return the configuration that the checkpoint at a path holds.

    Of another program's it describes the model and says that its tokenizer lies beside it, whether
    it does or not: no tokenizer can be told by how many ids it has. The rest is made up.

    Raises:
        CheckpointError: There is no complete checkpoint, or one that holds no configuration.
        ConfigError: It was saved by a release of the library whose configurations differ.
    """
    found = find(path)
    return config_of(found, open_source(found, None))


def config_of(found: Found, source: Source) -> Config:
    """Return the configuration that a checkpoint holds which is open, as `stored_config`.

    Raises:
        ConfigError: See there.
    """
    if found.format == "native":
        return parse(dict(source.known), source=found.folder)
    folder = folder_of(found.folder)
    about: dict[str, Any] = {"name": folder, "model_dir": folder, "tokenizer": folder}
    return parse({**_NOT_TRAINED, **about, **source.known}, source=found.folder)


def end_ids(path: str) -> tuple[int, ...]:
    """Return the tokens that the checkpoint at a path ends its texts with, where it says so itself.

    Raises:
        CheckpointError: There is no complete checkpoint, or what it says are no token ids.
    """
    found = find(path)
    return huggingface.end_ids(found.folder) if found.format == "huggingface" else ()


def folder_of(where: str) -> str:
    """Name the folder that a checkpoint is, or lies in where it is a file."""
    return where if storage.children(where) else where.rpartition("/")[0] or "."


def check_unused(root: str) -> None:
    """Refuse to begin a run in the folder of one of the original's, as if nothing were there.

    Raises:
        CheckpointError: Says how to go on from it.
    """
    folder = original_run.newest(root)
    if folder and (original.is_original(folder) or fused.is_fused(folder)):
        raise CheckpointError(
            f"{root} holds a run of mesh-transformer-jax ({folder}). To go on where it stopped, "
            f"convert it: python resharding_example.py --config FILE --input {folder} --output "
            "FOLDER --format native, and set model_dir to FOLDER; to tune it from step 0, set "
            f"another model_dir and give --tune-model-path {folder}"
        )
