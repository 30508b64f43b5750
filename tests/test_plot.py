"""The loss curve: what is drawn, and one sentence where there is nothing to draw."""

import pathlib

import numpy as np
import pytest
from matplotlib.lines import Line2D

from mesh_transformer import metrics_file, plot, storage
from mesh_transformer.errors import UserError


def step_line(step: int, loss: float = 2.0) -> metrics_file.Line:
    return {
        "step": step,
        "train/loss": loss,
        "train/learning_rate": 1e-3,
        "tokens_processed": 100 * step,
    }


RUN = [
    *(step_line(step, 3 - step / 100) for step in range(1, 101)),
    {"step": 50, "val/loss_pile": 2.6, "val/accuracy_pile": 0.4, "val/bits_per_byte_pile": 0.9},
    {"step": 100, "val/loss_pile": 2.2, "val/accuracy_pile": 0.5, "val/bits_per_byte_pile": 0.8},
    {"step": 100, "val/loss_code": 1.2, "val/accuracy_code": 0.5},
]


def points(line: Line2D) -> list[tuple[float, float]]:
    return [(x, y) for x, y in np.asarray(line.get_xydata()).tolist()]


def test_training_validation_and_learning_rate_are_drawn_over_their_steps() -> None:
    losses, rates = plot.draw(RUN, "run", "title").axes
    drawn = {str(line.get_label()): line for line in losses.lines}
    assert [*drawn] == [
        "training, each step",
        "training, smoothed: 2.005",
        "validation code: 1.200",
        "validation pile: 2.200 (0.800 bits/byte)",
    ]
    validation = drawn["validation pile: 2.200 (0.800 bits/byte)"]
    assert points(validation) == [(50, 2.6), (100, 2.2)]
    assert points(drawn["training, each step"])[::99] == [(1, 2.99), (100, 2.0)]
    assert losses.get_ylabel() == "loss (nats/token)"
    assert rates.get_xlabel() == "optimizer step"
    assert points(rates.lines[0]) == [(step, 1e-3) for step in range(1, 101)]


def test_tokens_stand_on_top_where_every_step_took_equally_many() -> None:
    [tokens] = plot.draw(RUN, "run", "title").axes[0].child_axes
    assert tokens.get_xlabel() == "tokens"


def test_tokens_are_left_out_where_the_batch_changed_on_the_way() -> None:
    changed = [step_line(1), {**step_line(2), "tokens_processed": 900}]
    assert plot.draw(changed, "run", "title").axes[0].child_axes == []


STARTS = {
    "png": b"\x89PNG",
    "svg": b"<?xml",
    "pdf": b"%PDF",
    "eps": b"%!PS",
    "jpg": b"\xff\xd8",
    "webp": b"RIFF",
}


@pytest.mark.parametrize("format_", plot.FORMATS)
def test_the_ending_of_the_output_chooses_its_format_and_the_output_is_named(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], format_: str
) -> None:
    _write(tmp_path, RUN)
    output = tmp_path / f"loss.{format_}"
    assert plot.main([str(tmp_path), "--output", str(output)]) == 0
    assert output.read_bytes().startswith(STARTS[format_])
    assert capsys.readouterr().out == f"The loss curve is in {output}\n"


def test_another_ending_is_refused_with_those_there_are(tmp_path: pathlib.Path) -> None:
    _write(tmp_path, RUN)
    with pytest.raises(UserError, match=r"loss\.foo: .* one of \.png, \.svg, \.pdf"):
        plot.main([str(tmp_path), "--output", str(tmp_path / "loss.foo")])
    assert not (tmp_path / "loss.foo").exists()


@pytest.mark.parametrize("name", ["loss", "loss.PNG"])
def test_an_output_without_an_ending_is_a_png_and_capitals_are_no_matter(
    tmp_path: pathlib.Path, name: str
) -> None:
    _write(tmp_path, RUN)
    plot.plot(str(tmp_path), str(tmp_path / name))
    assert (tmp_path / name).read_bytes().startswith(STARTS["png"])


def test_a_run_of_one_step_can_be_drawn(tmp_path: pathlib.Path) -> None:
    _write(tmp_path, [step_line(1)])
    plot.plot(str(tmp_path / metrics_file.NAME), str(tmp_path / "loss.png"))
    assert (tmp_path / "loss.png").exists()


def test_a_loss_that_is_not_finite_leaves_a_gap_and_not_an_error(tmp_path: pathlib.Path) -> None:
    _write(tmp_path, [step_line(1), step_line(2, float("nan")), step_line(3, float("inf"))])
    plot.plot(str(tmp_path), str(tmp_path / "loss.png"))
    assert (tmp_path / "loss.png").exists()


def test_smoothing_averages_over_a_fiftieth_and_keeps_level_and_slope_at_the_start() -> None:
    noise = np.random.default_rng(0).normal(size=1000)
    assert plot.smoothed(noise)[50:-50].std() < 0.3
    np.testing.assert_allclose(plot.smoothed(np.arange(1000.0))[:500], np.arange(500.0))
    np.testing.assert_allclose(plot.smoothed(np.full(1000, 2.5)), 2.5)


def test_smoothing_leaves_out_what_is_not_finite() -> None:
    values = np.full(500, 2.0)
    values[100], values[200] = np.nan, np.inf
    np.testing.assert_allclose(plot.smoothed(values), 2.0)
    assert np.isnan(plot.smoothed(np.array([np.nan]))).all()


@pytest.mark.parametrize(
    ("lines", "message"), [(None, "there is no metrics.jsonl"), ([], "no optimizer step in it")]
)
def test_nothing_to_plot_is_the_users_error(
    tmp_path: pathlib.Path, lines: list[metrics_file.Line] | None, message: str
) -> None:
    if lines is not None:
        _write(tmp_path, lines)
    with pytest.raises(UserError, match=message) as found:
        plot.main([str(tmp_path), "--output", str(tmp_path / "loss.png")])
    assert str(tmp_path) in str(found.value)
    assert not (tmp_path / "loss.png").exists()


def _write(folder: pathlib.Path, lines: list[metrics_file.Line]) -> None:
    file = metrics_file.MetricsFile(storage.join(str(folder), metrics_file.NAME))
    for line in lines:
        file.write(line)
    file.close()
