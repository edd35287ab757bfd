"""Errors that users meet: one line that names what is wrong and the remedy."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn

__all__ = ["UserError", "did_you_mean", "run_command"]


class UserError(ValueError):
    """A mistake in the user's input (name, path, file, configuration).

    The message is complete in one line: what is wrong, with the given value, and what to do about it.
    """


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ "did you mean 'x'? " for the known word x nearest to a wrong one, "" if none is near."""
    close = difflib.get_close_matches(word, list(known), 1)
    return f"did you mean {close[0]!r}? " if close else ""


def run_command(main: Callable[[], None]) -> NoReturn:
    """Run a command's `main` and exit: 0 when it returns, 2 on the user's or the system's errors, 130 on Ctrl-C.

    Only `UserError` and `OSError` (missing file, disk full) become a one-line message; anything else is a bug in glf_fast and
    keeps its traceback.
    """
    try:
        main()
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)
