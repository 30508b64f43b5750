"""A command ends in the status and the lines that tell a user what to do."""

from __future__ import annotations

import logging
import signal
import warnings
from collections.abc import Callable, Iterator

import pytest

from mesh_transformer.config import ConfigWarning
from mesh_transformer.errors import UserError, run_command


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put back what a command sets for its whole process."""
    handlers = logging.root.handlers[:]
    levels = {name: logging.getLogger(name).level for name in ("root", "mesh_transformer")}
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    interrupted = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, interrupted)
    logging.root.handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def ended(main: Callable[[], int], **options: str) -> str | int | None:
    with pytest.raises(SystemExit) as exit_:
        run_command(main, **options)
    return exit_.value.code


def raising(error: BaseException) -> Callable[[], int]:
    def main() -> int:
        raise error

    return main


def test_the_status_is_what_the_command_returns() -> None:
    assert ended(lambda: 143) == 143


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (UserError("lower lr"), "error: lower lr"),
        (PermissionError(13, "Permission denied", "runs"), "error: [Errno 13] Permission denied"),
    ],
)
def test_what_a_user_can_mend_is_one_message(error: Exception, told: str) -> None:
    """`sys.exit` with a text prints it to standard error and makes the status 1."""
    code = ended(raising(error))
    assert isinstance(code, str) and code.startswith(told)


def test_any_other_error_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command(raising(ZeroDivisionError()))


def test_ctrl_c_is_one_line_that_says_how_to_go_on(capfd: pytest.CaptureFixture[str]) -> None:
    assert ended(raising(KeyboardInterrupt()), when_interrupted="Run it again.") == 130
    assert capfd.readouterr().err == "\nStopped. Run it again.\n"


def test_only_this_library_may_chat_and_a_warning_is_one_line(
    capfd: pytest.CaptureFixture[str],
) -> None:
    def main() -> int:
        logging.getLogger("mesh_transformer.training.loop").info("going on")
        logging.getLogger("absl").info("Created BasePyTreeCheckpointHandler")
        logging.getLogger("absl").error("[process=0][thread=async_save] Failed to run 2 Handlers")
        logging.getLogger("jax").info("chatter")
        logging.getLogger("jax").warning("a GPU may be present")
        return 0

    assert ended(main) == 0
    assert capfd.readouterr().err == "going on\na GPU may be present\n"
    line = warnings.formatwarning(ConfigWarning("tiny.json: n"), ConfigWarning, "config.py", 1)
    assert line == "warning: tiny.json: n\n"
