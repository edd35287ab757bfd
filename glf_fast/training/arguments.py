"""The settings of a run from the command line: a preset, overridden by files, overridden by options of the chosen model."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import tyro

from glf_fast import settings
from glf_fast.command_line import parse
from glf_fast.errors import UserError
from glf_fast.training.config import Config, OptimizerConfig, check, scalars, tables, with_table
from glf_fast.training.config_files import load, preset_path

__all__ = ["TrainCommand", "parse_train"]

_DEFAULT_PRESET = "quick"


@dataclass(frozen=True)
class TrainCommand:
    """Train a generative model. Running the same command again resumes the run.

    Settings come from a preset, then from files, then from the command line; later settings win. --help lists the settings of
    the chosen model (--model.name, or the model of the preset).
    """

    config: Config
    preset: str = ""
    """Name of a preset; by default quick, if no file is given either. A wrong name lists all presets."""
    files: Annotated[tyro.conf.UseAppendAction[tuple[Path, ...]], tyro.conf.arg(name="config", metavar="FILE")] = ()
    """TOML file with settings; may be given several times."""
    print_config: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print the resulting settings as TOML and stop."""
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False
    """Take two steps and print shapes, parameters and memory, without writing anything."""
    out: Path | None = None
    """The run's folder; by default runs/ and a name made from the settings."""
    data_dir: Path | None = None
    """Folder in which to look for the data set first."""
    device: str = ""
    """Device: cpu, cuda, cuda:1, …; by default cuda if there is a GPU."""
    local_batch_norm: tyro.conf.FlagCreatePairsOff[bool] = False
    """Under torchrun: batch norms of each process use its own part of a batch, which saves communication; by default they use
    the whole batch, as one process does. A resumed run must keep it."""
    base: tyro.conf.Suppress[Config] = Config()  # noqa: RUF009 - frozen
    """The settings from preset and files, without options."""
    label: tyro.conf.Suppress[str] = ""
    """The name of the last file, of the preset or of the model, with which the name of the folder begins."""


def parse_train(arguments: Sequence[str]) -> TrainCommand:
    """The train command with resolved and checked settings.

    Raises:
        UserError: a mistake in options, files or values.
    """
    # The model and the files decide which options there are and their defaults, so model and files are parsed first.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--preset", default="")
    first.add_argument("--config", action="append", type=Path, default=[])
    first.add_argument("--model.name", dest="model", default="")
    try:
        chosen, _ = first.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise UserError(f"{error.argument_name}: {error.message}") from error
    files = ([preset_path(chosen.preset)] if chosen.preset else []) + chosen.config
    label = files[-1].stem if files else _DEFAULT_PRESET
    if not files:
        files = [preset_path(_DEFAULT_PRESET)]
        if (
            chosen.model and chosen.model != load(*files).model.name
        ):  # of which a preset for another model knows nothing
            files, label = [], chosen.model
    base = load(*files, model=chosen.model)
    command, for_all = _parse(arguments, base)
    if for_all:
        # Options of one group win over options for all groups, so the latter become defaults in a second parse.
        groups = {name: replace(optimizer, **for_all) for name, optimizer in base.optimizers.items()}
        command, _ = _parse(arguments, replace(base, optimizers=groups))
    check(command.config)
    # The base has the model of the files, so that another --model.name appears in the name of the folder.
    return replace(command, base=load(*files, model="" if files else chosen.model), label=label)


def _parse(arguments: Sequence[str], base: Config) -> tuple[TrainCommand, dict[str, Any]]:
    """The command, and the given options for the optimizers of all groups.

    There is an option for each setting of `base` outside tables, and a group of options for each table.
    """
    own, shown = settings.tables(base.model), tables(base)
    if own:  # they stand beside [model], not in it
        hidden = [(name, tyro.conf.Suppress[type(table)], table) for name, table in own.items()]  # type: ignore[misc]
        shown["model"] = _subclass(type(base.model), hidden)(**vars(base.model))
    fields: list[Any] = [(name, type(table), table) for name, table in shown.items() if name not in vars(base)]
    fields += [
        ("model", type(shown["model"]), shown["model"]),
        ("optimizers", tyro.conf.Suppress[Any], field(default_factory=dict)),  # type: ignore[misc]
    ]
    options = _subclass(Config, fields)
    kinds = get_type_hints(OptimizerConfig)
    unset = _subclass(
        OptimizerConfig, [(f.name, kinds[f.name] | None, None) for f in dataclasses.fields(OptimizerConfig)]
    )
    unset.__doc__ = "The optimizers of all parameter groups; options of a single group win over these options."
    kind = _subclass(
        TrainCommand, [("config", Annotated[options, tyro.conf.arg(name="")]), ("optimizer", unset, unset())]
    )
    default = kind(config=options(**{**vars(base), "model": shown["model"]}))
    command: Any = parse(kind, arguments, "glf_fast.train", default=default)
    config = replace(base, **{name: getattr(command.config, name) for name in scalars(base)})
    for name, table in tables(base).items():
        values = {f.name: getattr(getattr(command.config, name), f.name) for f in dataclasses.fields(table)}
        if name == "model":
            values |= {key: getattr(config.model, key) for key in own}
        config = with_table(config, name, replace(table, **values))
    given = {f.name: getattr(command, f.name) for f in dataclasses.fields(TrainCommand)}
    for_all = {name: value for name, value in vars(command.optimizer).items() if value is not None}
    return TrainCommand(**{**given, "config": config}), for_all


def _subclass(base: type, fields: list[Any]) -> Any:
    """A dataclass like `base` with these fields changed or added; help texts are inherited."""
    kind = make_dataclass(base.__name__, fields, bases=(base,), frozen=True)
    kind.__doc__ = base.__doc__
    return kind
