"""The keys of a run by subject, as frozen dataclasses that check themselves.

Every key of a configuration belongs to exactly one of these sections, or to that of `network`. A
key by itself is checked by its type, which carries its limits (`schema`); several keys together by
tables (`rules`).
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple

from mesh_transformer import relations, rules, schema
from mesh_transformer.schema import (
    ConfigError,
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

Stage = tuple[Count, Annotated[int, Limit(lambda n: n >= 2, "2 or more")]]
Tracker = Literal["tensorboard", "wandb"]

DERIVED: Any = None
"""Default of a key that, left out, follows from others by `rules.DERIVED`."""


class Section:
    def __post_init__(self) -> None:
        values, problems = check(vars(self), keys_of(type(self)))
        if problems:
            raise ConfigError(type(self).__name__, problems)
        for key, value in values.items():
            object.__setattr__(self, key, value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig(Section):
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
class BatchConfig(Section):
    """How many sequences are fed at once.

    Attributes:
        per_replica_batch: Sequences per replica in one microbatch.
        gradient_accumulation_steps: Microbatches per optimizer step.
        val_batch_multiplier: Sequences of a validation batch per sequence of a microbatch.
        seq_warmup: Stages that come before sequences of `seq` tokens, each as a list of optimizer
            steps and a length: so many steps train on the first so many tokens of each record.
    """

    per_replica_batch: Count
    gradient_accumulation_steps: Count = 1
    val_batch_multiplier: Count = 1
    seq_warmup: tuple[Stage, ...] = ()


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Tokens of each sequence that optimizer steps, counted from 1, train on.

    Stages of growing length, as in fattorib/transformer (there of one stage); those of Sequence
    Length Warmup (arXiv:2108.06084) are as many as lengths.

    Attributes:
        seq: After the last stage.
        warmup: Stages, each as optimizer steps and length.
    """

    seq: int
    warmup: tuple[tuple[int, int], ...] = ()

    def at(self, step: int) -> int:
        """Return the tokens of each sequence at a step."""
        return next(length for last, length in self._ends() if last is None or step <= last)

    def through(self, step: int) -> int:
        """Return the tokens of one sequence a step, summed over steps 1 to `step`."""
        total = before = 0
        for last, length in self._ends():
            end = step if last is None else min(step, last)
            total, before = total + (end - before) * length, end
        return total

    def begins(self, step: int) -> bool:
        """Say whether a step is the first of its length, and so compiles."""
        return step == 1 or self.at(step) != self.at(step - 1)

    def _ends(self) -> Iterator[tuple[int | None, int]]:
        """Yield the last step of each stage, None being that of the run, and the stage's length."""
        last = 0
        for steps, length in self.warmup:
            last += steps
            yield last, length
        yield None, self.seq


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Section):
    """Adam's schedule: linear warm-up to `lr`, half a cosine down to `end_lr`, then constant.

    Attributes:
        warmup_steps: Of the warm-up.
        anneal_steps: Of the half cosine.
        weight_decay: Of matrices, per step and multiplied by the learning rate.
        original_shards: Train on as mesh-transformer-jax over so many shards would; 0: one copy.
    """

    warmup_steps: Natural
    anneal_steps: Natural
    lr: Positive
    end_lr: NonNegative
    weight_decay: NonNegative
    original_shards: Natural = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """The tokens.

    Attributes:
        train_set: Index file: one TFRecord path or URL a line.
        val_set: Index file of each validation set, by the name it has in logs.
        tokenizer: "gpt2", "bytes", path or URL of a tokenizer.json or its folder, or a Hugging
            Face name.
    """

    train_set: Text
    val_set: Mapping[Text, Text] = dataclasses.field(default_factory=dict, hash=False)
    tokenizer: Text = "gpt2"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Section):
    """Where and how often the run is saved.

    Attributes:
        bucket: Name of a Google Cloud Storage bucket that holds `model_dir`.
        model_dir: Folder of this run; without a `bucket` any path or gs:// URL.
        ckpt_every: Optimizer steps between checkpoints; the last step is always saved.
        keep_every: Checkpoints at multiples of this step are kept for ever.
        keep_n: And this many of the newest, whether at such multiples or not.
        original_cores: The `cores_per_replica` of the run of mesh-transformer-jax's second model
            whose checkpoint is read: its matrices are arranged by it, and nothing in them says so.
    """

    model_dir: Text
    bucket: Text | None = None
    ckpt_every: Count
    keep_every: Count
    keep_n: Count = 3
    original_cores: Count | None = None

    @property
    def root(self) -> str:
        """Path or URL of the folder that holds everything the run writes, without a final slash."""
        model_dir = self.model_dir.rstrip("/") or "/"
        return f"gs://{self.bucket}/{model_dir}" if self.bucket else model_dir


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(Section):
    """How long the run is and what it reports.

    Attributes:
        name: Of the run, in logs and trackers.
        total_steps: Optimizer steps.
        val_batches: Batches read from each validation set.
        val_every: Optimizer steps between validations.
        eval_harness_tasks: lm-eval tasks that follow each validation; refused in training so far.
        trackers: Where metrics go besides metrics.jsonl.
        wandb_project: Of Weights & Biases.
        noise_scale_alpha: Weight of the newest step in the running gradient noise scale.
        stop_on_nan: Whether a loss that is not finite ends the run.
        seed: Of initial weights and dropout.
        comment: For readers of the file and of Weights & Biases.
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
class PodConfig(Section):
    """The hosts of a run on many: how long to wait for them, and the TPU VMs that it may create.

    Attributes:
        pod_start_seconds: What a host may take to come up, compile, restore, save or score.
        pod_step_seconds: What it may take for an optimizer step, once one is compiled.
        pod_heartbeat_seconds: After which JAX ends all hosts if one of them is silent.
        pod_retries: How often in a row to start lost hosts again without a new checkpoint between.
        tpu_type: Accelerator type of a slice. Left out: v3, as large as `tpu_size` says.
        tpu_runtime: Software version of its VMs. Left out: what suits the type's generation.
        tpu_project: Left out: the project of Application Default Credentials.
        tpu_network, tpu_subnetwork: Of the hosts. Left out: the project's default.
        tpu_external_ips: Whether hosts reach the internet by addresses of their own; without them
            they need Cloud NAT to install what the library depends on.
        tpu_service_account: What the hosts act as. Left out: the project's default account.
        tpu_driver_address: IP address at which hosts reach the driver. Left out: its own in the
            network of the zone.
        tpu_token_secret: Secret in Secret Manager that holds the Ray token. Left out: the
            driver hands the token to the hosts itself.
        tpu_labels: Put on the slices, beside the library's own.
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


class Key(NamedTuple):
    kind: Any
    default: Any


def keys_of(section: type[Section]) -> dict[str, Key]:
    kinds = typing.get_type_hints(section, include_extras=True)
    keys = {}
    for field in dataclasses.fields(section):  # type: ignore[arg-type]
        made = field.default_factory
        default = field.default if made is dataclasses.MISSING else made()
        keys[field.name] = Key(kinds[field.name], default)
    return keys


def check(given: Mapping[str, Any], keys: Mapping[str, Key]) -> tuple[dict[str, Any], list[str]]:
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
                derived = relations.apply(derive, values)
            except ValueError as error:
                problems.append(str(error))
            else:
                values |= {} if derived is None else {key: derived}
    return values, problems + relations.broken(rules.IMPOSSIBLE, values)
