"""Imported for its effect: tyro's command lines without the work that it repeats, half of their time.

tyro forgets after each command line what it has read in the sources of classes. Here it remembers.
"""

from typing import Any

from tyro._docstrings import _ClassTokenization as Tokens

_read = Tokens.make.__wrapped__
_found: dict[tuple[str, str], Any] = {}  # by module and name, as a source is looked for


def _remembered(kind: type) -> Any:
    key = kind.__module__, kind.__qualname__
    if key not in _found:
        try:
            _found[key] = _read(kind)
        except (OSError, TypeError) as error:  # no source
            _found[key] = error
    if isinstance(_found[key], Exception):
        raise _found[key]
    return _found[key]


Tokens.make = staticmethod(_remembered)
