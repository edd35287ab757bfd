"""Hooks of the documentation site (mkdocs.yml): pages for linked files outside of docs/, and a check of all links.

The pages in docs/ are plain Markdown whose relative links work where the repository is read, also links to files that are not
part of the site: an example, a result, the README. Each such file becomes a page of the site, `repository/PATH`, and the links
lead there.
"""

from __future__ import annotations

import ast
import html
import json
import logging
import posixpath
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

log = logging.getLogger("mkdocs.plugins.site")  # warnings of mkdocs.* are errors: `strict`

ROOT = Path(__file__).parent.parent
PAGES = "repository"  # folder of the site with the pages of files outside of docs/
LANGUAGES = {".py": "python", ".json": "json", ".toml": "toml", ".sh": "bash", ".h": "cpp", ".cpp": "cpp", ".cu": "cpp"}
FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
OBJECT = re.compile(r"^::: (\S+)$", re.MULTILINE)
LINK = re.compile(r"(?<=\]\()(?!\w+:|#|/)([^)\s#]+)(?=[#)])")


# -- files outside of docs/ ---------------------------------------------------------------------------------------------


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each file that is linked and not yet part of the site, and for each file that these link."""
    from mkdocs.structure.files import File, InclusionLevel  # so that the link check needs no mkdocs

    queue = [(f"docs/{file.src_uri}", file.content_string) for file in files.documentation_pages()]
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for uri in re.findall(rf"{PAGES}/\S+\.md$", navigation, re.MULTILINE):
        queue.append(("mkdocs.yml", f"[]({_path(uri).removesuffix('/index')})"))
    while queue:
        source, text = queue.pop()
        for target in _targets(source, text):
            uri = _uri(target, files)
            if files.get_file_from_path(uri) is None and (ROOT / target).exists():
                content = _page(ROOT / target)
                files.append(File.generated(config, uri, content=content, inclusion=InclusionLevel.NOT_IN_NAV))
                queue.append((_path(uri), content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links relative to a file of the repository into links relative to its page of the site."""
    uri = page.file.src_uri
    source = _path(uri)

    def rewritten(match: re.Match[str]) -> str:
        target = _resolved(source, match[1])
        return posixpath.relpath(_uri(target, files), posixpath.dirname(uri) or ".")

    text = "".join(part if code else LINK.sub(rewritten, part) for part, code in _parts(markdown))
    return OBJECT.sub(lambda match: _directive(match[1]), text)


def _directive(name: str) -> str:
    """The line that asks mkdocstrings for a public name; as _defined says, perhaps under another path."""
    path = _defined(name)
    options = f"{{heading: {name}, toc_label: {name.rpartition('.')[2]}}}"
    return f"::: {name}" if path == name else f"::: {path}\n    options: {options}"


def _defined(name: str) -> str:
    """The path of a public name, or, where a folder or file has this name, too, and would be found, that of its definition."""
    package, _, attribute = name.rpartition(".")
    folder = ROOT / package.replace(".", "/")
    if (folder / attribute).is_dir() or (folder / f"{attribute}.py").is_file():
        for node in ast.walk(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and attribute in {alias.name for alias in node.names}:
                return f"{node.module}.{attribute}"
    return name


def _uri(target: str, files: Files) -> str:
    """The name in the site of a file of the repository."""
    inside = target.removeprefix("docs/")
    if inside != target and files.get_file_from_path(inside) is not None:
        return inside
    if (ROOT / target).is_dir():
        return f"{PAGES}/{target}/index.md"
    return f"{PAGES}/{target}" if target.endswith(".md") else f"{PAGES}/{target}.md"


def _path(uri: str) -> str:
    """The file of the repository with which a page was made."""
    if not uri.startswith(f"{PAGES}/"):
        return f"docs/{uri}"
    path = uri.removeprefix(f"{PAGES}/")
    return path if (ROOT / path).exists() else path.removesuffix(".md")  # of a folder: FOLDER/index


def _page(path: Path) -> str:
    """The Markdown of a page that shows a file, or lists a folder."""
    name = path.relative_to(ROOT).as_posix()
    if path.is_dir():
        shown = sorted(file for ending in ("*.py", "*.ipynb") for file in path.glob(ending))
        lines = [f"* [{file.name}]({file.name}): {_first_line(file)}" for file in shown]
        return "\n".join([f"# {name}/", "", *lines])
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    if path.suffix == ".ipynb":
        return notebook(json.loads(text))
    return f"# {path.name}\n\n`{name}`\n\n~~~~{LANGUAGES.get(path.suffix, 'text')}\n{text}\n~~~~\n"


def notebook(content: dict[str, Any]) -> str:
    """A Jupyter notebook (format 4) as Markdown, with what its cells printed and drew."""
    parts = []
    for cell in content["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"~~~~python\n{source}\n~~~~")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                parts.append(f"![](data:image/png;base64,{''.join(data['image/png']).strip()})")
            elif text := "".join(output.get("text", data.get("text/plain", ""))):
                parts.append(f"~~~~text\n{text}\n~~~~")
    return "\n\n".join(parts)


def _first_line(path: Path) -> str:
    """The title of a program or a notebook."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = "".join(json.loads(text)["cells"][0]["source"]).removeprefix("# ")
    return text.removeprefix('"""').split("\n", 1)[0].removesuffix('"""')


def _targets(source: str, text: str) -> Iterator[str]:
    for part, code in _parts(text):
        if not code:
            yield from (_resolved(source, link) for link in LINK.findall(part))


def _resolved(source: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), unquote(link)))


def _parts(markdown: str) -> Iterator[tuple[str, bool]]:
    """Pieces of a page in their order, and whether each one is fenced code."""
    at = 0
    for match in FENCE.finditer(markdown):
        yield markdown[at : match.start()], False
        yield match[0], True
        at = match.end()
    yield markdown[at:], False


# -- the links of the built site ----------------------------------------------------------------------------------------


class Links(HTMLParser):
    """Anchors and links of a page, and what it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note one tag's id and what it points to."""
        values = {name: html.unescape(value) for name, value in attrs if value is not None}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if "src" in values:
            self.loaded.append(values["src"])
        if "href" in values:
            (self.loaded if tag == "link" and values.get("rel") != "canonical" else self.links).append(values["href"])


def on_post_build(config: MkDocsConfig) -> None:
    """Warn of links that lead nowhere, and of files that a page would load from the network."""
    site = Path(config.site_dir)
    pages = {path: Links(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    for path, page in pages.items():
        for link in page.links + page.loaded:
            wrong = _wrong(link, path, site, pages, loads=link in page.loaded)
            if wrong:
                log.warning("%s: %s: %s", path.relative_to(site), link, wrong)
    for sheet in site.rglob("*.css"):
        if re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", sheet.read_text(encoding="utf-8")):
            log.warning("%s loads a file from the network", sheet.relative_to(site))


def _wrong(link: str, path: Path, site: Path, pages: dict[Path, Any], *, loads: bool) -> str:
    """The fault of a link, or ""."""
    try:
        parts = urlsplit(link)
    except ValueError as error:
        return str(error)
    if parts.scheme in ("data", "mailto"):
        return ""
    if parts.scheme or parts.netloc:
        if loads:
            return "loaded from the network"
        good = parts.scheme == "https" and re.fullmatch(r"[\w-]+(\.[\w-]+)+", parts.netloc) and " " not in link
        return "" if good else "no https address"
    target = path if not parts.path else _file(unquote(parts.path), path, site)
    if not target.is_file():
        return "no such file"
    if parts.fragment and target.suffix == ".html" and unquote(parts.fragment) not in pages[target].anchors:
        return "no such anchor"
    return ""


def _file(link: str, path: Path, site: Path) -> Path:
    target = site / link[1:] if link.startswith("/") else path.parent / link
    target = Path(posixpath.normpath(target.as_posix()))
    return target / "index.html" if target.is_dir() else target
