"""Text that continues a prompt, as it comes."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
from collections.abc import Iterator, Sequence
from typing import Protocol

from mesh_transformer.config import Config
from mesh_transformer.data import borders
from mesh_transformer.data.tokenizer import TextStream, Tokenizer
from mesh_transformer.errors import UserError
from mesh_transformer.session import Generation, Sampling

_TOKENS_AT_ONCE = 8  # a person reads no faster, and each return to the host costs devices time
_MOST_UNASKED = 256

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


def checked_length(max_new_tokens: int | None, seq: int) -> int:
    """Return how many new tokens to generate, which leaves at least one position for a prompt.

    Args:
        max_new_tokens: How many are asked for; None is half of the positions, at most 256.
        seq: Positions that the model has.

    Raises:
        UserError: It is not from 1 to seq - 1.
    """
    if max_new_tokens is None:
        return min(_MOST_UNASKED, seq // 2)
    if not 0 < max_new_tokens < seq:
        raise UserError(
            f"{max_new_tokens} new tokens are asked for; the model has {seq} positions, one of "
            f"them for the prompt: ask for 1 to {seq - 1}"
        )
    return max_new_tokens


def for_tokenizer(config: Config, tokenizer: Tokenizer) -> Config:
    """Return the configuration with the ids that its tokenizer lacks left out of sampling.

    A vocabulary may be padded; only for tokenizers that come with the library does the
    configuration itself know where the padding begins.
    """
    n_tokens = min(config.model.n_tokens, tokenizer.n_tokens)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, n_tokens=n_tokens))


def continuation(
    model: Streaming,
    tokenizer: Tokenizer,
    prompt: str,
    sampling: Sampling,
    *,
    max_new_tokens: int,
    seq: int,
    encoder_seq: int = 0,
) -> Iterator[str]:
    """Yield the text that follows a prompt, in pieces that never break a character.

    A prompt begins as the tokenizer begins a document; where it does not, an empty one continues
    the end of a text, as a new document would. A prompt that leaves no room for the new tokens
    loses its beginning, with a warning.

    Args:
        encoder_seq: Tokens that an encoder is fed, if there is one: the prompt and an end of text.
            One that is longer loses what comes before its end, with a warning.

    Raises:
        UserError: `checked_length` refuses the number of new tokens.
    """
    room = seq - checked_length(max_new_tokens, seq)
    begin = borders.prompt_begin(tokenizer)
    ids = tokenizer.encode(prompt)
    if encoder_seq:
        ids = _for_encoder(ids, tokenizer, encoder_seq)
    elif len(begin + ids) > room:
        n_used = room - len(begin)
        _logger.warning("the prompt has %d tokens; only its last %d are used", len(ids), n_used)
        ids = begin + ids[len(ids) - n_used :]
    else:
        ids = begin + ids or [borders.first_id(tokenizer)]
    text = TextStream(tokenizer)
    for piece in model.stream([ids], sampling, max_new_tokens, every=_TOKENS_AT_ONCE):
        yield "".join(map(text.push, piece.tokens[0]))
    yield text.finish()


def _for_encoder(ids: list[int], tokenizer: Tokenizer, encoder_seq: int) -> list[int]:
    """Return a prompt as records hold an input; say if it is cut."""
    n, first = len(borders.document_begin(tokenizer)) + len(ids), encoder_seq - 1
    if n > first:
        _logger.warning("the prompt has %d tokens; only its first %d are used", n, first)
    return borders.encoder_input(tokenizer, ids, encoder_seq)


def asked_prompts() -> Iterator[str]:
    """Yield the lines of standard input; a terminal is asked for them, with editing and history."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (`input` edits lines by it; not every Python has it)
    asking = "prompt> " if sys.stdin.isatty() else ""
    with contextlib.suppress(EOFError):
        while True:
            yield input(asking)
