"""Which models of `transformers` this library computes, and their config.json in our words.

`family` says what a family is described by; docs/howto_add_a_family.md how to add one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mesh_transformer import relations, rules
from mesh_transformer.checkpoints.family import Family, Json, as_json, shown
from mesh_transformer.checkpoints.gpt_families import BLOOM, GPT2, GPT_NEO, GPT_NEOX, GPTJ, OPT
from mesh_transformer.checkpoints.layout import CheckpointError
from mesh_transformer.checkpoints.llama_families import GEMMA, LLAMA, MISTRAL, QWEN2, QWEN3
from mesh_transformer.checkpoints.t5_family import T5
from mesh_transformer.config import ModelConfig
from mesh_transformer.network_rules import FREE, MUP
from mesh_transformer.schema import ConfigError

FAMILIES = (GPTJ, GPT2, GPT_NEO, GPT_NEOX, OPT, BLOOM, LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA, T5)
"""A model is written as the first of them that computes it."""

_ROUNDING = 1e-15  # relative, of four operations on numbers of 53 bits
_ALWAYS_SAME = {"quantization_config": None}


def family_of(config: Mapping[str, Any]) -> Family | None:
    """Return the family that a config.json names; None if it is not one of those here."""
    return next((it for it in FAMILIES if it.model_type == config.get("model_type")), None)


def config_keys(config: Mapping[str, Any], where: str = "config.json") -> dict[str, Any]:
    """Translate a config.json into keys of our configuration.

    Args:
        where: What messages call it.

    Raises:
        CheckpointError: It is of a model that ours does not compute; every reason is listed.
    """
    family = family_of(config)
    if family is None:
        known = ", ".join(repr(it.model_type) for it in FAMILIES)
        raise CheckpointError(
            f"{where}: model_type is {shown(config, 'model_type')}; this library reads {known}"
        )
    return keys_by(family, config, where)


def keys_by(family: Family, config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Translate what describes a model into keys of our configuration, by a family's rows.

    Raises:
        CheckpointError: As of `config_keys`.
    """
    problems = [
        f"{key} is {shown(config, key)}; {family.name} is computed with {as_json(needed)} here"
        for key, needed in (*family.same.items(), *_ALWAYS_SAME.items())
        if config.get(key, needed) != needed
    ]
    keys = dict(family.ours)
    for row in family.keys:
        try:
            keys |= row.read(config, keys)
        except ValueError as error:
            problems.append(str(error))
    if not problems:
        try:
            model = ModelConfig(**keys)
        except ConfigError as error:
            problems += error.problems
        else:
            keys = {
                field.name: getattr(model, field.name)
                for field in dataclasses.fields(model)
                if field.name not in FREE
            }
    if problems:
        heading = f"{where} describes a model that this library does not compute:"
        raise CheckpointError("\n  - ".join([heading, *problems]))
    return keys


def config_json(
    model: ModelConfig,
    dtype: np.dtype[Any],
    *,
    ids: Mapping[str, Any] | None = None,
    families: Sequence[Family] = FAMILIES,
    program: str = "transformers",
) -> dict[str, Any]:
    """Describe a model as `transformers` does.

    Args:
        dtype: Of the weights.
        ids: Its bos_token_id, eos_token_id and pad_token_id, null where one is left out. None takes
            the published models', those that are in the vocabulary.
        families, program: As for `described`.

    Raises:
        CheckpointError: As of `described`.
    """
    family, keys = described(model, families, program)
    if ids is None:
        theirs = {"bos_token_id": family.begin_id, "eos_token_id": family.eot_id}
        known = range(model.n_vocab)
        ids = {key: id if id in known else None for key, id in theirs.items()}
    else:
        ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")) | dict(ids)
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        # Releases before 5 know the older name alone, later ones both.
        "torch_dtype": str(dtype),
        "dtype": str(dtype),
    }
    same = {key: value for key, value in family.same.items() if value is not None}
    return dict(sorted({**config, **family.also, **ids, **keys, **same}.items()))


def described(
    model: ModelConfig, families: Sequence[Family] = FAMILIES, program: str = "transformers"
) -> tuple[Family, Json]:
    """Say which family computes a model, the first if several do, and describe it in its words.

    Args:
        families: Those that there are.
        program: Whose they are, for messages.

    Raises:
        CheckpointError: None computes what this model does; every reason is listed, of the family
            that comes closest.
    """
    tried = [_written(family, model) for family in families]
    family, keys, problems = min(tried, key=lambda it: len(it.problems))
    if problems:
        closest = f"; {family.name} comes closest" if len(families) > 1 else ""
        heading = (
            f"the model cannot be written for {program}, which has no class that computes it"
            f"{closest}:"
        )
        raise CheckpointError("\n  - ".join([heading, *problems]))
    return family, keys


class _Written(NamedTuple):
    """A model in a family's words.

    Attributes:
        keys: Of config.json.
        problems: Why these describe another model.
    """

    family: Family
    keys: Json
    problems: list[str]


def _written(family: Family, model: ModelConfig) -> _Written:
    """Translate a model, and find what is lost: what comes back must be what went in."""
    keys: dict[str, Any] = {}
    back: dict[str, Any] = {}
    problems: list[str] = []
    refused: set[str] = set()
    for row in family.keys:
        try:
            part = row.write(model)
            back |= row.read(part, vars(model))
        except ValueError as error:
            problems.append(str(error).replace("{}", family.name))
            refused |= set(row.ours.split())
        else:
            keys |= part
    wrong = {
        key: value
        for key, value in _meant(family, model, back).items()
        if key not in refused and not _alike(getattr(model, key), value)
    }
    if model.window == 0:
        wrong.pop("window_every", None)
    if wrong.get("embed_bias") is False and _can_fold_bias(model):
        del wrong["embed_bias"]
    listed = [
        f"{key} is {getattr(model, key)!r}; {family.name} has {value!r}"
        for key, value in wrong.items()
    ]
    return _Written(family, keys, listed + problems)


def _alike(ours: Any, back: Any) -> bool:
    """Say whether a value came back; a number may have been multiplied and divided on the way."""
    if isinstance(ours, float) and isinstance(back, (int, float)):
        return math.isclose(ours, back, rel_tol=_ROUNDING)
    return bool(ours == back)


def _meant(family: Family, model: ModelConfig, back: Json) -> dict[str, Any]:
    """Return the model that a family's words are read as, key by key."""
    meant = dict(family.ours) | dict(back)
    for field in dataclasses.fields(model):
        key = field.name
        if key in meant or key in FREE:
            continue
        if key in rules.DERIVED:
            try:
                meant[key] = relations.apply(rules.DERIVED[key], {**vars(model), **MUP})
            except ValueError:
                meant[key] = "d_model / n_heads"
        else:
            made = field.default_factory
            meant[key] = field.default if made is dataclasses.MISSING else made()
    return meant


def _can_fold_bias(model: ModelConfig) -> bool:
    """Say whether adding the bias to the table of embeddings gives the same model."""
    alike = model.embed_scale == 1 and model.d_embed == model.d_model
    return alike and not model.tie_embeddings
