"""Settings in TOML files: presets by name, files that override each other, and writing settings as TOML."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

from glf_fast import models, settings
from glf_fast.errors import UserError, did_you_mean
from glf_fast.training.config import Config, default, scalars, tables, with_table

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

__all__ = ["load", "preset_path", "presets", "to_toml"]

_FOLDER = Path(__file__).parent.parent / "presets"
# The table whose settings hold for every parameter group; in the same file, the table of a single group wins.
_FOR_ALL = "optimizer"


def presets() -> tuple[str, ...]:
    """Names of the presets."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.toml")))


def preset_path(name: str) -> Path:
    """The file of a preset; raises UserError, with the nearest name, if the preset does not exist."""
    if name not in presets():
        raise UserError(f"no preset {name!r}; {did_you_mean(name, presets())}the presets are {', '.join(presets())}")
    return _FOLDER / f"{name}.toml"


def load(*files: Path, model: str = "", shared: Sequence[Path] = ()) -> Config:
    """The default settings, overridden by these TOML files from left to right.

    Args:
        model: name of the model; by default the last name in the files, or the first of `models.names()`.
        shared: files for several models, which `files` override. Tables that only other models have are left out.

    Raises:
        UserError: a file that is missing, is not TOML, or holds an unknown key or a value of the wrong type; an unknown model.
    """
    contents = {str(file): _read(file) for file in (*shared, *files)}
    for where, content in contents.items() if not model else ():
        chosen = settings.as_table(content.get("model", {}), where, "model")
        if "name" in chosen:
            model = settings.converted(chosen["name"], str, where, "model.name")
            try:
                models.kind(model)
            except UserError as error:
                raise UserError(f"{where}: {error}") from error
    config = default(model or models.names()[0])
    for where, content in contents.items():
        config = _updated(config, content, where, shared=where in map(str, shared))
    return replace(config, model=replace(config.model, name=model or models.names()[0]))


def to_toml(config: Config) -> str:
    """TOML that `load` turns into the same configuration. Settings that have no effect or are None are left out."""
    lines = [f"{key} = {_toml(value)}" for key, value in scalars(config).items()]
    for name, content in tables(config).items():
        lines += ["", f"[{name}]"]
        values = {key: value for key, value in content.effective().items() if not isinstance(value, settings.Settings)}
        lines += [f"{key} = {_toml(value)}" for key, value in values.items() if value is not None]
    return "\n".join(lines) + "\n"


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8-sig"))  # editors of Windows begin files with a mark
    except FileNotFoundError as error:
        raise UserError(f"no config file {file}; use --preset to choose a preset by name") from error
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{file} cannot be read as TOML ({error}); correct the file") from error


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    # JSON writes strings, booleans and finite numbers as TOML does, but for one control character.
    return json.dumps(value, ensure_ascii=False, allow_nan=False).replace("\x7f", "\\u007f")


def _updated(config: Config, content: Mapping[str, Any], where: str, *, shared: bool) -> Config:
    """`config` with the entries of a file, which may be `shared` by models; errors name the file and the dotted key."""
    kinds, for_model = get_type_hints(Config), f"{where} (for model {config.model.name!r})"
    if _FOR_ALL in content:
        table = settings.as_table(content[_FOR_ALL], where, _FOR_ALL)
        updated = {
            group: settings.updated(optimizer, table, where, f"{_FOR_ALL}.")
            for group, optimizer in config.optimizers.items()
        }
        config = replace(config, optimizers=updated)
    for key, value in content.items():
        if key in tables(config):
            table = settings.as_table(value, where, key)
            of_model = key == "model" or key in settings.tables(config.model)
            place = for_model if of_model else where
            changed = settings.updated(tables(config)[key], table, place, f"{key}.", nested=False)
            config = with_table(config, key, changed)
        elif key in scalars(config):
            config = replace(config, **{key: settings.converted(value, kinds[key], where, key)})
        elif key != _FOR_ALL:
            owners = [name for name in models.names() if key in tables(default(name))]
            if shared and owners:
                continue
            known = [*scalars(config), *tables(config), _FOR_ALL]
            error = settings.unknown(key, known, for_model)
            raise UserError(f"{error}; it belongs to model {' or '.join(owners)}") if owners else error
    return config
