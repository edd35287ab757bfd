"""The API as one page of text, docs/llms.txt: the pages in docs/api/ with every docstring written out.

    python tools/llms.py

For language models, and for people who search in one file. A test fails while the file is not what this script writes.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from glf_fast.files import atomic_write

DOCS = Path(__file__).parent.parent / "docs"
OUT = DOCS / "llms.txt"
PAGES = ("flows", "layers", "ops", "other-libraries", "fitting", "models", "metrics", "grammar")
HEAD = """\
# glf_fast

> Fast normalizing flows in PyTorch (fused kernels in C++, Triton and CUDA), conversion of flows of nflows, zuko, normflows,
> FrEIA and pyro, and Generative Latent Flow: generative models trained and scored from the command line.

* `forward` is data → noise, `inverse` is noise → data; both return (output, logdet), logdet (B,) of the direction applied.
* Vectors are (B, D), images (B, C, H, W), a context is (B, C). log_prob is in nats, (B,).
* Commands: `python -m glf_fast.train | sample | evaluate | compare | explore | fit | info | push | data | metrics`,
  each with `--help`.
"""
DIRECTIVE = re.compile(r"^::: (\S+)\n(?:    options: \{members: (false)\}\n)?", re.MULTILINE)
LINK = re.compile(r"\[([^\]]+)\]\([^)]+\)")


def text() -> str:
    """The content of docs/llms.txt."""
    pages = [(DOCS / "api" / f"{page}.md").read_text(encoding="utf-8") for page in PAGES]
    shown = [DIRECTIVE.sub(lambda found: _entry(found[1], members=not found[2]), page) for page in pages]
    return "\n".join([HEAD, *(LINK.sub(r"\1", re.sub("^#", "##", page, flags=re.MULTILINE)) for page in shown)])


def names() -> list[str]:
    """The full names of all that the pages describe."""
    pages = [(DOCS / "api" / f"{page}.md").read_text(encoding="utf-8") for page in PAGES]
    return [found[1] for page in pages for found in DIRECTIVE.finditer(page)]


def found(name: str) -> Any:
    """The object with a full name, such as glf_fast.ops.spline."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def _entry(name: str, *, members: bool) -> str:
    thing = found(name)
    lines = [f"### {name}{_signature(thing)}", "", inspect.getdoc(thing) or ""]
    if inspect.isclass(thing) and members:
        for method, member in _methods(thing):
            lines += ["", f"#### {method}{_signature(member)}", "", inspect.getdoc(member) or ""]
    return "\n".join(lines) + "\n"


def _signature(thing: Any) -> str:
    if isinstance(thing, property) or (inspect.isclass(thing) and issubclass(thing, Exception)):
        return ""
    signature = inspect.signature(thing)
    plain = [p.replace(annotation=_plain(p.annotation)) for p in signature.parameters.values()]
    return str(signature.replace(parameters=plain, return_annotation=_plain(signature.return_annotation)))


class _Plain(str):
    """Text that stands in a signature without quotes."""

    __slots__ = ()
    __repr__ = str.__str__


def _plain(annotation: Any) -> Any:
    """Annotations are strings where `annotations` comes from __future__."""
    return _Plain(annotation) if isinstance(annotation, str) else annotation


def _methods(thing: type) -> Iterator[tuple[str, Any]]:
    """The class's own public methods and properties that have a docstring, in the order of the source."""
    for name, member in vars(thing).items():
        member = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        if (
            not name.startswith("_")
            and not name.endswith(("_extra_state", "extra_repr"))
            and (inspect.isfunction(member) or isinstance(member, property))
            and member.__doc__
        ):
            yield name, member


if __name__ == "__main__":
    with atomic_write(OUT) as path:
        path.write_text(text(), encoding="utf-8")
