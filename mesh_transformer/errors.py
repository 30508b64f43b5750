"""What went wrong on the user's side, and how a command says so."""

from __future__ import annotations

import logging
import signal
import sys
import warnings
from collections.abc import Callable
from typing import NoReturn


class UserError(ValueError):
    """The user can mend it; the message says how, and no traceback is needed to see it."""


class InUse(UserError):
    """Another process has what this one needs; the user can end it, or it may end by itself."""


def run_command(main: Callable[[], int], *, when_interrupted: str = "") -> NoReturn:
    """Run a command and exit with its status.

    A `UserError`, or an `OSError` such as a full disk, is one message and status 1; Ctrl-C is one
    message and status 130. None of them shows a traceback. What this library logs goes to standard
    error, as do warnings, and what others log from warnings on.

    Args:
        main: Returns the exit status.
        when_interrupted: What a user who pressed Ctrl-C should know.
    """
    logging.basicConfig(
        level=logging.WARNING, format="%(message)s", handlers=[_Notices()], force=True
    )
    logging.getLogger("mesh_transformer").setLevel(logging.INFO)
    warnings.formatwarning = _in_one_line
    try:
        status = main()
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # waiting for threads can be interrupted too
        if sys.stdout.isatty():
            sys.stdout.write("\x1b[?25h")  # shows the cursor, which a progress bar hides
        sys.stderr.write(f"\nStopped. {when_interrupted}".rstrip() + "\n")
        status = 128 + signal.SIGINT
    sys.exit(status)


class _Notices(logging.Handler):
    """Writes to what standard error is at the time: a progress bar stands in for it for a while."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.name != "absl"  # through it Orbax logs at length what it also raises

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(self.format(record) + "\n")


def _in_one_line(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    return f"warning: {message}\n"
