"""What went wrong on the user's side, and how a command says so."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(ValueError):
    """The user can mend it; the message says how, and no traceback is needed to see it."""


def run_command(main: Callable[[], int]) -> None:
    """Run a command and exit with its status; a `UserError` is one message, and status 1."""
    try:
        status = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 1
    sys.exit(status)
