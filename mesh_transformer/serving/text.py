"""Text that continues a prompt, as it comes."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from typing import Protocol

from mesh_transformer.data.tokenizer import TextStream, Tokenizer
from mesh_transformer.errors import UserError
from mesh_transformer.session import Generation, Sampling

_TOKENS_AT_ONCE = 8  # a person reads no faster, and each return to the host costs devices time

_logger = logging.getLogger(__name__)


class Streaming(Protocol):
    """What can continue prompts piece by piece; `pod.worker.Worker` can."""

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        max_new_tokens: int,
        *,
        every: int,
    ) -> Iterator[Generation]:
        """Yield what is new after every `every` tokens."""
        ...


def continuation(
    model: Streaming,
    tokenizer: Tokenizer,
    prompt: str,
    sampling: Sampling,
    *,
    max_new_tokens: int,
    seq: int,
) -> Iterator[str]:
    """Yield the text that follows a prompt, in pieces that never break a character.

    An empty prompt continues the end of a text, as a new document begins. A prompt that leaves no
    room for the new tokens loses its beginning, with a warning.

    Args:
        seq: Positions that the model has.

    Raises:
        UserError: More tokens are asked for than the model has positions.
    """
    if not 0 < max_new_tokens < seq:
        raise UserError(
            f"{max_new_tokens} new tokens are asked for; the model has {seq} positions, one of "
            f"them for the prompt: ask for 1 to {seq - 1}"
        )
    ids = tokenizer.encode(prompt) or [tokenizer.eot_id]
    if len(ids) > (room := seq - max_new_tokens):
        _logger.warning("the prompt has %d tokens; only its last %d are used", len(ids), room)
        ids = ids[-room:]
    text = TextStream(tokenizer)
    for piece in model.stream([ids], sampling, max_new_tokens, every=_TOKENS_AT_ONCE):
        yield "".join(text.push(token) for token in piece.tokens[0])
    yield text.finish()


def asked_prompts() -> Iterator[str]:
    """Ask for prompts, a line each, until the input ends; a terminal gets a line to type on."""
    while True:
        if sys.stdin.isatty():
            print("prompt> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        yield line.removesuffix("\n")
