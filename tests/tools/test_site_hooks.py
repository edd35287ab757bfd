"""The documentation's hooks: the check of links, the links to files outside of docs/, notebooks as pages."""

import importlib
import logging
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

GOOD = """<h1 id="top">A</h1><a href="#top">x</a><a href="b/index.html#there">x</a><a href="b/">x</a>
<a href="https://arxiv.org/abs/1905.10485">x</a><img src="data:image/png;base64,AA=="><link rel="canonical" href="https://a.org">"""


@pytest.fixture
def hooks() -> ModuleType:
    return importlib.import_module("site_hooks")


@pytest.mark.parametrize(
    ("page", "complaint"),
    [
        (GOOD, ""),
        ('<a href="b/index.html#nowhere">x</a>', "b/index.html#nowhere: no such anchor"),
        ('<a href="#nowhere">x</a>', "#nowhere: no such anchor"),
        ('<a href="c.html">x</a>', "c.html: no such file"),
        ('<img src="missing.png">', "missing.png: no such file"),
        ('<script src="https://example.org/a.js"></script>', "loaded from the network"),
        ('<link rel="stylesheet" href="https://example.org/a.css">', "loaded from the network"),
        ('<a href="http://example.org">x</a>', "no https address"),
        ('<a href="https://example">x</a>', "no https address"),
    ],
)
def test_links_are_checked(
    page: str, complaint: str, hooks: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "index.html").write_text('<p id="there"></p><a href="/a.html">x</a>')
    (tmp_path / "a.html").write_text(page)
    with caplog.at_level(logging.WARNING):
        hooks.on_post_build(SimpleNamespace(site_dir=str(tmp_path)))
    assert [complaint in record.getMessage() for record in caplog.records] == [True] * bool(complaint)


def test_style_sheets_load_nothing(hooks: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.css").write_text("@font-face { src: url(https://fonts.example.org/a.woff2) }")
    with caplog.at_level(logging.WARNING):
        hooks.on_post_build(SimpleNamespace(site_dir=str(tmp_path)))
    assert "a.css loads a file from the network" in caplog.text


class Pages:
    """The files of the site."""

    def get_file_from_path(self, uri: str) -> str | None:
        return uri if uri in ("drop-in.md", "images/samples.png", "coming-from/zuko.md") else None


@pytest.mark.parametrize(
    ("uri", "link", "expected"),
    [
        ("drop-in.md", "images/samples.png", "images/samples.png"),
        ("drop-in.md", "../README.md#licence", "repository/README.md#licence"),
        ("drop-in.md", "../examples", "repository/examples/index.md"),
        ("coming-from/zuko.md", "../../examples/glow.py", "../repository/examples/glow.py.md"),
        ("repository/README.md", "docs/drop-in.md", "../drop-in.md"),
        ("repository/README.md", "kernels/README.md", "kernels/README.md"),
        ("repository/examples/index.md", "glow.py", "glow.py.md"),
        ("drop-in.md", "#splines", "#splines"),
        ("drop-in.md", "https://arxiv.org/abs/1905.10485", "https://arxiv.org/abs/1905.10485"),
    ],
)
def test_links_out_of_the_folder_lead_to_pages(uri: str, link: str, expected: str, hooks: ModuleType) -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri=uri))
    text = "A [link]({}).\n\n```python\na[0]({})\n```\n"
    shown = hooks.on_page_markdown(text.format(link, link), page, None, Pages())
    assert shown == text.format(expected, link)


def test_notebooks_are_pages(hooks: ModuleType) -> None:
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "text"]},
        {
            "cell_type": "code",
            "source": ["print(1)"],
            "outputs": [
                {"output_type": "stream", "text": ["1\n"]},
                {"output_type": "display_data", "data": {"image/png": "AA==\n", "text/plain": ["<Figure>"]}},
            ],
        },
    ]
    shown = hooks.notebook({"cells": cells})
    assert shown.startswith("# Title\ntext\n\n~~~~python\nprint(1)\n~~~~")
    assert "~~~~text\n1\n" in shown and "![](data:image/png;base64,AA==)" in shown and "<Figure>" not in shown
