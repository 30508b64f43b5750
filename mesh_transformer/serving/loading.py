"""A checkpoint of any format as a model ready to be sampled from, on the devices there are."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

from mesh_transformer.checkpoints import opening
from mesh_transformer.config import Config
from mesh_transformer.data import tokenizer
from mesh_transformer.data.tokenizer import Tokenizer
from mesh_transformer.pod.devices import one_replica
from mesh_transformer.pod.worker import Worker
from mesh_transformer.serving import text
from mesh_transformer.session import Sampling


class Loaded(NamedTuple):
    """A model and its tokenizer.

    Attributes:
        worker: Holds the weights.
        tokenizer: What the weights were trained with.
        max_new_tokens: To continue a prompt by.
        seq: Positions that the model has.
        encoder_seq: Tokens that its encoder is fed; 0: it has none, and text goes on.
        stop_ids: Tokens that end a text: the tokenizer's, and those that the model says itself.
    """

    worker: Worker
    tokenizer: Tokenizer
    max_new_tokens: int
    seq: int
    encoder_seq: int
    stop_ids: tuple[int, ...]

    def answered(self, prompt: str, sampling: Sampling) -> Iterator[str]:
        """Yield what a reader is shown: a prompt, the text that follows and an end of line.

        An encoder's prompt has a line of its own, since the decoder's text does not go on from it.
        """
        yield f"{prompt}\n" if self.encoder_seq else prompt
        yield from self.continuation(prompt, sampling)
        yield "\n"

    def continuation(self, prompt: str, sampling: Sampling) -> Iterator[str]:
        """Yield the text that follows a prompt, up to its end; see `text.continuation`."""
        return text.continuation(
            self.worker,
            self.tokenizer,
            prompt,
            dataclasses.replace(sampling, stop_ids=self.stop_ids),
            max_new_tokens=self.max_new_tokens,
            seq=self.seq,
            encoder_seq=self.encoder_seq,
        )


def load(path: str | None, config: Config | None, *, max_new_tokens: int | None = None) -> Loaded:
    """Load a model onto as many of this host's devices as hold one copy of it best.

    Args:
        path: A checkpoint: see `opening.find`. None: the newest of the configuration's run.
        config: None: the checkpoint's own.
        max_new_tokens: None: see `text.checked_length`.

    Raises:
        UserError: There is no such checkpoint, or it does not fit; or JAX finds no devices.
    """
    if config is None:
        assert path is not None
        config = opening.stored_config(path)
    seq = config.model.seq
    length = text.checked_length(max_new_tokens, seq)
    tokens = tokenizer.load(config.data.tokenizer)
    config, devices = one_replica(text.for_tokenizer(config, tokens))
    worker = Worker(config, devices)
    worker.load_weights(path or config.checkpoint.root)
    stop_ids = {tokens.eot_id: None} | dict.fromkeys(opening.end_ids(path) if path else ())
    return Loaded(worker, tokens, length, seq, config.model.encoder_seq, tuple(stop_ids))
