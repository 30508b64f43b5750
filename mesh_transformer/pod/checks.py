"""What a session refuses to compute with, before any device is touched."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mesh_transformer.config import ModelConfig
from mesh_transformer.errors import UserError


def check_tokens(
    model: ModelConfig,
    dims: str,
    tokens: np.ndarray,
    mask: np.ndarray | None,
    *,
    multiple: int = 1,
) -> None:
    """Check tokens to train on or to score: records, as `training.examples` splits them.

    Args:
        dims: The letters of their dimensions, which end in T1.
        mask: One number per target.
        multiple: Of which B must be one.

    Raises:
        ValueError: Their shape or the mask's is another, or an id is outside the vocabulary.
    """
    seq, before, n_vocab = model.seq, model.encoder_seq, model.n_vocab
    rank, shape = len(dims) - 1, tokens.shape
    sound = tokens.ndim == rank and 0 not in shape
    if not sound or shape[-2] % multiple or not 2 <= shape[-1] - before <= seq + 1:
        longest = "encoder_seq + seq + 1" if before else "seq + 1"
        raise ValueError(
            f"tokens_{dims} has the shape {shape}; needed are {rank} dimensions, B a multiple "
            f"of {multiple} (one part for each replica), T1 from {before + 2} to "
            f"{before + seq + 1} ({longest})"
        )
    if mask is not None and mask.shape != (wanted := (*shape[:-1], shape[-1] - before - 1)):
        raise ValueError(f"the mask has the shape {mask.shape}; one per target is {wanted}")
    low, high = tokens.min(), tokens.max()
    if low < 0 or high >= n_vocab:
        raise ValueError(f"token ids run from {low} to {high}; n_vocab is {n_vocab}")


def check_prompts(
    model: ModelConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> None:
    """Check prompts to continue, or what an encoder is fed.

    Raises:
        UserError: Everything that is wrong with them.
    """
    seq, n_vocab = model.seq, model.n_vocab
    problems = [
        f"prompt {i} is empty; give it at least one token, such as the end of text"
        for i, prompt in enumerate(prompts)
        if not len(prompt)
    ]
    if model.encoder_layers:
        problems += [
            f"prompt {i} has {len(prompt)} tokens, but encoder_seq is {model.encoder_seq}: "
            "shorten the prompt"
            for i, prompt in enumerate(prompts)
            if len(prompt) > model.encoder_seq
        ]
        if max_new_tokens >= seq:
            problems.append(
                f"{max_new_tokens} tokens are to follow a first one, but seq is {seq}: ask for "
                "fewer"
            )
    else:
        problems += [
            f"prompt {i} has {len(prompt)} tokens and {max_new_tokens} are to follow, but seq is "
            f"{seq}: shorten the prompt or ask for fewer"
            for i, prompt in enumerate(prompts)
            if len(prompt) + max_new_tokens > seq
        ]
    problems += [
        f"prompt {i} holds the token id {outside[0]}, but n_vocab is {n_vocab}"
        for i, prompt in enumerate(prompts)
        if (outside := [token for token in prompt if not 0 <= token < n_vocab])
    ]
    if not len(prompts) or max_new_tokens < 1:
        problems.append("there must be a prompt, and at least one new token asked for")
    if problems:
        raise UserError("; ".join(problems))
