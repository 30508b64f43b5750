"""The loss curve of a run, from its metrics file.

python -m mesh_transformer.plot RUN [--output loss.png]
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mesh_transformer import metrics_file, storage
from mesh_transformer.errors import UserError, run_command

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RAW, SMOOTH, RATE = "#9db8d9", "#1f4e8c", "#555555"
VALIDATION = ("#d1495b", "#2e8b57", "#e09f3e", "#7b4fa3", "#0f7173", "#8c564b")
WINDOW_SHARE = 50
"""The smoothed curve averages over windows of one such part of the run."""
FORMATS = ("png", "svg", "pdf", "eps", "jpg", "webp")


class NothingToPlotError(UserError):
    """Raised when a metrics file is not there or has no optimizer step in it."""


def plot(source: str, output: str, title: str | None = None) -> None:
    """Draw training loss, validation losses and learning rate over optimizer steps.

    Args:
        source: A metrics file, or the folder of a run; local or remote.
        output: Image file to write; its ending chooses one of `FORMATS`, png if it has none.
        title: Left out, one with the name of the run's folder.

    Raises:
        NothingToPlotError: There is no metrics file, or no step in it.
        UserError: The output's ending is not a format.
    """
    format_ = os.path.splitext(output)[1].removeprefix(".").lower() or FORMATS[0]
    if format_ not in FORMATS:
        endings = ", ".join(f".{known}" for known in FORMATS)
        raise UserError(f"{output}: an image ends in one of {endings}")
    try:
        lines = metrics_file.read(source)
    except FileNotFoundError as error:
        raise NothingToPlotError(
            f"{source}: there is no {metrics_file.NAME}; give a run's folder or its metrics file"
        ) from error
    figure = draw(lines, source, title or f"{_run_name(source)}: training and validation loss")
    image = io.BytesIO()
    figure.savefig(image, format=format_)
    storage.write_bytes_atomically(output, image.getvalue())


def draw(lines: Sequence[metrics_file.Line], source: str, title: str) -> Figure:
    """Draw the figure of a metrics file's lines; `source` is named if there is nothing to draw."""
    from matplotlib.figure import Figure

    trained = [line for line in lines if "train/loss" in line]
    if not trained:
        raise NothingToPlotError(f"{source}: there is no optimizer step in it yet")
    figure = Figure(figsize=(10, 6.5), dpi=150, layout="constrained")
    loss_axes, rate_axes = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": (4, 1)})
    _draw_losses(loss_axes, trained, lines)
    _draw_learning_rate(rate_axes, trained)
    figure.align_ylabels()
    figure.suptitle(title, fontsize=14, fontweight="bold", x=0.01, ha="left")
    return figure


def smoothed(values: np.ndarray) -> np.ndarray:
    """Average over a centred window of a fiftieth of the series; NaN values are left out.

    The window narrows towards the start, where losses fall steeply and half a window would be off
    to one side; towards the end, where they are level but noisy, only its right half is cut.
    """
    index = np.arange(len(values))
    half = np.minimum(len(values) // WINDOW_SHARE // 2, index)
    low, high = index - half, np.minimum(index + half, len(values) - 1) + 1
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    count = counts[high] - counts[low]
    return np.where(count, (sums[high] - sums[low]) / np.maximum(count, 1), np.nan)


def _draw_losses(
    axes: Axes, trained: Sequence[metrics_file.Line], lines: Sequence[metrics_file.Line]
) -> None:
    steps = _column(trained, "step")
    losses = _column(trained, "train/loss")
    trend = smoothed(losses)
    axes.plot(steps, losses, color=RAW, linewidth=0.8, alpha=0.7, label="training, each step")
    axes.plot(
        steps,
        trend,
        color=SMOOTH,
        linewidth=2,
        marker="o" if len(steps) == 1 else None,
        label=f"training, smoothed: {trend[-1]:.3f}",
    )
    names = sorted(
        {key.removeprefix("val/loss_") for line in lines for key in line if "val/loss_" in key}
    )
    for index, name in enumerate(names):
        of_set = [line for line in lines if f"val/loss_{name}" in line]
        axes.plot(
            _column(of_set, "step"),
            _column(of_set, f"val/loss_{name}"),
            color=VALIDATION[index % len(VALIDATION)],
            marker="o",
            markersize=5,
            linewidth=1.2,
            label=_validation_label(name, of_set[-1]),
        )
    axes.set_ylabel("loss (nats/token)", fontsize=12)
    axes.legend(fontsize=11, frameon=False)
    _tidy(axes)
    _add_token_axis(axes, trained)


def _validation_label(name: str, last: metrics_file.Line) -> str:
    label = f"validation {name}: {last[f'val/loss_{name}']:.3f}"
    bits = last.get(f"val/bits_per_byte_{name}")
    return label if bits is None else f"{label} ({bits:.3f} bits/byte)"


def _draw_learning_rate(axes: Axes, trained: Sequence[metrics_file.Line]) -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axes.plot(
        _column(trained, "step"),
        _column(trained, "train/learning_rate"),
        color=RATE,
        linewidth=1.6,
    )
    axes.set_ylabel("learning rate", fontsize=12)
    axes.set_xlabel("optimizer step", fontsize=12)
    axes.set_ylim(bottom=0)
    axes.set_xlim(trained[0]["step"] - 1, trained[-1]["step"] * 1.01)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    _tidy(axes)


def _add_token_axis(axes: Axes, trained: Sequence[metrics_file.Line]) -> None:
    """Put tokens along the top, where each step took equally many."""
    from matplotlib.ticker import EngFormatter

    steps, tokens = _column(trained, "step"), _column(trained, "tokens_processed")
    per_step = tokens[-1] / steps[-1]
    if not np.allclose(tokens, steps * per_step):
        return
    top = axes.secondary_xaxis(
        "top", functions=(lambda step: step * per_step, lambda token: token / per_step)
    )
    top.xaxis.set_major_formatter(EngFormatter(sep=""))
    top.set_xlabel("tokens", fontsize=12)
    top.spines["top"].set_visible(False)
    top.tick_params(labelsize=11)


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=11)


def _column(lines: Sequence[metrics_file.Line], key: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([line[key] for line in lines], np.float64)


def _run_name(source: str) -> str:
    folder = source if not source.endswith(".jsonl") else os.path.dirname(source)
    return os.path.basename(os.path.abspath(folder))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m mesh_transformer.plot",
        description="Draw training loss, validation losses and learning rate of a run.",
    )
    parser.add_argument("source", metavar="RUN", help="a run's folder or its metrics.jsonl")
    parser.add_argument(
        "--output", default="loss.png", help="image to write (default: %(default)s)"
    )
    parser.add_argument("--title", help="default: names the run's folder")
    given = parser.parse_args(arguments)
    plot(given.source, given.output, given.title)
    sys.stdout.write(f"The loss curve is in {given.output}\n")
    return 0


if __name__ == "__main__":
    run_command(main)
