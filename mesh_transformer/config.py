"""A training run as data: a flat JSON or YAML file, checked as a whole, becomes frozen dataclasses.

The file's keys are the fields of the eight sections below; every key belongs to exactly one.
`load` reports everything that is wrong with a file in one `ConfigError`, before any device is
touched, and says in a `ConfigWarning` what will run but may not be meant. A key by itself is
checked by its type, which carries its limits (`schema`); several keys together by tables (`rules`).
"""

from __future__ import annotations

import copy
import dataclasses
import os
import pathlib
import typing
import warnings
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

from mesh_transformer import rules, schema
from mesh_transformer.schema import (
    ConfigError,
    ConfigWarning,
    Count,
    Fraction,
    LabelKey,
    LabelValue,
    Limit,
    Natural,
    NonNegative,
    Positive,
    Text,
    TpuType,
)

Norm = Literal[
    "layernorm", "layernorm-nobias", "layernorm-desync",
    "rmsnorm", "rmsnorm-bias", "scalenorm", "scalenorm-bias",
]  # fmt: skip
Positions = Literal["rotary", "t5", "fixed", "none"]
Tracker = Literal["tensorboard", "wandb"]

DERIVED: Any = None
"""Default of a key that, left out, follows from others by `rules.DERIVED`."""


class _Section:
    def __post_init__(self) -> None:
        values, problems = _check(vars(self), _keys_of(type(self)))
        if problems:
            raise ConfigError(type(self).__name__, problems)
        for key, value in values.items():
            object.__setattr__(self, key, value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(_Section):
    """The network.

    Attributes:
        n_vocab: Rows of the embedding and columns of the head; a multiple of `cores_per_replica`.
        n_tokens: Ids that the tokenizer can emit; rows from `n_tokens` to `n_vocab` are padding and
            are never sampled. Left out: the size of a tokenizer known here, at most `n_vocab`.
        seq: Tokens fed at once; a training record holds one more.
        pe: Position encoding; "fixed" is a learned table, as the original's name had it.
        pe_rotary_dims: Features of each head that "rotary" rotates. Left out: all.
        d_head: Features per head. Left out: d_model / n_heads.
        d_ff: Hidden features of the feed-forward layer. Left out: 4 d_model.
        compute_dtype: Of weights in use and activations; master weights are always float32.
        remat: What the backward pass computes anew: whole layers, all but matrix products, nothing.
        unroll: Layers computed in one round of the loop over layers. More of them run faster on
            CPUs and take longer to compile.
        attention: Implementation; "auto" takes the best that the device has.
        z_loss: Weight of log(Z)^2 in the training loss, which keeps the logits from drifting.
    """

    layers: Count
    d_model: Count
    n_heads: Count
    n_vocab: Count
    seq: Annotated[int, Limit(lambda n: n >= 2, "2 or more")]
    norm: Norm = "layernorm"
    pe: Positions = "rotary"
    pe_rotary_dims: Natural = DERIVED
    d_head: Count = DERIVED
    d_ff: Count = DERIVED
    n_tokens: Count = DERIVED
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    remat: Literal["full", "dots", "none"] = "full"
    unroll: Count = 1
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    z_loss: NonNegative = 1e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig(_Section):
    """The devices.

    Attributes:
        tpu_size: Devices (TPU cores) of the slice to use. Left out: all that there are.
        cores_per_replica: Devices over which one copy of the model is split (mesh axis "mp").
        zero_stage: What is spread over the replicas (mesh axis "dp") instead of copied: 0 nothing,
            1 optimizer state, 2 and the gradient sum, 3 and the weights.
    """

    tpu_size: Count | None = None
    cores_per_replica: Count = 1
    zero_stage: Literal[0, 1, 2, 3] = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchConfig(_Section):
    """How many sequences are fed at once.

    Attributes:
        per_replica_batch: Sequences per replica in one microbatch.
        gradient_accumulation_steps: Microbatches per optimizer step.
        val_batch_multiplier: Sequences of a validation batch per sequence of a microbatch.
    """

    per_replica_batch: Count
    gradient_accumulation_steps: Count = 1
    val_batch_multiplier: Count = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(_Section):
    """Adam's schedule: linear warm-up to `lr`, half a cosine down to `end_lr`, then constant.

    Attributes:
        weight_decay: Of matrices, per step and multiplied by the learning rate.
    """

    warmup_steps: Natural
    anneal_steps: Natural
    lr: Positive
    end_lr: NonNegative
    weight_decay: NonNegative


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(_Section):
    """The tokens.

    Attributes:
        train_set: Index file: one TFRecord path or URL a line.
        val_set: Index file of each validation set, by the name it has in logs.
        tokenizer: "gpt2", "bytes", a tokenizer.json or its folder, or a Hugging Face name.
    """

    train_set: Text
    val_set: Mapping[Text, Text] = dataclasses.field(default_factory=dict, hash=False)
    tokenizer: Text = "gpt2"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig(_Section):
    """Where and how often the run is saved.

    Attributes:
        bucket: Name of a Google Cloud Storage bucket that holds `model_dir`.
        model_dir: Folder of this run; without a `bucket` any path or URL.
        ckpt_every: Optimizer steps between checkpoints; the last step is always saved.
        keep_every: Checkpoints at multiples of this step are kept for ever.
        keep_n: Of the others, this many of the newest are kept.
    """

    model_dir: Text
    bucket: Text | None = None
    ckpt_every: Count
    keep_every: Count
    keep_n: Count = 3

    @property
    def root(self) -> str:
        """Path or URL of the folder that holds everything the run writes, without a final slash."""
        model_dir = self.model_dir.rstrip("/") or "/"
        return f"gs://{self.bucket}/{model_dir}" if self.bucket else model_dir


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(_Section):
    """How long the run is and what it reports.

    Attributes:
        total_steps: Optimizer steps.
        val_batches: Batches read from each validation set.
        val_every: Optimizer steps between validations.
        eval_harness_tasks: lm-eval tasks that follow each validation; refused in training so far.
        noise_scale_alpha: Weight of the newest step in the running gradient noise scale.
        stop_on_nan: Whether a loss that is not finite ends the run.
    """

    name: Text
    total_steps: Count
    val_batches: Natural = 0
    val_every: Count = 500
    eval_harness_tasks: tuple[Text, ...] = ()
    trackers: tuple[Tracker, ...] = ()
    wandb_project: Text = "mesh-transformer"
    noise_scale_alpha: Fraction = 0.01
    stop_on_nan: bool = True
    seed: Annotated[int, Limit(lambda n: 0 <= n < 2**32, "0 or more, below 2^32")] = 0
    comment: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PodConfig(_Section):
    """The hosts of a run on many: how long to wait for them, and the TPU VMs that it may create.

    Attributes:
        pod_start_seconds: What a host may take to come up, compile, restore, save or score.
        pod_step_seconds: What it may take for an optimizer step, once one is compiled.
        pod_heartbeat_seconds: After which JAX ends all hosts if one of them is silent.
        pod_retries: How often in a row to start lost hosts again without a new checkpoint between.
        tpu_type: Accelerator type of a slice. Left out: v3, as large as `tpu_size` says.
        tpu_runtime: Software version of its VMs. Left out: what suits the type's generation.
        tpu_project: Left out: the project of Application Default Credentials.
        tpu_external_ips: Whether hosts reach the internet by addresses of their own; without them
            they need Cloud NAT to install what the library depends on.
        tpu_service_account: What the hosts act as. Left out: the project's default account.
        tpu_driver_address: IP address at which hosts reach the driver. Left out: its own in the
            network of the zone.
        tpu_token_secret: Secret in Secret Manager that holds the Ray token. Left out: the
            driver hands the token to the hosts itself.
        tpu_queued: Whether to ask by a queued resource, which waits its turn for capacity.
        tpu_reserved: Whether to use capacity that is reserved for the project.
        tpu_wait_minutes: How long to wait for a slice that was asked for to be ready.
    """

    pod_start_seconds: Count = 1800
    pod_step_seconds: Count = 600
    pod_heartbeat_seconds: Count = 60
    pod_retries: Natural = 5
    tpu_type: TpuType = DERIVED
    tpu_runtime: Text = DERIVED
    tpu_project: Text | None = None
    tpu_network: Text | None = None
    tpu_subnetwork: Text | None = None
    tpu_external_ips: bool = True
    tpu_service_account: Text | None = None
    tpu_driver_address: Text | None = None
    tpu_token_secret: Text | None = None
    tpu_labels: Mapping[LabelKey, LabelValue] = dataclasses.field(default_factory=dict, hash=False)
    tpu_queued: bool = False
    tpu_reserved: bool = False
    tpu_wait_minutes: Count = 60


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
        _, problems = _check(self._flat(), KEYS)
        if problems:
            raise ConfigError(type(self).__name__, problems)

    def _flat(self) -> dict[str, Any]:
        return {key: value for name in SECTIONS for key, value in vars(getattr(self, name)).items()}

    def to_flat(self) -> dict[str, Any]:
        """Every key that has a value, derived ones too, in plain JSON values.

        `parse` makes an equal Config of it.
        """
        given = {key: value for key, value in self._flat().items() if value is not None}
        return {
            key: list(value) if isinstance(value, tuple) else copy.copy(value)
            for key, value in given.items()
        }

    def replicas(self, n_devices: int) -> int:
        """Copies of the model that `n_devices` hold: the size of the mesh axis "dp"."""
        cores = self.mesh.cores_per_replica
        if n_devices < cores or n_devices % cores:
            problems = [
                f"cores_per_replica {cores} does not divide the {n_devices} device(s) that there "
                f"are; {rules.divisors(n_devices)} would"
            ]
        else:
            _, problems = _check(self._flat() | {"tpu_size": n_devices}, KEYS)
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

    def tokens_per_step(self, n_devices: int) -> int:
        """Tokens that one optimizer step predicts."""
        return self.sequences_per_step(n_devices) * self.model.seq


SECTIONS: dict[str, Any] = typing.get_type_hints(Config)


class _Key(NamedTuple):
    kind: Any
    default: Any


def _keys_of(section: type[_Section]) -> dict[str, _Key]:
    kinds = typing.get_type_hints(section, include_extras=True)
    keys = {}
    for field in dataclasses.fields(section):  # type: ignore[arg-type]
        made = field.default_factory
        default = field.default if made is dataclasses.MISSING else made()
        keys[field.name] = _Key(kinds[field.name], default)
    return keys


KEYS = {key: what for section in SECTIONS.values() for key, what in _keys_of(section).items()}


def _check(given: Mapping[str, Any], keys: Mapping[str, _Key]) -> tuple[dict[str, Any], list[str]]:
    """Return the sound values, derived ones included, and all that is wrong with the given ones."""
    values: dict[str, Any] = {}
    problems = []
    for key, value in given.items():
        if value is not None or keys[key].default is not None:
            try:
                values[key] = schema.convert(keys[key].kind, value)
            except ValueError as error:
                hint = f"; {rules.HINTS[key]}" if not value and key in rules.HINTS else ""
                problems.append(f"{key}: {error}{hint}")
    for key, derive in rules.DERIVED.items():
        if key in keys and given.get(key) is None:
            try:
                derived = rules.apply(derive, values)
            except ValueError as error:
                problems.append(str(error))
            else:
                values |= {} if derived is None else {key: derived}
    return values, problems + rules.broken(rules.IMPOSSIBLE, values)


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
    given = {key: value for key, value in mapping.items() if key in KEYS}
    defaults = {key: k.default for key, k in KEYS.items() if k.default is not dataclasses.MISSING}
    problems += [f"missing key {key!r}" for key in KEYS if key not in {*given, *defaults, *meant}]
    values, wrong = _check(given | {k: v for k, v in defaults.items() if k not in given}, KEYS)
    if problems + wrong:
        raise ConfigError(source, problems + wrong)
    for note in notes + rules.broken(rules.DOUBTFUL, values):
        warnings.warn(f"{source}: {note}", ConfigWarning, stacklevel=3)
    sections: dict[str, Any] = {
        name: section(**{key: values[key] for key in _keys_of(section) if key in values})
        for name, section in SECTIONS.items()
    }
    return Config(**sections)
