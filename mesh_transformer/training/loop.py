"""The one training loop, for one host and for pods alike: it knows a session, not its devices."""

from __future__ import annotations

import collections
import contextlib
import itertools
import logging
import math
import signal
import sys
import threading
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from mesh_transformer import metrics_file, throughput
from mesh_transformer.config import Config
from mesh_transformer.data.batches import Position, TokenBatches, ValidationBatches
from mesh_transformer.data.tokenizer import Tokenizer, byte_lengths
from mesh_transformer.data.tokenizer import load as load_tokenizer
from mesh_transformer.errors import UserError
from mesh_transformer.metrics import MetricsLog
from mesh_transformer.progress import PodStatus
from mesh_transformer.session import Metrics, Session
from mesh_transformer.training import goodput
from mesh_transformer.training.memory import memory_for

_IN_FLIGHT = 2  # steps whose metrics are not looked at yet, so that devices never wait for the log

_logger = logging.getLogger(__name__)


class Finished(NamedTuple):
    """How training ended.

    Attributes:
        step: Optimizer steps taken; a checkpoint of it is saved.
        stopped_by: The signal that ended it before the last step and its validation, or None.
    """

    step: int
    stopped_by: signal.Signals | None

    @property
    def status(self) -> int:
        """The exit status of a command that ends so."""
        return 128 + self.stopped_by if self.stopped_by else 0

    def told(self, config: Config, path: str, go_on: str) -> str:
        """Say how training ended, and what to do next.

        Args:
            path: The configuration's file.
            go_on: How the run goes on if a signal ended it.
        """
        if self.stopped_by:
            return f"Stopped at step {self.step}, which is saved. {go_on}"
        root = config.checkpoint.root
        return (
            f"Trained to step {self.step}. Checkpoints and metrics.jsonl are in {root}\n"
            f"  to see the loss:  {sys.executable} -m mesh_transformer.plot {root}\n"
            f"  to sample text:   {sys.executable} device_sample.py --config {path}"
        )


class TrainingError(UserError):
    """Training cannot go on, and doing the same again would not help."""


class StopSignals:
    """Notes SIGINT and SIGTERM, from `watch` to the end of the `with` block, instead of dying.

    The second one acts as it would without this. Python sees a signal between two instructions, so
    one that comes while a step is compiled is noted when that is done.

    Attributes:
        received: The signal that came; None so far.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._telling: threading.Thread | None = None

    def __enter__(self) -> StopSignals:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop_watching()
        if self._telling:
            self._telling.join()

    def watch(self) -> None:
        """Begin to note signals, but for those that are ignored; until then they act as ever."""
        for number in (signal.SIGINT, signal.SIGTERM):
            if number not in self._before and signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)

    def stop_watching(self) -> None:
        """Let signals act as ever, until `watch` is called again."""
        while self._before:
            signal.signal(*self._before.popitem())

    def _note(self, number: int, _: types.FrameType | None) -> None:
        self.received = signal.Signals(number)
        self.stop_watching()
        message = "%s: stopping once a checkpoint is saved; again stops at once"
        # By another thread: the signal may have come while this one was writing, which it may not
        # begin anew before it has ended.
        self._telling = threading.Thread(target=_logger.warning, args=(message, self.received.name))
        self._telling.start()


class Data:
    """The data sets of a run, looked at: what is wrong with them shows before anything is computed.

    Attributes:
        tokenizer: The one that they were made by.
        validation: Validation batches by the name of their set; empty if nothing is validated.
    """

    def __init__(self, config: Config, n_devices: int) -> None:
        """Open the data sets.

        Args:
            config: The run.
            n_devices: Devices that it trains on, which decides the size of a batch.

        Raises:
            DataError: A data set cannot be used, or the tokenizer is not to be had.
        """
        self._config = config
        self._n_devices = n_devices
        self.tokenizer: Tokenizer = load_tokenizer(config.data.tokenizer)
        names = ("seq", "encoder_seq", "pad_id", "n_vocab")
        self._record: dict[str, int] = {name: getattr(config.model, name) for name in names}
        self.train_from(Position()).close()
        self.validation: Mapping[str, ValidationBatches] = {
            name: ValidationBatches(
                index,
                batch=config.val_batch(n_devices),
                tokenizer=self.tokenizer,
                **self._record,
            )
            for name, index in config.data.val_set.items()
            if config.run.val_batches
        }

    def train_from(self, position: Position) -> TokenBatches:
        """Return training batches from a position on.

        Raises:
            DataError: As for opening; or the data set ends before that position.
        """
        config = self._config
        return TokenBatches(
            config.data.train_set,
            shape=(
                config.batch.gradient_accumulation_steps,
                config.global_batch(self._n_devices),
            ),
            position=position,
            tokenizer=self.tokenizer,
            **self._record,
        )


def check_tasks(config: Config) -> None:
    """Refuse a run that asks for lm-eval tasks, before any device is touched.

    Raises:
        UserError: Naming the key, and how to go on without.
    """
    if config.run.eval_harness_tasks:
        raise UserError(
            f"eval_harness_tasks asks for {', '.join(config.run.eval_harness_tasks)} after each "
            "validation, but mesh_transformer has no evaluation harness yet: to "
            "train without these tasks, give --config a copy of the file in which "
            '"eval_harness_tasks" is [] or left out'
        )


def announce(config: Config, n_parameters: int, n_devices: int, device_kind: str) -> None:
    """Log what is about to be trained, and on what; MFU is of the peak that is named."""
    peak = throughput.peak_flops_per_device(device_kind)
    _logger.info(
        "%s: %s parameters, %s tokens a step, on %d %s device(s) %s: %d replica(s) of %d, ZeRO "
        "stage %d; writing to %s",
        config.run.name,
        f"{n_parameters:,}",
        f"{config.tokens_per_step(n_devices):,}",
        n_devices,
        device_kind,
        "of unknown peak, so without MFU" if peak is None else f"of {peak / 1e12:.0f} TFLOP/s",
        config.replicas(n_devices),
        config.mesh.cores_per_replica,
        config.mesh.zero_stage,
        config.checkpoint.root,
    )


def train(
    session: Session,
    config: Config,
    data: Data,
    signals: StopSignals,
    *,
    n_devices: int,
    device_kind: str,
    ledger: goodput.Ledger | None = None,
    pod: Callable[[], PodStatus] | None = None,
) -> Finished:
    """Train until `total_steps`, from the newest checkpoint if there is one.

    Args:
        signals: One that arrives ends the loop, with a checkpoint, after the step or the batch of a
            validation under way; the rest of that validation comes first when the run goes on.
            Keep its `with` block around what waits until the last checkpoint is complete.
        n_devices: Devices that the session trains on.
        device_kind: Their `jax.Device.device_kind`.
        ledger: Books where the time goes.
        pod: Tells how the hosts stand, if there are several, for the log.

    Raises:
        TrainingError: A loss or a gradient is not finite and `stop_on_nan` is set; what it spoilt
            is not saved.
        UserError: The devices' memory is too small.
        DataError: The training data ends before the checkpoint's position, or is corrupt.
    """
    ledger = ledger or goodput.Ledger()
    ledger.now(goodput.RESTORING)
    restored = session.restore()
    step, position = 0, Position()
    unvalidated: list[str] = []
    if restored:
        step, position = restored.step, Position.from_json(restored.position)
        _logger.info("going on from the checkpoint of step %d", step)
        validated = metrics_file.validated(config.checkpoint.root, step)
        unvalidated = [name for name in _due(config, data, step) if name not in validated]
        if step >= config.run.total_steps and not unvalidated:
            _logger.info("nothing to do: total_steps is %d", config.run.total_steps)
            return Finished(step, None)
    ledger.restored(step)
    batches = data.train_from(position)
    log = MetricsLog.for_run(
        config, step=step, n_devices=n_devices, device_kind=device_kind, pod=pod
    )
    with contextlib.closing(batches), log:
        signals.watch()
        return _Training(session, config, data, batches, log, ledger, step, unvalidated).run(
            signals
        )


def _due(config: Config, data: Data, step: int) -> list[str]:
    """Name the validation sets that are scored after a step."""
    due = step == config.run.total_steps or step % config.run.val_every == 0
    return list(data.validation) if due else []


class _Training:
    """Training under way: which step it is at, and what of it is logged, validated and saved."""

    def __init__(
        self,
        session: Session,
        config: Config,
        data: Data,
        batches: TokenBatches,
        log: MetricsLog,
        ledger: goodput.Ledger,
        step: int,
        unvalidated: list[str],
    ) -> None:
        self._session = session
        self._config = config
        self._data = data
        self._batches = batches
        self._log = log
        self._ledger = ledger
        self._step = self._saved = step
        self._unvalidated = unvalidated
        self._in_flight: collections.deque[tuple[int, Metrics]] = collections.deque()

    def run(self, signals: StopSignals) -> Finished:
        """Take, log, validate and save steps until the last one, or the one a signal ends."""
        total_steps = self._config.run.total_steps
        self._validate(signals)
        self._ledger.now(goodput.COMPILING)
        while self._step < total_steps and not signals.received:
            self._step += 1
            lengths = self._config.lengths
            if lengths.begins(self._step):  # and compiles: in time of its own
                self._log_steps()
                self._ledger.now(goodput.COMPILING)
            n_tokens = self._config.model.encoder_seq + lengths.at(self._step) + 1
            metrics = self._session.train(next(self._batches)[..., :n_tokens])
            self._in_flight.append((self._step, metrics))
            self._unvalidated = _due(self._config, self._data, self._step)
            self._validate(signals)
            last = self._step == total_steps
            if last or self._step % self._config.checkpoint.ckpt_every == 0:
                self._save()
            self._log_steps(but=_IN_FLIGHT)
        if self._saved < self._step:
            self._save()
        complete = self._step >= total_steps and not self._unvalidated
        return Finished(self._step, None if complete else signals.received)

    def _validate(self, signals: StopSignals) -> None:
        """Score the sets that are due, until a signal comes."""
        if not self._unvalidated:
            return
        self._log_steps()
        with self._log.paused(), self._ledger.during(goodput.VALIDATING):
            while self._unvalidated and self._score(self._unvalidated[0], signals):
                self._unvalidated = self._unvalidated[1:]

    def _score(self, name: str, signals: StopSignals) -> bool:
        """Score the first `val_batches` batches of a validation set, and log the means.

        Returns:
            Whether that is done; a signal ends it before the next batch, and nothing is logged.
        """
        lengths_V = byte_lengths(self._data.tokenizer)
        batches, n_batches = self._data.validation[name], self._config.run.val_batches
        nats, n_correct, n_tokens, n_bytes = 0.0, 0, 0, 0
        for tokens_BT1, mask_BT in itertools.islice(batches, n_batches):
            if signals.received:
                return False
            seen = self._session.evaluate(tokens_BT1, mask_BT)
            nats += float(seen.loss_BT.sum(dtype=np.float64))
            n_correct += int(seen.correct_BT.sum())
            n_tokens += int(mask_BT.sum())
            if lengths_V is not None:
                seen_ids = tokens_BT1[:, -mask_BT.shape[1] :][mask_BT]
                n_bytes += int(lengths_V[seen_ids[seen_ids < len(lengths_V)]].sum())
        bytes_per_token = n_bytes / n_tokens if n_bytes else None
        accuracy = n_correct / n_tokens
        self._log.validation(self._step, name, nats / n_tokens, accuracy, bytes_per_token)
        return True

    def _save(self) -> None:
        """Save the step that was taken last; its log first, so that a checkpoint never lacks it."""
        self._log_steps()
        with self._log.paused(), self._ledger.during(goodput.SAVING):
            self._log.flush()
            self._session.save(self._step, self._batches.position.to_json())
        self._saved = self._step

    def _log_steps(self, but: int = 0) -> None:
        """Wait for the metrics of all steps `but` the last few, and log them."""
        while len(self._in_flight) > but:
            step, arrays = self._in_flight.popleft()
            with memory_for("a step"):
                metrics = {name: float(value) for name, value in arrays.items()}
            self._ledger.step(step)
            self._log.train(step, metrics)
            if self._config.run.stop_on_nan:
                _check_finite(step, metrics, self._config.optimizer.lr)


def _check_finite(step: int, metrics: Metrics, lr: float) -> None:
    """Raise if a step has spoilt the weights, or has seen that an earlier one has."""
    spoilt = [name for name in ("loss", "grad_norm") if not math.isfinite(metrics[name])]
    if spoilt:
        raise TrainingError(
            f"step {step}: {spoilt[0]} is {metrics[spoilt[0]]}; lower lr (now {lr}) or raise "
            "warmup_steps and go on from the last checkpoint by running this again, or set "
            "stop_on_nan to false to train on regardless"
        )
