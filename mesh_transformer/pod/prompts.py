"""Prompts as arrays: what is fed first, and where each sequence begins and must end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mesh_transformer.config import ModelConfig

_SMALLEST_BUCKET = 64  # positions; one compiled decoder serves all prompts of a bucket


class Laid(NamedTuple):
    """Prompts by position, padded on the right; rows that no prompt fills are done from the start.

    Attributes:
        fed_BT: int32, what `Steps.prefill` is fed: the prompts.
        tokens_BS: int32, what the decoder has so far, with room for what is drawn: the prompts, or
            after an encoder the `pad_id` that begins every sequence.
        length_B: int32, tokens that the decoder has so far.
        done_B: bool.
    """

    fed_BT: np.ndarray
    tokens_BS: np.ndarray
    length_B: np.ndarray
    done_B: np.ndarray


def laid(
    model: ModelConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int, multiple: int
) -> Laid:
    """Lay out prompts.

    Args:
        multiple: Of which B must be one.
    """
    n_rows = len(prompts) + -len(prompts) % multiple
    done_B = np.arange(n_rows) >= len(prompts)
    longest = max(map(len, prompts))
    if model.encoder_layers:
        fed_BT = _filled(prompts, n_rows, _bucket(longest, model.encoder_seq), model.pad_id)
        n_slots = _bucket(1 + max_new_tokens, model.seq)
        tokens_BS = np.full((n_rows, n_slots), model.pad_id, np.int32)
        return Laid(fed_BT, tokens_BS, np.ones(n_rows, np.int32), done_B)
    length_B = np.ones(n_rows, np.int32)
    length_B[: len(prompts)] = [len(prompt) for prompt in prompts]
    tokens_BS = _filled(prompts, n_rows, _bucket(longest + max_new_tokens, model.seq), 0)
    return Laid(tokens_BS[:, : _bucket(longest, model.seq)], tokens_BS, length_B, done_B)


def _filled(
    prompts: Sequence[Sequence[int]], n_rows: int, n_positions: int, filling: int
) -> np.ndarray:
    tokens_BT = np.full((n_rows, n_positions), filling, np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, : len(prompt)] = prompt
    return tokens_BT


def _bucket(n_positions: int, most: int) -> int:
    """Return the next power of two, up to the most there can be: few lengths, few compilations."""
    bucket = _SMALLEST_BUCKET
    while bucket < n_positions:
        bucket *= 2
    return min(bucket, most)
