"""Command lines from dataclasses by tyro, with one-line errors."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import shutil
import sys
from collections.abc import Sequence
from typing import Any, TypeVar, get_args

import torch
import tyro

from glf_fast import distributed
from glf_fast.errors import UserError, did_you_mean
from glf_fast.settings import check_integers

__all__ = ["parse", "pick_device"]

C = TypeVar("C")


def parse(
    kind: type[C],
    arguments: Sequence[str],
    module: str,
    default: Any = tyro.MISSING_NONPROP,
    description: str | None = None,
) -> C:
    """The arguments of `python -m {module}` as `kind`: a dataclass, or a union of several, which are sub-commands.

    `description` is the text above the options in the help, by default the docstring of the dataclass.

    Raises:
        UserError: an unknown option (the message has the nearest one), a missing or a wrong value.
        SystemExit: after --help.
    """
    program = f"python -m {module}"
    commands = [
        rule.name for one in get_args(kind) for rule in getattr(one, "__metadata__", ()) if hasattr(rule, "name")
    ]
    if commands and (not arguments or (arguments[0] not in commands and not arguments[0].startswith("-"))):
        given = f"there is no command {arguments[0]!r}; {did_you_mean(arguments[0], commands)}" if arguments else ""
        raise UserError(f"{given}the commands are {', '.join(commands)}; {program} --help explains them")
    # tyro never returns from drawing its boxes into fewer columns than they need.
    os.environ["COLUMNS"] = str(max(40, shutil.get_terminal_size().columns))
    options: dict[str, Any] = {"prog": program, "default": default, "description": description}
    errors = io.StringIO()
    try:
        # tyro's errors come in a box of many lines; its help is coloured on a terminal, which `Output` would not let through.
        terminal = getattr(sys.stdout, "stream", sys.stdout)
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(terminal):
            command, unknown = tyro.cli(kind, args=arguments, return_unknown_args=True, **options)
    except SystemExit as stop:
        if not stop.code:
            raise
        unknown = []
    else:
        if not unknown:
            check_integers(command)
            return command

    help_text = io.StringIO()
    subcommand = [word for word in arguments[:1] if not word.startswith("-")]  # or a file's name, which does no harm
    with (
        contextlib.redirect_stdout(help_text),
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.suppress(SystemExit),
    ):
        tyro.cli(kind, args=[*subcommand, "--help"], **options)
    known = set(re.findall(r"--\w[\w.-]*", help_text.getvalue()))
    # An unknown option first: tyro also takes it for the value of an argument, and misses another.
    words = [word.split("=")[0] for word in arguments if word.startswith("--")] if known else []
    for word in [word for word in words if word.replace("_", "-") not in known] + unknown:
        hint = did_you_mean(word, sorted(known)).rstrip() or f"{program} --help lists all options"
        raise UserError(f"{'unknown option' if word.startswith('-') else 'unexpected argument'} {word}; {hint}")
    text = _one_line(errors.getvalue())
    raise UserError(f"{text}{_as_list(text, arguments)}; {program} --help explains the options")


def _one_line(box: str) -> str:
    """The first paragraph of tyro's error box, and the form of the option that the paragraph is about.

    Paragraphs are separated by lines of ─. For an output that is not UTF-8, tyro draws them with hyphens, puts such a line
    under the title, too, and leaves the sides of the box out.
    """
    rows = [row.strip("│ ") for row in box.splitlines()[1:-1]]
    line = re.compile("─{3,}|-{3,}").fullmatch
    paragraph = itertools.takewhile(lambda row: not line(row), itertools.dropwhile(line, rows))
    form = re.search(r"Argument helptext: +(--\S+ \S+)", " ".join(rows))
    text = " ".join(" ".join(paragraph).split()).rstrip(".")
    if missing := re.match(r"Missing from (.+?): ", text):  # each argument with its help, which ends in (required)
        names = [part.split()[0] for part in text[missing.end() :].split("(required)") if part.strip()]
        return f"{missing[1]} needs {' and '.join(names)}"
    return text + (f" (wanted: {form[1].replace('[', '')})" if form else "")


def _as_list(error: str, arguments: Sequence[str]) -> str:
    """A hint for the option that the error is about, if its value is a list with commas, as files have it."""
    words = [part for word in arguments for part in (word.split("=", 1) if word.startswith("--") else [word])]
    for option, value in itertools.pairwise(words):
        items = re.findall(r"[^\s,\[\]()]+", value)
        if option.startswith("--") and "," in value and len(items) > 1 and f"{option}:" in error:
            return f"; a list is written with spaces: {option} {' '.join(items)}"
    return ""


def pick_device(name: str) -> torch.device:
    """The device called `name`; for "" the GPU if there is one, else the CPU. Of several processes each has a GPU of its own.

    Raises:
        UserError: the device does not exist, or holds no values, like meta, or several processes would share it.
    """
    if not name:
        name = "cuda" if torch.cuda.is_available() else "cpu"
        return distributed.own_device() if name == "cuda" and distributed.size() > 1 else torch.device(name)
    try:
        device = torch.device(name)
        if distributed.size() > 1 and device.type == "cuda":
            if ":" in name:
                raise RuntimeError("each process has a GPU of its own, by its number")
            device = distributed.own_device()
        if device.type == "cpu" and device.index:
            raise RuntimeError("the CPU is one device, cpu")  # torch takes any number
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise UserError(
            f"cannot use --device {name!r} ({reason}); without --device the GPU is used if there is one, else the CPU"
        ) from error
    return device
