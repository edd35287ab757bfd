"""Self-contained HTML pages with curves: one style for all reports, on light and dark screens."""

from __future__ import annotations

import html
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from glf_fast.files import atomic_write

# Imported where something is drawn: that takes a while, and most commands draw nothing, or at their end.
if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["BLUE", "GREY", "ORANGE", "figure", "no_maths", "style", "svg", "write"]

BLUE, ORANGE, GREY = "#4f6fe8", "#e0803a", "#8a8d98"
_TEMPLATE = Path(__file__).with_name("page.html")
# This colour is replaced by the page's text colour, so that curves suit light and dark pages.
_INK = "#010203"
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "glf_fast",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.linewidth": 0.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
}


def write(path: Path, title: str, subtitle: str, body: str) -> None:
    """Write a page, atomically. `title` and `subtitle` are text, `body` is HTML."""
    template = Template(_TEMPLATE.read_text(encoding="utf-8"))
    page = template.substitute(title=html.escape(title), subtitle=html.escape(subtitle), body=body)
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


@contextmanager
def style() -> Iterator[None]:
    """Inside the block, figures are drawn for such pages."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        yield


def figure(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def svg(figure: Figure) -> str:
    """The figure as an element of a page, in the page's text colour."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Glyph .* missing", UserWarning
        )  # text stays text, and browsers have more fonts
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(_INK, "currentColor")


def no_maths(text: str) -> str:
    """Text that matplotlib draws as it is: it takes what is between two dollars for a formula."""
    return text.replace("$", r"\$")
