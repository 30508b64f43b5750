"""What a person sees: a bar on a terminal, lines elsewhere, and the terminal back at the end."""

import io

import pytest

from mesh_transformer import progress
from mesh_transformer.progress import PodStatus, Status

KNOWN = Status(
    loss=2.34567, learning_rate=1.2e-4, tokens_per_second=12345, mfu=0.4512, eta_seconds=3725.4
)
FIRST = Status(loss=10.8, learning_rate=0.0, tokens_per_second=None, mfu=None, eta_seconds=None)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_status_reads_as_one_line_and_leaves_out_what_is_not_known() -> None:
    assert str(KNOWN) == "loss 2.3457  12.3k tok/s  lr 1.2e-04  MFU 45.1%  ETA 1:02:05"
    assert str(FIRST) == "loss 10.8000  lr 0.0e+00"
    pod = PodStatus(hosts=4, restarts=1, goodput=0.8123)
    assert str(KNOWN._replace(pod=pod)) == f"{KNOWN}  hosts 4  restarts 1  goodput 81.2%"


def test_a_narrow_terminal_shows_all_of_a_pod(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    terminal, alone = Terminal(), KNOWN._replace(mfu=None)
    bar = progress.for_stream(520, stream=terminal)
    bar.show(41, alone._replace(pod=PodStatus(hosts=4, restarts=1, goodput=0.8123)))
    bar.close()
    shown = terminal.getvalue()
    assert "41/520" in shown and str(alone) in shown
    assert "hosts 4  restarts 1  goodput 81.2%" in shown


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        (9.876, "9.88"),
        (987.6, "988"),
        (999.9, "1.00k"),
        (0.0, "0.00"),
        (99.96, "100"),
        (2e9, "2000M"),
        (45_678, "45.7k"),
        (1_234_567, "1.23M"),
    ],
)
def test_rates_are_short(rate: float, text: str) -> None:
    assert f" {text} tok/s" in str(KNOWN._replace(tokens_per_second=rate))


def test_lines_come_ten_seconds_apart_with_the_first_and_the_last_step() -> None:
    stream, clock = io.StringIO(), Clock()
    lines = progress.Lines(100, stream, clock)
    for step in range(1, 101):
        lines.show(step, FIRST)
        clock.now += 0.25
    shown = [line.split()[1] for line in stream.getvalue().splitlines()]
    assert shown == ["1/100", "41/100", "81/100", "100/100"]


def test_messages_are_whole_lines_at_once_and_the_stream_stays_open() -> None:
    stream = io.StringIO()
    lines = progress.for_stream(100, stream=stream)
    lines.say("validated " * 30)
    assert stream.getvalue() == "validated " * 30 + "\n"
    lines.close()
    assert not stream.closed


def test_output_that_is_not_a_terminal_has_no_control_characters() -> None:
    stream = io.StringIO()
    lines = progress.for_stream(10, stream=stream)
    lines.show(1, KNOWN)
    lines.close()
    assert stream.getvalue().isprintable() or stream.getvalue()[:-1].isprintable()


def test_a_terminal_gets_a_bar_and_its_cursor_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    terminal = Terminal()
    bar = progress.for_stream(100, 40, stream=terminal)
    assert "\x1b[?25l" in terminal.getvalue()
    bar.say("step 40  pile: [loss] 2.0 " + "long " * 40)
    bar.show(41, KNOWN)
    bar.close()
    shown = terminal.getvalue()
    assert "pile: [loss] 2.0 " + "long " * 40 in shown
    assert "41/100" in shown
    assert str(KNOWN) in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")


def test_a_stage_on_a_terminal_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    terminal = Terminal()
    with progress.stage("Writing", 4, terminal) as advance:
        advance(4)
    shown = terminal.getvalue()
    assert "Writing" in shown and "100%" in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")


def test_a_stage_elsewhere_is_a_line_each_ten_seconds_and_one_at_its_end() -> None:
    stream, clock = io.StringIO(), Clock()
    with progress.stage("Writing", 200, stream, clock) as advance:
        for _ in range(100):
            clock.now += 0.25
            advance(2)
    assert stream.getvalue() == "Writing: 40%\nWriting: 80%\nWriting: done in 25.0 s\n"


def test_standard_output_is_where_progress_goes(capsys: pytest.CaptureFixture[str]) -> None:
    progress.for_stream(10).say("hello")
    assert capsys.readouterr().out == "hello\n"
