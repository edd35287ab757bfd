"""Settings in TOML files: presets by name, files laid over each other, settings written back."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from glf_fast.config import Config, FlowConfig, OptimizerConfig, shown
from glf_fast.errors import UserError, did_you_mean

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

__all__ = ["load", "preset_path", "presets", "to_toml"]

_FOLDER = Path(__file__).parent / "presets"


def presets() -> tuple[str, ...]:
    """Names of the presets there are."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.toml")))


def preset_path(name: str) -> Path:
    """A preset's file; raises UserError, with the nearest name, when there is none."""
    if name not in presets():
        raise UserError(f"no preset {name!r}; {did_you_mean(name, presets())}there are {', '.join(presets())}")
    return _FOLDER / f"{name}.toml"


def load(*files: Path) -> Config:
    """The defaults with these TOML files laid over them, left to right.

    Raises:
        UserError: a file that is missing, is not TOML, or holds an unknown key or a value of the wrong type.
    """
    config = Config()
    for file in files:
        try:
            table = tomllib.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UserError(f"no config file {file}; presets are chosen with --preset") from error
        except (ValueError, OSError) as error:
            raise UserError(f"{file} cannot be read as TOML ({error}); correct it") from error
        config = _updated(config, table, str(file))
    return config


def to_toml(config: Config) -> str:
    """TOML that `load` turns into the same configuration. Settings without effect, and None, are left out."""
    lines = [f"{key} = {_toml(value)}" for key, value in vars(config).items() if not dataclasses.is_dataclass(value)]
    for name, table in vars(config).items():
        if dataclasses.is_dataclass(table):
            values = table.settings() if isinstance(table, (FlowConfig, OptimizerConfig)) else vars(table)
            lines += ["", f"[{name}]"]
            lines += [f"{key} = {_toml(value)}" for key, value in values.items() if value is not None]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    # JSON writes strings, booleans and finite numbers as TOML does.
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


T = TypeVar("T")


def _updated(config: T, table: Mapping[str, Any], where: str, prefix: str = "") -> T:
    """`config` with the entries of a TOML table; errors name the file and the dotted key."""
    kinds = get_type_hints(type(config))
    changes = {}
    for key, value in table.items():
        if key not in kinds:
            known = [prefix + name for name in kinds]
            hint = did_you_mean(prefix + key, known) or f"known here: {', '.join(known)}; "
            raise UserError(f"{where} has an unknown key {prefix + key!r}; {hint.rstrip('; ')}")
        current = getattr(config, key)
        if dataclasses.is_dataclass(current):
            if not isinstance(value, dict):
                raise UserError(f"{where}: {prefix + key} = {value!r} must be a table: [{prefix + key}]")
            changes[key] = _updated(current, value, where, f"{prefix}{key}.")
        else:
            try:
                changes[key] = _converted(value, kinds[key])
            except TypeError as error:
                raise UserError(f"{where}: {prefix + key} = {shown(value)} must be {error}") from None
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


def _converted(value: Any, kind: Any) -> Any:
    """A TOML value as `kind`; raises TypeError saying what it must be."""
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise TypeError(f"one of {', '.join(map(shown, get_args(kind)))}")
        return value
    if get_origin(kind) in (Union, types.UnionType):
        (inner,) = (option for option in get_args(kind) if option is not type(None))
        return _converted(value, inner)
    if get_origin(kind) is tuple:
        items = get_args(kind)
        many = items[-1] is Ellipsis
        wanted = f"a list of {_NAMES[items[0]]}" if many else f"a list of {len(items)} numbers"
        if not isinstance(value, list) or not (many or len(value) == len(items)):
            raise TypeError(wanted)
        try:
            return tuple(_converted(item, items[0]) for item in value)
        except TypeError:
            raise TypeError(wanted) from None
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise TypeError({int: "an integer", float: "a number", str: "a string", bool: "true or false"}[kind])
    return value


_NAMES = {int: "integers", float: "numbers", str: "strings"}
