"""Settings: frozen dataclasses whose field docstrings are the help texts, read from tables and checked.

A table is a dictionary of numbers, strings, lists and further tables, as TOML and JSON files hold it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from glf_fast.errors import UserError, check_text, did_you_mean

__all__ = [
    "AT_LEAST_2",
    "NOT_NEGATIVE",
    "POSITIVE",
    "Rule",
    "Settings",
    "as_table",
    "check",
    "check_integers",
    "converted",
    "fits",
    "shown",
    "table",
    "tables",
    "unknown",
    "updated",
]

_INTEGER = "an integer of 64 bits"
# A rule of a field: a function that says whether a value is allowed, and a description of allowed values for messages.
Rule = tuple[Callable[[Any], bool], str]
POSITIVE: Rule = (lambda value: value > 0, "positive")
NOT_NEGATIVE: Rule = (lambda value: value >= 0, "0 or more")
AT_LEAST_2: Rule = (lambda value: value >= 2, "2 or more")


@dataclass(frozen=True)
class Settings:
    """Base class of settings. A field that is itself `Settings` is a table of its own in files and on the command line."""

    RULES: ClassVar[Mapping[str, Rule]] = {}
    """Rules that the types of the fields cannot express, by field."""
    CHOICE: ClassVar[str] = ""
    """Name of the field that decides which other fields have an effect; "" if all fields always have one."""

    def __post_init__(self) -> None:
        """Make Python's own numbers and tuples of what equals them, such as numpy's numbers, which JSON cannot hold."""
        for name, value in vars(self).items():
            object.__setattr__(self, name, _plain(value))

    def effective(self) -> dict[str, Any]:
        """The fields that have an effect, by name, in their order."""
        return dict(vars(self))

    def choice(self, name: str) -> str:
        """The field that decides whether the field `name` has an effect."""
        return self.CHOICE

    def mistake(self) -> str:
        """A message, to be put after a prefix, if several fields do not fit together, else ""."""
        return ""


S = TypeVar("S", bound=Settings)


def tables(settings: Settings) -> dict[str, Settings]:
    """The fields of `settings` that are tables of their own, by name."""
    return {name: value for name, value in vars(settings).items() if isinstance(value, Settings)}


def table(settings: Settings) -> dict[str, Any]:
    """The effective settings as a JSON-ready table that `updated` can read; fields with value None are left out."""
    return {
        name: table(value) if isinstance(value, Settings) else list(value) if isinstance(value, tuple) else value
        for name, value in settings.effective().items()
        if value is not None
    }


def updated(settings: S, values: Mapping[str, Any], where: str, prefix: str = "", *, nested: bool = True) -> S:
    """`settings` with the entries of a table.

    Args:
        where: name of the file (or the like) that holds the table, for errors.
        prefix: text before the keys in errors.
        nested: whether the table also holds the tables of `settings`.

    Raises:
        UserError: an unknown key (the message has the nearest known key), or a value of the wrong type.
    """
    kinds = get_type_hints(type(settings))
    known = [field.name for field in dataclasses.fields(settings)]
    if not nested:
        known = [name for name in known if name not in tables(settings)]
    changes = {}
    for key, value in values.items():
        if key not in known:
            raise unknown(prefix + key, [prefix + name for name in known], where)
        current = getattr(settings, key)
        if isinstance(current, Settings):
            changes[key] = updated(current, as_table(value, where, prefix + key), where, f"{prefix}{key}.")
        else:
            changes[key] = converted(value, kinds[key], where, prefix + key)
    return dataclasses.replace(settings, **changes)


def unknown(key: str, known: list[str], where: str) -> UserError:
    """The error for an unknown key, with the nearest known key."""
    hint = did_you_mean(key, known) or f"known keys: {', '.join(known)}"
    return UserError(f"{where} has an unknown key {key!r}; {hint.rstrip()}")


def as_table(value: Any, where: str, key: str) -> dict[str, Any]:
    """`value` itself; raises UserError if it is not a table."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: {key} = {value!r} must be a table: [{key}]")
    return value


def converted(value: Any, kind: Any, where: str, key: str) -> Any:
    """A value of a table as the type of its field; raises UserError, naming file and key, if it has another type."""
    try:
        return _converted(value, kind)
    except TypeError as error:
        raise UserError(f"{where}: {key} = {_cut(value)} must be {error}") from None


def check(settings: Settings, prefix: str = "", *, nested: bool = True) -> None:
    """Raise UserError for values that are out of range, and for changed settings that have no effect.

    Args:
        prefix: text before the keys in errors.    nested: whether to check the tables of `settings`, too.
    """
    for name, value in vars(settings).items():
        key = prefix + name
        if isinstance(value, str):
            check_text(f"{key} =", value)
        if isinstance(value, Settings):
            if nested:
                check(value, f"{key}.")
        elif not all(map(fits, value if isinstance(value, tuple) else (value,))):
            raise UserError(f"{key} = {_cut(value)} must be {_INTEGER}")
        elif isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{key} = {value} must be finite")
        elif name in settings.RULES and value is not None and not settings.RULES[name][0](value):
            raise UserError(f"{key} = {shown(value)} must be {settings.RULES[name][1]}")
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name not in settings.effective() and value != field.default:
            decides = settings.choice(field.name)
            choice = f"{prefix}{decides} = {shown(getattr(settings, decides))}"
            raise UserError(
                f"{prefix}{field.name} = {shown(value)} has no effect with {choice}; "
                f"set it back to its default, {shown(field.default)}, where it is set (a preset, a file or the command line)"
            )
    if mistake := settings.mistake():
        raise UserError(f"{prefix}{mistake}")


def check_integers(options: Any) -> None:
    """Raise UserError for an integer of more than 64 bits among the options of a command, a dataclass that may be nested."""
    for name, value in vars(options).items():
        if dataclasses.is_dataclass(value):
            check_integers(value)
        elif not all(map(fits, value if isinstance(value, tuple) else (value,))):
            raise UserError(f"--{name.replace('_', '-')} {_cut(value)} must be {_INTEGER}")


def fits(value: Any) -> bool:
    """Whether a value is anything but an integer of more than 64 bits, which neither torch nor a float can hold."""
    return not isinstance(value, int) or -(2**63) <= value < 2**63


def _cut(value: Any) -> str:
    return text if len(text := shown(value)) <= 60 else f"{text[:60]}…"


def shown(value: Any) -> str:
    """A value as the user would write it in a file."""
    return json.dumps(value, default=str, ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(map(_plain, value))
    if isinstance(value, (bool, int, float, str)) or not hasattr(value, "dtype"):
        return float(value) if isinstance(value, float) and type(value) is not float else value
    return value.item()


def _converted(value: Any, kind: Any) -> Any:
    """A value of a table as `kind`; raises TypeError saying what it must be."""
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise TypeError(f"one of {', '.join(map(shown, get_args(kind)))}")
        return value
    if get_origin(kind) in (Union, types.UnionType):
        (inner,) = (option for option in get_args(kind) if option is not type(None))
        return None if value is None else _converted(value, inner)
    if get_origin(kind) is tuple:
        items = get_args(kind)
        many = items[-1] is Ellipsis
        names = {int: "integers", float: "numbers", str: "strings"}
        wanted = f"a list of {names[items[0]]}" if many else f"a list of {len(items)} numbers"
        if not isinstance(value, list) or not (many or len(value) == len(items)):
            raise TypeError(wanted)
        try:
            return tuple(_converted(item, items[0]) for item in value)
        except TypeError:
            raise TypeError(wanted) from None
    if not fits(value):
        raise TypeError(_INTEGER if kind is int else "a number of at most 64 bits")
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise TypeError({int: "an integer", float: "a number", str: "a string", bool: "true or false"}[kind])
    return value
