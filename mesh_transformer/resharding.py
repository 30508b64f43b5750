"""What `resharding_example.py` and its relatives do: convert a checkpoint, or check it."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Sequence
from typing import NamedTuple

from mesh_transformer import progress, storage
from mesh_transformer.checkpoints import opening, places
from mesh_transformer.checkpoints.averaging import Mean
from mesh_transformer.checkpoints.conversion import Conversion, convert
from mesh_transformer.checkpoints.deepening import WithLayers
from mesh_transformer.checkpoints.fitting import MADE_TO_FIT, check_function, n_bytes
from mesh_transformer.checkpoints.native_source import NativeSource
from mesh_transformer.checkpoints.source import Source
from mesh_transformer.config import Config
from mesh_transformer.data import tokenizer, tokenizer_files
from mesh_transformer.data.batches import Position

_logger = logging.getLogger(__name__)


class Opened(NamedTuple):
    """A checkpoint, and the configuration of its model."""

    found: opening.Found
    source: Source
    config: Config


def open_checkpoint(path: str, config: Config | None) -> Opened:
    """Open a checkpoint of any format, and say what it is.

    Args:
        config: Of its model; None takes the checkpoint's own. Of what the checkpoint says itself
            only its vocabulary and its number of positions may differ.

    Raises:
        UserError: There is no such checkpoint, or it is of another model.
    """
    found = opening.find(path)
    model = None if config is None else config.model
    cores = None if config is None else config.checkpoint.original_cores
    source = opening.open_source(found, model, cores)
    if model is not None:
        check_function(source.known, model, found.folder, MADE_TO_FIT)
    _logger.info("%s: %s", found.folder, source.about)
    return Opened(found, source, config or opening.config_of(found, source))


def combined(
    opened: Sequence[Opened], output: str, n_layers: int | None = None
) -> tuple[Source, Config]:
    """Return the one checkpoint that is to be made of those opened, and its configuration.

    Args:
        opened: One, or several of one model, whose weights' mean is taken.
        output: Where it is to be written.
        n_layers: Of the deeper model that it begins; None leaves it as deep as it is.

    Raises:
        UserError: They are of different models, or deeper than asked for; or `output` is among
            them.
    """
    source, config = opened[0].source, opened[0].config
    if len(opened) > 1:
        for each in opened:
            places.check_apart(output, each.source)
        source = Mean([each.source for each in opened])
    if n_layers is not None:
        source = WithLayers(source, n_layers)
        model = dataclasses.replace(config.model, layers=n_layers)
        config = dataclasses.replace(config, model=model)
    if source is not opened[0].source:
        _logger.info("made of it: %s", source.about)
    return source, config


def step_folder(root: str, step: int) -> str:
    """Name the folder of a step in a run's folder, this library's or the original's."""
    folders = [storage.join(root, *inside, f"step_{step}") for inside in ((), ("checkpoints",))]
    return next((folder for folder in folders if storage.exists(folder)), folders[0])


def write(
    source: Source, config: Config, output: str, what: Conversion, *, overwrite: bool = False
) -> None:
    """Convert, as `conversion.convert` does; a Hugging Face folder has its tokenizer's files too.

    Raises:
        UserError: See there.
    """
    tokens = _tokenizer_of(source, config) if what.format == "hf" else None
    n_vocab = what.n_vocab or config.model.n_vocab
    position = source.position if isinstance(source, NativeSource) else None
    start_id = config.model.pad_id if config.model.encoder_layers else None

    if what.format == "hf" and config.model.pe != "fixed":
        _logger.info(
            "config.json will say that the model has %d positions, the seq of the configuration",
            config.model.seq,
        )

    def write_tokenizer(folder: str) -> None:
        if tokens is not None:
            tokenizer_files.write(folder, tokens, n_vocab, start_id=start_id)

    if tokens is not None:
        tokenizer_files.check(tokens, n_vocab)
    convert(
        source,
        config,
        output,
        what,
        position=position or Position().to_json(),
        overwrite=overwrite,
        ids=tokenizer_files.special_ids(tokens, n_vocab, start_id=start_id) if tokens else None,
        write_tokenizer=write_tokenizer,
        stage=functools.partial(progress.stage, "Converting"),
    )
    _logger.info("written: %s", output)
    if what.format == "native" and source.counts is None:
        _logger.info("it holds weights alone: train them with --tune-model-path %s", output)
    elif what.format == "native":
        anew = "; the data begins anew, since no other format says how far it was read"
        _logger.info(
            "to train on from step %d, set model_dir to %s%s",
            source.step,
            output,
            "" if position else anew,
        )


def _tokenizer_of(source: Source, config: Config) -> tokenizer.Tokenizer | None:
    """Load the tokenizer to write beside a model; None where the one that was read has none."""
    name = config.data.tokenizer
    lacks = not storage.exists(storage.join(name, "tokenizer.json"))
    if name == opening.folder_of(source.where) and lacks:
        _logger.warning("%s holds no tokenizer.json, so that none is written either", name)
        return None
    return tokenizer.load(name)


def verify(found: opening.Found, source: Source) -> None:
    """Read everything and compare its checksums.

    Raises:
        CheckpointError: Something is damaged.
    """
    with progress.stage("Verifying", n_bytes(source, None, moments=True)) as advance:
        opening.verify(found, source, advance)
    _logger.info("whole: %s", found.folder)
