"""Docstrings for the site's API pages: the project's plain text in the form that Markdown and Google's style want."""

from __future__ import annotations

import re
from typing import Any

import griffe

NAMES = re.compile(r"^( +)((?:\*{0,2}\w+, )+\*{0,2}\w+):(?= )(.*(?:\n\1 +.*)*)", re.MULTILINE)
# A line of an Args, Returns or Raises section with several names: "dim: D.    blocks: number of couplings."
SHARED = re.compile(r"^ {4}\w+: .*\. +\w+: .*$", re.MULTILINE)
# Names with their meanings, indented below the meaning of an argument and behind an empty line: a list inside of the list.
NAME = r"^( {8})(\w+): "
SETTINGS = re.compile(r"(?<=\n\n)(?= {8}\w+: )(?: {8,}\S.*(?:\n|\Z))+")


class PlainText(griffe.Extension):
    """Rewrites docstrings before they are parsed; the code itself keeps them as they are."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(docstring: str) -> str:
    """The docstring with sections that griffe knows, one name an argument, and no accidental emphasis."""
    text = re.sub(r"^Example:$", "Examples:", docstring, flags=re.MULTILINE)
    text = NAMES.sub(lambda match: "\n".join(f"{match[1]}{name}:{match[3]}" for name in match[2].split(", ")), text)
    text = SHARED.sub(lambda match: re.sub(r"(?<=\.) +(?=\w+: )", "\n    ", match[0]), text)
    text = SETTINGS.sub(lambda match: re.sub(NAME, r"\1- `\2`: ", match[0], flags=re.MULTILINE), text)
    text = re.sub(
        r"^\|.*", lambda match: re.sub(r"log\|(det \w+)\|", r"log\\|\1\\|", match[0]), text, flags=re.MULTILINE
    )
    # A star before a name is Python's *arguments, unless another one closes an emphasis.
    return re.sub(r"(?<=[\w,(] )\*(?=\w)(?![\w ]+\*)|(?<=\()\*(?=\w)", r"\\*", text)
