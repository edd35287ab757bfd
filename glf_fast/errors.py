"""Errors that users meet: one line that names what is wrong and the remedy."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn

from glf_fast.output import Output, one_line

__all__ = ["UserError", "check_text", "did_you_mean", "lacks_memory", "run_command"]


_LONGEST = 1200  # characters of an error


class UserError(ValueError):
    """A mistake in the user's input (name, path, file, configuration).

    The message is complete in one line: what is wrong, with the given value, and what to do about it.
    """


def check_text(option: str, value: str) -> None:
    """Raise UserError for a path that is not UTF-8, in which Python holds the wrong bytes as halves of characters."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{option} {value!r} is not UTF-8, so that files cannot hold it; choose another name or path"
        ) from error


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ "did you mean 'x'? " for the known word x nearest to a wrong one, "" if none is near."""
    # Without the hyphens of options, which would make --n similar to --json.
    bare = {name.lstrip("-"): name for name in known}
    close = difflib.get_close_matches(word.lstrip("-"), list(bare), 1)
    return f"did you mean {bare[close[0]]!r}? " if close else ""


def run_command(main: Callable[[], None]) -> NoReturn:
    """Run a command's `main` and exit: 0 when it returns, 2 on the user's or the system's errors, 130 on Ctrl-C.

    `UserError`, `OSError` (missing file, disk full) and a lack of memory become a one-line message; anything else is a bug in
    glf_fast and keeps its traceback. Characters that the terminal's encoding lacks are replaced. A reader of stderr that goes
    away ends nothing; one of stdout (`… | head -1`) ends the command quietly.
    """
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr, may_vanish=True)
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nothing is left to flush at exit
        sys.exit(128 + 13)  # as a process that SIGPIPE ended
    except (UserError, OSError) as error:
        print(f"error: {_shortened(one_line(str(error)))}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        remedy = "make the model, the batch or the number of images smaller"
        print(f"error: there is not enough memory for this ({_asked_for(error)}); {remedy}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def _shortened(line: str) -> str:
    """A line of bearable length: values that it quotes may come from a damaged file."""
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST * 2 // 3]} … {line[-_LONGEST // 3 :]}"


def lacks_memory(error: BaseException) -> bool:
    """Whether an error is Python's, torch's allocator's or a GPU's lack of memory."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "alloc_cpu" in str(error)


def _asked_for(error: BaseException) -> str:
    """How much memory was asked for, in the words of the allocator."""
    found = re.search(r"allocate [\d.,]+ ?\w+", str(error))
    return found[0] if found else type(error).__name__
