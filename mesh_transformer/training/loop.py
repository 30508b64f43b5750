"""The one training loop, for one host and for pods alike: it knows a session, not its devices."""

from __future__ import annotations

import collections
import contextlib
import itertools
import logging
import math
import signal
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from mesh_transformer.config import Config
from mesh_transformer.data.batches import Position, TokenBatches, ValidationBatches
from mesh_transformer.data.tokenizer import Tokenizer, byte_lengths
from mesh_transformer.data.tokenizer import load as load_tokenizer
from mesh_transformer.errors import UserError
from mesh_transformer.metrics import MetricsLog
from mesh_transformer.session import Metrics, Session

_IN_FLIGHT = 2  # steps whose metrics are not looked at yet, so that devices never wait for the log

_logger = logging.getLogger(__name__)


class Finished(NamedTuple):
    """How training ended.

    Attributes:
        step: Optimizer steps taken, the last checkpoint's.
        stopped_by: The signal that asked it to stop early, or None.
    """

    step: int
    stopped_by: signal.Signals | None


class TrainingError(UserError):
    """Training cannot go on, and doing the same again would not help."""


def train(session: Session, config: Config, *, n_devices: int, device_kind: str) -> Finished:
    """Train until `total_steps`, from the newest checkpoint if there is one.

    SIGINT and SIGTERM save a checkpoint and end the loop; a second one ends the process at once.

    Args:
        n_devices: Devices that the session trains on.
        device_kind: Their `jax.Device.device_kind`.

    Raises:
        TrainingError: The loss is not finite and `stop_on_nan` is set.
    """
    tokenizer = load_tokenizer(config.data.tokenizer)
    val_sets = validation_sets(config, tokenizer, n_devices)
    restored = session.restore()
    step, position = restored if restored else (0, Position().to_json())
    if restored:
        _logger.info("going on from the checkpoint of step %d", step)
    total = config.run.total_steps
    if step >= total:
        _logger.info("nothing to do: total_steps is %d", total)
        return Finished(step, None)
    batches = TokenBatches(
        config.data.train_set,
        shape=(config.batch.gradient_accumulation_steps, config.global_batch(n_devices)),
        seq=config.model.seq,
        n_vocab=config.model.n_vocab,
        position=Position.from_json(position),
        tokenizer=tokenizer,
    )
    log = MetricsLog.for_run(config, step=step, n_devices=n_devices, device_kind=device_kind)
    in_flight: collections.deque[tuple[int, Metrics]] = collections.deque()
    stopping = None
    with contextlib.closing(batches), log, StopSignals() as signals:
        while step < total and stopping is None:
            step += 1
            in_flight.append((step, session.train(next(batches))))
            stopping = signals.received
            validates = bool(val_sets) and (step == total or step % config.run.val_every == 0)
            saves = step == total or stopping or step % config.checkpoint.ckpt_every == 0
            while len(in_flight) > (0 if validates or saves else _IN_FLIGHT):
                _log_step(log, config, *in_flight.popleft())
            with log.paused():
                if validates:
                    validate(session, config, val_sets, tokenizer, log, step)
                if saves:
                    # The log first: a checkpoint's log is then always complete.
                    log.flush()
                    session.save(step, batches.position.to_json())
    return Finished(step, stopping)


class StopSignals:
    """Notes SIGINT or SIGTERM while in force; the second one acts as if this were not there."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def _receive(self, number: int, _: types.FrameType | None) -> None:
        self.received = signal.Signals(number)
        self.__exit__()
        _logger.warning(
            "%s: saving a checkpoint after this step, then stopping; once more stops at once",
            self.received.name,
        )


def announce(config: Config, n_parameters: int, n_devices: int, device_kind: str) -> None:
    """Log what is about to be trained, and on what."""
    mp = config.mesh.cores_per_replica
    _logger.info(
        "%s: %s parameters on %d x %s (%d replicas of %d), ZeRO stage %d; %s tokens per step; "
        "everything is written to %s",
        config.run.name,
        f"{n_parameters:,}",
        n_devices,
        device_kind,
        config.replicas(n_devices),
        mp,
        config.mesh.zero_stage,
        f"{config.tokens_per_step(n_devices):,}",
        config.checkpoint.root,
    )
    if config.run.eval_harness_tasks:
        _logger.warning("eval_harness_tasks are not run during training")


def _log_step(log: MetricsLog, config: Config, step: int, metrics: Metrics) -> None:
    metrics = {name: float(value) for name, value in metrics.items()}
    log.train(step, metrics)
    if config.run.stop_on_nan and not math.isfinite(metrics["loss"]):
        log.flush()
        raise TrainingError(
            f"the loss of step {step} is {metrics['loss']}; lower lr (now {config.optimizer.lr}) "
            "or raise warmup_steps and run again from the last checkpoint, or set stop_on_nan to "
            "false to train on regardless"
        )


def validation_sets(
    config: Config, tokenizer: Tokenizer, n_devices: int
) -> Mapping[str, ValidationBatches]:
    """Open every validation set of a configuration; none if it asks for no batches."""
    if not config.run.val_batches:
        return {}
    return {
        name: ValidationBatches(
            index,
            batch=config.val_batch(n_devices),
            seq=config.model.seq,
            n_vocab=config.model.n_vocab,
            tokenizer=tokenizer,
        )
        for name, index in config.data.val_set.items()
    }


def validate(
    session: Session,
    config: Config,
    val_sets: Mapping[str, ValidationBatches],
    tokenizer: Tokenizer,
    log: MetricsLog,
    step: int,
) -> None:
    """Score the first `val_batches` batches of every validation set, and log the means."""
    lengths_V = byte_lengths(tokenizer)
    for name, batches in val_sets.items():
        nats, n_correct, n_tokens, n_bytes = 0.0, 0, 0, 0
        for tokens_BT1, mask_BT in itertools.islice(batches, config.run.val_batches):
            seen = session.evaluate(tokens_BT1, mask_BT)
            nats += float(seen.loss_BT.sum(dtype=np.float64))
            n_correct += int(seen.correct_BT.sum())
            n_tokens += int(mask_BT.sum())
            if lengths_V is not None:
                n_bytes += int(lengths_V[tokens_BT1[:, 1:][mask_BT]].sum())
        bytes_per_token = n_bytes / n_tokens if n_bytes else None
        log.validation(step, name, nats / n_tokens, n_correct / n_tokens, bytes_per_token)
