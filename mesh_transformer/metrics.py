"""The metrics of a training run: to its file, to a person, to trackers.

But for timing, a run that was killed and resumed logs the lines of one that was not, to the bit.
For that, a loop logs step s and its validations, and flushes, before it saves checkpoint s; what a
signal has cut off of a validation is made up for when the run goes on:

    with MetricsLog.for_run(config, step=restored.step, n_devices=8, device_kind="TPU v3") as log:
        for step in range(restored.step + 1, total_steps + 1):
            log.train(step, session.train(next(batches)))
            with log.paused():
                log.validation(step, "pile", loss, accuracy, bytes_per_token)
                log.flush()
                session.save(step, batches.position)
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

from mesh_transformer import metrics_file, noise_scale, progress, storage, throughput, trackers
from mesh_transformer.config import Config
from mesh_transformer.sections import Lengths
from mesh_transformer.session import Metrics

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchSizes:
    """What one optimizer step takes in.

    Attributes:
        sequences: Sequences in the whole batch: microbatches x replicas x sequences of each.
        micro_sequences: Sequences behind one microbatch gradient of one replica.
        lengths: Tokens that each step trains on in a sequence.
    """

    sequences: int
    micro_sequences: int
    lengths: Lengths

    def tokens(self, step: int) -> int:
        """Return the tokens that an optimizer step trains on."""
        return self.sequences * self.lengths.at(step)

    def tokens_through(self, step: int) -> int:
        """Return the tokens that steps 1 to `step` train on."""
        return self.sequences * self.lengths.through(step)


class MetricsLog:
    """Writes the metrics of a run to its file, to the console and to trackers.

    A context manager; leaving it, by Ctrl-C too, closes the file and gives the terminal back.

    Args:
        root: The run's folder, local or remote.
        total_steps: Where the run will end.
        batch: What one step takes in.
        step: The step that was restored. Lines of later steps are dropped, as those steps will be
            taken again; 0 begins a new log.
        noise_scale_alpha: Weight of the newest estimate in the running noise scale.
        flops_per_token: As `throughput.train_flops_per_token` counts, of sequences of a length;
            None leaves MFU unknown.
        peak_flops_per_second: Of all devices together; None leaves MFU unknown.
        sinks: Started trackers, closed with the log.
        shown: Shows the run to a person; by default a bar on a terminal, lines elsewhere.
        pod: Tells how the hosts stand, to log and show that too.
        clock: Seconds that only go forward.
    """

    def __init__(
        self,
        root: str,
        *,
        total_steps: int,
        batch: BatchSizes,
        step: int = 0,
        noise_scale_alpha: float = 0.01,
        flops_per_token: Callable[[int], float] | None = None,
        peak_flops_per_second: float | None = None,
        sinks: Sequence[trackers.Tracker] = (),
        shown: progress.Progress | None = None,
        pod: Callable[[], progress.PodStatus] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._step = step
        self._total_steps = total_steps
        self._batch = batch
        self._flops_per_token = flops_per_token
        self._peak_flops_per_second = peak_flops_per_second
        self._sinks = sinks
        self._pod = pod
        self._pace = throughput.Pace(clock)
        self._noise = noise_scale.RunningAverage(alpha=noise_scale_alpha)
        with contextlib.ExitStack() as opened:
            for sink in sinks:
                opened.callback(sink.close)
            path = storage.join(root, metrics_file.NAME)
            self._go_on_from(path, metrics_file.drop_after(path, step))
            self._file = metrics_file.MetricsFile(path)
            opened.callback(self._file.close)
            self._progress = shown or progress.for_stream(total_steps, step)
            opened.callback(self._progress.close)
            self._opened = opened.pop_all()

    @classmethod
    def for_run(
        cls,
        config: Config,
        *,
        step: int,
        n_devices: int,
        device_kind: str,
        pod: Callable[[], progress.PodStatus] | None = None,
    ) -> MetricsLog:
        """Open the log of a configured run, and start the trackers that it asks for.

        Args:
            config: The run.
            step: The step that was restored; 0 begins a new log.
            n_devices: Devices that the run trains on.
            device_kind: Their `jax.Device.device_kind`, for their peak.
            pod: As above.

        Raises:
            trackers.TrackerError: A tracker cannot start.
            storage.StorageError: The run's folder cannot be reached.
        """
        peak = throughput.peak_flops_per_device(device_kind)
        return cls(
            config.checkpoint.root,
            total_steps=config.run.total_steps,
            batch=BatchSizes(
                sequences=config.sequences_per_step(n_devices),
                micro_sequences=_micro_sequences(config, n_devices),
                lengths=config.lengths,
            ),
            step=step,
            noise_scale_alpha=config.run.noise_scale_alpha,
            flops_per_token=functools.partial(throughput.train_flops_per_token, config.model),
            peak_flops_per_second=None if peak is None else n_devices * peak,
            sinks=trackers.start(config, step),
            pod=pod,
        )

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def train(self, step: int, metrics: Metrics) -> None:
        """Log an optimizer step, when its metrics are there.

        Args:
            step: One more than the last.
            metrics: What `Session.train` gave: loss, last_loss, grad_norm, micro_grad_norm, lr.

        Raises:
            ValueError: A step was left out or comes twice.
        """
        if step != self._step + 1:
            raise ValueError(f"metrics of step {step} follow those of step {self._step}")
        self._step = step
        self._sequences += self._batch.sequences
        tokens = self._batch.tokens(step)
        self._tokens += tokens
        seconds = self._pace.tick(tokens, compiled=self._batch.lengths.begins(step))
        rate = tokens / seconds if seconds else None
        pod = self._pod() if self._pod else None
        self._write(
            {
                "step": step,
                "train/loss": float(metrics["loss"]),
                "train/last_loss": float(metrics["last_loss"]),
                "train/grad_norm": float(metrics["grad_norm"]),
                "train/micro_grad_norm": float(metrics["micro_grad_norm"]),
                "train/learning_rate": float(metrics["lr"]),
                "sequences_processed": self._sequences,
                "tokens_processed": self._tokens,
                **self._noise_fields(metrics),
                "train/step_seconds": seconds,
                "train/tokens_per_sec": rate,
                "train/mfu": self._mfu(rate),
                **({f"pod/{name}": value for name, value in pod._asdict().items()} if pod else {}),
            }
        )
        self._show(metrics, pod)

    def validation(
        self,
        step: int,
        name: str,
        loss: float,
        accuracy: float,
        bytes_per_token: float | None = None,
    ) -> None:
        """Log a validation, and show it.

        Args:
            step: Optimizer steps taken so far.
            name: Of the validation set.
            loss: Mean over tokens, in nats per token.
            accuracy: Share of tokens that greedy decoding would have given.
            bytes_per_token: Mean UTF-8 bytes of a token of this set, for bits per byte.
        """
        fields = {f"val/loss_{name}": float(loss), f"val/accuracy_{name}": float(accuracy)}
        message = f"step {step}  {name}: loss {loss:.4f} nats/token, accuracy {accuracy:.1%}"
        if bytes_per_token is not None:
            bits_per_byte = float(loss) / math.log(2) / bytes_per_token
            fields[f"val/bits_per_byte_{name}"] = bits_per_byte
            message += f", {bits_per_byte:.4f} bits/byte"
        self._write({"step": step, **fields})
        self._progress.say(message)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of the `with` block out of step times: validation, saving, waiting."""
        with self._pace.paused():
            yield

    def flush(self) -> None:
        """Make all lines so far durable, in the bucket for a remote run; call it before saving."""
        self._file.flush()
        for sink in self._sinks:
            sink.flush()

    def close(self) -> None:
        """Flush and close everything; a second call does nothing."""
        self._opened.close()

    def _go_on_from(self, path: str, lines: Sequence[metrics_file.Line]) -> None:
        """Take up counts and noise averages where the lines up to the restored step leave them."""
        steps = [line for line in lines if "train/loss" in line]
        last = steps[-1] if steps else {"step": 0, "sequences_processed": 0, "tokens_processed": 0}
        missing = self._step - last["step"]
        if missing:
            _logger.warning("%s lacks steps %d to %d", path, last["step"] + 1, self._step)
        self._sequences = last["sequences_processed"] + missing * self._batch.sequences
        tokens = self._batch.tokens_through(self._step) - self._batch.tokens_through(last["step"])
        self._tokens = last["tokens_processed"] + tokens
        for line in steps:
            self._take_noise(line["noise/G_noise"], line["noise/S_noise"])

    def _write(self, line: metrics_file.Line) -> None:
        self._file.write(line)
        scalars = {name: value for name, value in line.items() if value is not None}
        step = scalars.pop("step")
        for sink in self._sinks:
            sink.write(step, scalars)

    def _noise_fields(self, metrics: Metrics) -> dict[str, Any]:
        new = noise_scale.estimate(
            micro_grad_norm=float(metrics["micro_grad_norm"]),
            grad_norm=float(metrics["grad_norm"]),
            micro_sequences=self._batch.micro_sequences,
            sequences=self._batch.sequences,
        )
        g_squared, s = new or (None, None)
        self._take_noise(g_squared, s)
        average, b_simple = self._noise.average, self._noise.b_simple
        return {
            "noise/G_noise": g_squared,
            "noise/S_noise": s,
            "noise/G_noise_avg": average and average.g_squared,
            "noise/S_noise_avg": average and average.s,
            "noise/B_simple": b_simple,
            "noise/B_simple_tokens": b_simple and b_simple * self._batch.lengths.at(self._step),
        }

    def _take_noise(self, g_squared: float | None, s: float | None) -> None:
        if g_squared is not None and s is not None:
            self._noise = self._noise.updated(noise_scale.Estimate(g_squared, s))

    def _mfu(self, tokens_per_second: float | None) -> float | None:
        if tokens_per_second is None or self._flops_per_token is None:
            return None
        flops = self._flops_per_token(self._batch.lengths.at(self._step))
        return throughput.mfu(tokens_per_second, flops, self._peak_flops_per_second)

    def _show(self, metrics: Metrics, pod: progress.PodStatus | None) -> None:
        seconds = self._pace.recent_seconds
        rate = self._batch.tokens(self._step) / seconds if seconds else None
        wall = self._pace.wall_seconds  # of a token
        left = self._batch.tokens_through(self._total_steps)
        left -= self._batch.tokens_through(self._step)
        status = progress.Status(
            loss=float(metrics["loss"]),
            learning_rate=float(metrics["lr"]),
            tokens_per_second=rate,
            mfu=self._mfu(rate),
            eta_seconds=None if wall is None else wall * left,
            pod=pod,
        )
        self._progress.show(self._step, status)


def _micro_sequences(config: Config, n_devices: int) -> int:
    """Sequences of the microbatches whose gradients' norms `micro_grad_norm` averages.

    From ZeRO stage 3 on, gradients are summed over replicas before anyone sees one replica's.
    """
    if config.mesh.zero_stage == 3:
        return config.global_batch(n_devices)
    return config.batch.per_replica_batch
