"""What stands at the borders of texts: one rule for data, prompts and what an encoder is fed.

A document begins with the tokenizer's begin, if its files say that it has one, and ends with an end
of text. Where one id would be both, it only ends: between two documents it then is both.
"""

from __future__ import annotations

from collections.abc import Sequence

from mesh_transformer.data.tokenizer import Tokenizer


def document_begin(tokenizer: Tokenizer) -> list[int]:
    """Return the ids before a document in data, and before what an encoder is fed."""
    return [] if tokenizer.bos_id in (None, tokenizer.eot_id) else prompt_begin(tokenizer)


def prompt_begin(tokenizer: Tokenizer) -> list[int]:
    """Return the ids before a prompt: also the end of the document before it, where that begins."""
    return [] if tokenizer.bos_id is None else [tokenizer.bos_id]


def first_id(tokenizer: Tokenizer) -> int:
    """Return the id that an empty prompt is: its begin, or else the end of a document before it."""
    return tokenizer.eot_id if tokenizer.bos_id is None else tokenizer.bos_id


def encoder_input(tokenizer: Tokenizer, ids: Sequence[int], encoder_seq: int) -> list[int]:
    """Return what an encoder is fed of an input's own ids: as a document, cut before its end."""
    return [*[*document_begin(tokenizer), *ids][: encoder_seq - 1], tokenizer.eot_id]
