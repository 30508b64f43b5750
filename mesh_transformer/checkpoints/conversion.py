"""From any format to any other, array by array: what is written appears when it is whole."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple

import numpy as np

from mesh_transformer import network_rules, storage
from mesh_transformer.checkpoints import (
    families,
    huggingface,
    native_writer,
    original,
    original_run,
    original_writer,
    places,
    retention,
)
from mesh_transformer.checkpoints.fitting import (
    WithVocabulary,
    fitted,
    n_bytes,
    weights_dtype,
    without_offset,
)
from mesh_transformer.checkpoints.foreign import FOREIGN
from mesh_transformer.checkpoints.layout import CheckpointError
from mesh_transformer.checkpoints.npz import BFLOAT16
from mesh_transformer.checkpoints.places import GIGABYTE
from mesh_transformer.checkpoints.source import TABLE_BIAS, Source
from mesh_transformer.config import Config

Format = Literal[
    "native", "original", "slim", "hf", "jaxseq", "zero", "zero-torch", "cerebras"
]  # fmt: skip
_SHARDED = ("original", "slim")
DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": BFLOAT16}

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversion:
    """What to make of a checkpoint.

    Attributes:
        format: "native"; "original", with optimizer state if there is any; "slim", the same without
            it and in bfloat16; "hf"; or one of other programs' (`foreign`).
        n_shards: Of "original" and "slim".
        dtype: Of the weights: a key of `DTYPES`. None leaves them as they are, and makes float32
            ones bfloat16 in "slim".
        n_vocab: Rows of the vocabulary, padded or cut from what there are. None keeps them.
        file_gb: Gigabytes in each file of "hf", at most.
    """

    format: Format
    n_shards: int = 1
    dtype: str | None = None
    n_vocab: int | None = None
    file_gb: float = 5.0


class Plan(NamedTuple):
    """What a conversion will write.

    Attributes:
        dtype: Of the weights; None leaves each as it is.
        moments: Whether optimizer state is among it.
        n_bytes: How much, in all: of what is read, in the dtype in which it is written.
    """

    dtype: np.dtype[Any] | None
    moments: bool
    n_bytes: int


def plan(source: Source, what: Conversion) -> Plan:
    """Say what a conversion of a checkpoint will write."""
    dtype = DTYPES[what.dtype] if what.dtype else None
    if what.format == "slim" and dtype is None and weights_dtype(source) == np.float32:
        dtype = BFLOAT16
    foreign = FOREIGN.get(what.format)
    if what.format == "hf" or foreign is not None:
        dtype = dtype or weights_dtype(source)
    moments = what.format in ("native", "original") and source.counts is not None
    total = n_bytes(source, dtype, moments=moments)
    folds_bias = what.format == "hf" if foreign is None else foreign.folds_bias
    if folds_bias and (bias := source.arrays.get(TABLE_BIAS)):
        assert dtype is not None
        total -= bias._replace(dtype=dtype).n_bytes
    return Plan(dtype, moments, total)


def _unseen(n_bytes: int) -> AbstractContextManager[Callable[[int], object]]:
    return contextlib.nullcontext(lambda n: None)


def convert(
    source: Source,
    config: Config,
    output: str,
    what: Conversion,
    *,
    position: Mapping[str, Any],
    overwrite: bool = False,
    ids: Mapping[str, Any] | None = None,
    write_tokenizer: Callable[[str], None] = lambda folder: None,
    stage: Callable[[int], AbstractContextManager[Callable[[int], object]]] = _unseen,
) -> None:
    """Write a checkpoint in another format.

    What is known to be wrong beforehand is refused before anything is touched.

    Args:
        source: What to write.
        config: Of its model.
        output: Folder to write; for "native" a run's, in which training can go on.
        position: Where training would go on in its data, for "native"; no other format says.
        overwrite: Whether an existing folder is replaced, once the new one is whole.
        ids: The tokens that begin, end and pad texts, for "hf": see `families.config_json`.
        write_tokenizer: Adds a tokenizer's files to a Hugging Face folder.
        stage: Shows what is done: called with the bytes there are in all, it gives what is called
            with those of each array that is written.

    Raises:
        CheckpointError: The checkpoint does not fit the configuration or is damaged, the format
            cannot hold the model, or there is something at `output` or too little space.
    """
    source, config = _changed(source, config, what)
    _check(what, config, output, source)
    source, model = fitted(source, config.model), config.model
    dtype, moments, total = plan(source, what)
    if source.counts is not None and not moments:
        _logger.info("the optimizer state is left out: %s holds weights alone", what.format)
    with places.becoming(output, total, overwrite=overwrite) as folder, stage(total) as advance:
        if what.format == "native":
            step = storage.join(folder, "checkpoints", f"step_{source.step}")
            extra = {"config": config.to_flat(), "position": dict(position)}
            native_writer.write(
                step, source, extra=extra, dtype=dtype, moments=moments, advance=advance
            )
        elif what.format in FOREIGN:
            FOREIGN[what.format].write(folder, source, model, dtype=dtype, advance=advance)
        elif what.format == "hf":
            assert dtype is not None, "the plan says it"
            shown: Any = {"shard_bytes": int(what.file_gb * GIGABYTE), "advance": advance}
            huggingface.write(folder, source, model, dtype=dtype, ids=ids, **shown)
            write_tokenizer(folder)
        else:
            shared: Any = {"n_shards": what.n_shards, "dtype": dtype, "moments": moments}
            original_writer.write(folder, source, model, advance=advance, **shared)
    if what.format in _SHARDED:
        original_run.enlist(output, source.step)


def _changed(source: Source, config: Config, what: Conversion) -> tuple[Source, Config]:
    """Give a model the vocabulary that is asked for, and positions that the format has room for.

    OPT's table of positions begins with rows that are none, which the original's fork leaves out.
    """
    if what.n_vocab is not None:
        config = _with_vocabulary(config, what.n_vocab)
        source = WithVocabulary(source, what.n_vocab)
    if what.format in _SHARDED and config.model.pe_offset:
        source = without_offset(source, source.known.get("pe_offset", config.model.pe_offset))
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, pe_offset=0))
    return source, config


def _with_vocabulary(config: Config, n_vocab: int) -> Config:
    """Give a model another vocabulary, of tokens alone where none was said to be padding.

    Raises:
        ConfigError: Rows would be cut off that the configuration says are tokens (n_tokens).
    """
    model = config.model
    whole = model.n_tokens == model.n_vocab
    n_tokens = min(n_vocab, model.n_tokens) if whole else model.n_tokens
    model = dataclasses.replace(model, n_vocab=n_vocab, n_tokens=n_tokens)
    return dataclasses.replace(config, model=model)


def _check(what: Conversion, config: Config, output: str, source: Source) -> None:
    """Refuse what cannot be written, before anything is."""
    if not what.file_gb > 0:
        raise CheckpointError(f"files of {what.file_gb:g} GB are asked for; needed is more than 0")
    if what.format == "native":
        retention.check_kept(output)
    if what.format == "hf":
        families.described(config.model)
        _check_padding(what, config, "transformers")
    if (foreign := FOREIGN.get(what.format)) is not None:
        foreign.check(config.model)
        dtype = plan(source, what).dtype
        assert dtype is not None, "the plan says it"
        foreign.check_sizes(config.model, dtype)
        if not foreign.knows_padding:
            _check_padding(what, config, foreign.program)
    places.check_apart(output, source)
    _check_shards(what, config)


def _check_padding(what: Conversion, config: Config, program: str) -> None:
    """Refuse to give rows that pad a vocabulary a probability, unless they are asked for."""
    model = config.model
    if model.head_bias or model.n_tokens >= model.n_vocab:
        return
    rows = f"rows {model.n_tokens} to {model.n_vocab - 1} of the vocabulary are padding (n_tokens)"
    effect = f"which {program} cannot know: they have logit 0 there and so a probability"
    if what.n_vocab is None:
        raise CheckpointError(
            f"{rows}, {effect}; cut them off with --n-vocab {model.n_tokens}, or keep them with "
            f"--n-vocab {model.n_vocab}"
        )
    _logger.warning("%s, %s", rows, effect)


def _check_shards(what: Conversion, config: Config) -> None:
    model = config.model
    if what.format not in _SHARDED:
        return
    if what.n_shards < 1:
        raise CheckpointError(f"{what.n_shards} shards are asked for; needed is 1 or more")
    if not network_rules.unlike(network_rules.FUSED, vars(model)):
        raise CheckpointError(
            "mesh-transformer-jax's second model is read but not written: choose --format native"
        )
    original.check_held(model)
    held = {"n_heads": model.n_heads, "n_vocab": model.n_vocab, "d_ff": model.d_ff}
    if model.d_embed != model.d_model:
        held["d_embed"] = model.d_embed
    problems = [
        f"{what.n_shards} shards do not divide {key} {n}"
        for key, n in held.items()
        if n % what.n_shards
    ]
    if model.norm == "layernorm-desync" and what.n_shards > 1:
        problems.append("norm 'layernorm-desync' has no shards that compute what one does")
    if problems:
        raise CheckpointError("; ".join(problems))
