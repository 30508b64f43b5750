"""The metrics log of a training run: `metrics.jsonl` in its folder, and what a person sees.

One JSON object per line: one line for each optimizer step, one for each validation.

    {"step": 7, "train/loss": ..., "train/last_loss": ..., "train/grad_norm": ...,
     "train/micro_grad_norm": ..., "train/learning_rate": ...,
     "sequences_processed": ..., "tokens_processed": ...,
     "noise/G_noise": ..., "noise/S_noise": ..., "noise/G_noise_avg": ..., "noise/S_noise_avg": ...,
     "noise/B_simple": ...,
     "train/step_seconds": ..., "train/tokens_per_sec": ..., "train/mfu": ...}
    {"step": 7, "val/loss_pile": ..., "val/accuracy_pile": ..., "val/bits_per_byte_pile": ...}

Losses are in nats per token; noise scales, in sequences, are explained in `noise_scale`, MFU in
`throughput`. null is a value that is not known. NaN and the infinities, which JSON lacks, are the
strings "NaN", "Infinity" and "-Infinity".

Numbers are written in full, so a run that was killed and resumed logs, but for `TIMING`, the lines
of one that was not, to the bit. For that, a loop logs step s and its validations, and flushes,
before it saves checkpoint s:

    with MetricsLog(root, step=restored.step, total_steps=..., batch=BatchSizes(...)) as log:
        for step in range(restored.step + 1, total_steps + 1):
            log.train(step, session.train(next(batches)))
            with log.paused():
                log.validation(step, "pile", loss, accuracy, bytes_per_token)
                log.flush()
                session.save(step, batches.position)
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from mesh_transformer import noise_scale, progress, storage, throughput
from mesh_transformer.session import Metrics
from mesh_transformer.trackers import Tracker

_logger = logging.getLogger(__name__)

FILE_NAME = "metrics.jsonl"
TIMING = ("train/step_seconds", "train/tokens_per_sec", "train/mfu")
"""The fields that differ from one run to its repetition."""

Line = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchSizes:
    """What one optimizer step takes in.

    Attributes:
        sequences: Sequences in the whole batch: microbatches x replicas x sequences of each.
        micro_sequences: Sequences behind one microbatch gradient of one replica.
        tokens_per_sequence: Tokens that are trained on in a sequence.
    """

    sequences: int
    micro_sequences: int
    tokens_per_sequence: int

    @property
    def tokens(self) -> int:
        """Tokens trained on in one optimizer step."""
        return self.sequences * self.tokens_per_sequence


def read(path: str) -> list[Line]:
    """Read a metrics log; a last line that was cut off by a kill is left out.

    Args:
        path: The log, or the folder of the run it is in; local or remote.

    Raises:
        FileNotFoundError: There is no log.
        ValueError: A line before the last is not JSON.
    """
    if not path.endswith(".jsonl"):
        path = storage.join(path, FILE_NAME)
    texts = storage.read_bytes(path).decode("utf-8", errors="replace").splitlines()
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            if number == len(texts):
                break
            raise ValueError(f"{path}: line {number} is not JSON ({error})") from error
        lines.append({key: _number(value) for key, value in line.items()})
    return lines


class MetricsLog:
    """Writes the metrics of a run to its log, to the console and to trackers.

    A context manager; leaving it, by Ctrl-C too, closes the file and gives the terminal back.

    Args:
        root: The run's folder, local or remote. For a remote one the log is written to a local file
            and put in its bucket at each `flush`.
        total_steps: Where the run will end.
        batch: What one step takes in.
        step: The step that was restored. Lines of later steps are dropped, as those steps will be
            taken again; 0 begins a new log.
        noise_scale_alpha: Weight of the newest estimate in the running noise scale.
        flops_per_token: As `throughput.train_flops_per_token` counts; None leaves MFU unknown.
        peak_flops_per_second: Of all devices together; None leaves MFU unknown.
        trackers: Started trackers (`trackers.start`); closed with the log.
        shown: Shows the run to a person; by default a bar on a terminal, lines elsewhere.
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
        flops_per_token: float | None = None,
        peak_flops_per_second: float | None = None,
        trackers: Sequence[Tracker] = (),
        shown: progress.Progress | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._step = step
        self._total_steps = total_steps
        self._batch = batch
        self._flops_per_token = flops_per_token
        self._peak_flops_per_second = peak_flops_per_second
        self._trackers = trackers
        self._pace = _Pace(clock)
        self._closing = contextlib.ExitStack()
        for tracker in trackers:
            self._closing.callback(tracker.close)
        self._noise = noise_scale.RunningAverage(alpha=noise_scale_alpha)
        self._sequences = step * batch.sequences
        self._tokens = step * batch.tokens
        self._open(root, step)
        self._progress = shown or progress.for_stream(total_steps, step)
        self._closing.callback(self._progress.close)

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
        self._tokens += self._batch.tokens
        seconds = self._pace.tick()
        rate = self._batch.tokens / seconds if seconds else None
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
            }
        )
        self._show(metrics)

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

    def record(self, step: int, fields: Mapping[str, float]) -> None:
        """Log any other figures of a step, such as an evaluation task's, under their own names."""
        self._write({"step": step, **{name: float(value) for name, value in fields.items()}})

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of the `with` block out of step times: validation, saving, waiting."""
        with self._pace.paused():
            yield

    def flush(self) -> None:
        """Make all lines so far durable, in the bucket for a remote run; call it before saving."""
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._path != self._local_path:
            storage.write_bytes_atomically(self._path, storage.read_bytes(self._local_path))
        for tracker in self._trackers:
            tracker.flush()

    def close(self) -> None:
        """Flush and close everything; a second call does nothing."""
        self._closing.close()

    def _open(self, root: str, step: int) -> None:
        """Open the log for appending, with only the lines up to the restored step in it."""
        self._path = self._local_path = storage.join(root, FILE_NAME)
        if storage.is_remote(root):
            scratch = tempfile.TemporaryDirectory(prefix="mesh-transformer-")
            self._closing.callback(scratch.cleanup)
            self._local_path = storage.join(scratch.name, FILE_NAME)
        kept = [line for line in _read_if_there(self._path) if step and line["step"] <= step]
        steps = [line for line in kept if "train/loss" in line]
        if steps:
            missing = step - steps[-1]["step"]
            self._sequences = steps[-1]["sequences_processed"] + missing * self._batch.sequences
            self._tokens = steps[-1]["tokens_processed"] + missing * self._batch.tokens
        if step and (not steps or steps[-1]["step"] < step):
            last = steps[-1]["step"] if steps else 0
            _logger.warning("%s lacks steps %d to %d", self._path, last + 1, step)
        for line in steps:
            self._take_noise(line["noise/G_noise"], line["noise/S_noise"])
        storage.write_text_atomically(self._local_path, "".join(map(_json, kept)))
        self._file = self._closing.enter_context(storage.open(self._local_path, "a"))
        self._closing.callback(self.flush)

    def _write(self, line: Line) -> None:
        self._file.write(_json(line))
        self._file.flush()
        scalars = {name: value for name, value in line.items() if value is not None}
        step = scalars.pop("step")
        for tracker in self._trackers:
            tracker.write(step, scalars)

    def _noise_fields(self, metrics: Metrics) -> Line:
        new = noise_scale.estimate(
            micro_grad_norm=float(metrics["micro_grad_norm"]),
            grad_norm=float(metrics["grad_norm"]),
            micro_sequences=self._batch.micro_sequences,
            sequences=self._batch.sequences,
        )
        g_squared, s = new or (None, None)
        self._take_noise(g_squared, s)
        average = self._noise.average
        return {
            "noise/G_noise": g_squared,
            "noise/S_noise": s,
            "noise/G_noise_avg": average and average.g_squared,
            "noise/S_noise_avg": average and average.s,
            "noise/B_simple": self._noise.b_simple,
        }

    def _take_noise(self, g_squared: float | None, s: float | None) -> None:
        if g_squared is not None and s is not None:
            self._noise = self._noise.updated(noise_scale.Estimate(g_squared, s))

    def _mfu(self, tokens_per_second: float | None) -> float | None:
        if tokens_per_second is None or self._flops_per_token is None:
            return None
        return throughput.mfu(tokens_per_second, self._flops_per_token, self._peak_flops_per_second)

    def _show(self, metrics: Metrics) -> None:
        seconds = self._pace.recent_seconds
        rate = self._batch.tokens / seconds if seconds else None
        wall = self._pace.wall_seconds_per_step
        left = self._total_steps - self._step
        status = progress.Status(
            loss=float(metrics["loss"]),
            learning_rate=float(metrics["lr"]),
            tokens_per_second=rate,
            mfu=self._mfu(rate),
            eta_seconds=None if wall is None else wall * left,
        )
        self._progress.show(self._step, status)


class _Pace:
    """Seconds per step. The first step compiles, and starts the clock without being timed."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._first: float | None = None
        self._last = 0.0
        self._steps = 0
        self._recent: collections.deque[float] = collections.deque(maxlen=20)

    def tick(self) -> float | None:
        """Note the end of a step; how long it took, or None for the first."""
        now = self._clock()
        if self._first is None:
            self._first = self._last = now
            return None
        seconds, self._last = now - self._last, now
        self._steps += 1
        self._recent.append(seconds)
        return seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        start = self._clock()
        try:
            yield
        finally:
            self._last += self._clock() - start

    @property
    def recent_seconds(self) -> float | None:
        """Mean of the last 20 steps."""
        return sum(self._recent) / len(self._recent) if self._recent else None

    @property
    def wall_seconds_per_step(self) -> float | None:
        """Mean since the first step, pauses included."""
        if self._first is None or not self._steps:
            return None
        return (self._clock() - self._first) / self._steps


def _read_if_there(path: str) -> list[Line]:
    try:
        return read(path)
    except FileNotFoundError:
        return []


def _json(line: Line) -> str:
    return json.dumps({key: _text(value) for key, value in line.items()}, allow_nan=False) + "\n"


def _text(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _number(value: Any) -> Any:
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value
