"""A training run as data: a flat JSON or YAML file, checked as a whole, becomes frozen dataclasses.

The file's keys are the fields of eight `sections`. `load` reports everything that is wrong with a
file in one `ConfigError`, before any device is touched, and says in a `ConfigWarning` what will run
but may not be meant.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import pathlib
import typing
import warnings
from collections.abc import Mapping
from typing import Any

from mesh_transformer import relations, rules, schema
from mesh_transformer.network import ModelConfig
from mesh_transformer.schema import ConfigError, ConfigWarning
from mesh_transformer.sections import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    Lengths,
    MeshConfig,
    OptimizerConfig,
    PodConfig,
    RunConfig,
    check,
    keys_of,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run, checked; see `load` and `parse`."""

    model: ModelConfig
    mesh: MeshConfig
    batch: BatchConfig
    optimizer: OptimizerConfig
    data: DataConfig
    checkpoint: CheckpointConfig
    run: RunConfig
    pod: PodConfig

    def __post_init__(self) -> None:
        _, problems = check(self._flat(), KEYS)
        if problems:
            raise ConfigError(type(self).__name__, problems)

    def _flat(self) -> dict[str, Any]:
        return {key: value for name in SECTIONS for key, value in vars(getattr(self, name)).items()}

    def to_flat(self) -> dict[str, Any]:
        """Every key that has a value, derived ones too, in plain JSON values.

        `parse` makes an equal Config of it.
        """
        given = {key: value for key, value in self._flat().items() if value is not None}
        return {key: _plain(value) for key, value in given.items()}

    def replicas(self, n_devices: int) -> int:
        """Copies of the model that `n_devices` hold: the size of the mesh axis "dp"."""
        cores = self.mesh.cores_per_replica
        if n_devices < cores or n_devices % cores:
            problems = [
                f"cores_per_replica {cores} does not divide the {n_devices} device(s) that there "
                f"are; {relations.divisors(n_devices)} would"
            ]
        else:
            _, problems = check(self._flat() | {"tpu_size": n_devices}, KEYS)
        if problems:
            raise ConfigError(self.run.name, problems)
        return n_devices // cores

    def global_batch(self, n_devices: int) -> int:
        """Sequences in one microbatch over all replicas."""
        return self.batch.per_replica_batch * self.replicas(n_devices)

    def val_batch(self, n_devices: int) -> int:
        """Sequences in one validation batch over all replicas."""
        return self.global_batch(n_devices) * self.batch.val_batch_multiplier

    def sequences_per_step(self, n_devices: int) -> int:
        """Sequences that one optimizer step consumes."""
        return self.global_batch(n_devices) * self.batch.gradient_accumulation_steps

    @property
    def lengths(self) -> Lengths:
        """Tokens of each sequence that each optimizer step trains on."""
        return Lengths(self.model.seq, self.batch.seq_warmup)

    def tokens_per_step(self, n_devices: int) -> int:
        """Tokens that one optimizer step predicts, after stages of `seq_warmup`."""
        return self.sequences_per_step(n_devices) * self.model.seq


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple) else copy.copy(value)


SECTIONS: dict[str, Any] = typing.get_type_hints(Config)


KEYS = {key: what for section in SECTIONS.values() for key, what in keys_of(section).items()}


def load(path: str | os.PathLike[str]) -> Config:
    """Read a run from a .json, .yaml or .yml file.

    Raises:
        ConfigError: the file cannot be read or a run cannot be made of it.
    """
    mapping, repeats = schema.read_file(pathlib.Path(path))
    return _parse(mapping, str(path), [f"key {key!r} is given more than once" for key in repeats])


def parse(mapping: Mapping[str, Any], source: str = "configuration") -> Config:
    """Make a run of flat keys; `source` is what messages call them.

    Raises:
        ConfigError: a run cannot be made of them.
    """
    return _parse(mapping, source, [])


def recorded(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return what keys meant that a run has recorded, perhaps by a release that had fewer.

    Keys that are absent have their defaults, or what follows from the others; what is there stays,
    sound or not, but for T5's keys where they were without effect. As `to_flat`, it leaves out what
    has no value.
    """
    values, _ = _completed(flat)
    keys = {key: _plain(value) for key, value in values.items()} | dict(flat)
    if keys["pe"] != "t5":
        keys |= {key: KEYS[key].default for key in ("pe_buckets", "pe_max_distance")}
    return keys


def _completed(mapping: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the sound ones of the keys that are given or have defaults, and what is wrong."""
    defaults = {
        key: what.default
        for key, what in KEYS.items()
        if what.default is not dataclasses.MISSING and key not in mapping
    }
    return check({key: it for key, it in mapping.items() if key in KEYS} | defaults, KEYS)


def _parse(mapping: Any, source: str, problems: list[str]) -> Config:
    if not isinstance(mapping, Mapping):
        raise ConfigError(source, [f"expected keys and values, got {schema.shown(mapping)}"])
    problems, notes, meant = list(problems), [], set()
    for key in mapping:
        if key in rules.RETIRED:
            notes.append(f"key {key!r} is ignored: {rules.RETIRED[key]}")
        elif key not in KEYS:
            meant.update(schema.closest(key, KEYS))
            problems.append(f"unknown key {key!r}{schema.did_you_mean(key, KEYS)}")
    needed = {key for key, what in KEYS.items() if what.default is dataclasses.MISSING}
    problems += [f"missing key {key!r}" for key in KEYS if key in needed - {*mapping, *meant}]
    values, wrong = _completed(mapping)
    if problems + wrong:
        raise ConfigError(source, problems + wrong)
    for note in notes + relations.broken(rules.DOUBTFUL, values):
        warnings.warn(f"{source}: {note}", ConfigWarning, stacklevel=3)
    sections: dict[str, Any] = {
        name: section(**{key: values[key] for key in keys_of(section) if key in values})
        for name, section in SECTIONS.items()
    }
    return Config(**sections)
