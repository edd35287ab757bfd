"""Fetching files: places tried in order, downloads, package registries, hashes, and an error that lists all failures."""

from __future__ import annotations

import gzip
import hashlib
import html
import http.client
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import urljoin

from tqdm import tqdm

from glf_fast.errors import UserError
from glf_fast.files import atomic_write, file_digest, one_at_a_time

__all__ = [
    "Attempt",
    "NotFound",
    "Unavailable",
    "check_hash",
    "debian_package",
    "download",
    "first",
    "found_or_fetched",
    "gunzip",
    "python_file",
]

T = TypeVar("T")

# The time-out limits the wait for data, not the whole transfer: a closed network costs seconds, and a slow network is no error.
TIMEOUT_S = 10.0
# … but not for ever: a server that sends less than so many bytes a second, over a minute, is given up.
SLOWEST = 1000


class NotFound(UserError):
    """No place has the file."""


class Unavailable(Exception):
    """A place does not have the file; the message says why. The next place is tried."""


@dataclass(frozen=True)
class Attempt:
    """A place to search: its name for messages, and a function that returns a path or raises `Unavailable`."""

    place: str
    get: Callable[[], Path]


def found_or_fetched(search: Callable[[bool], Path], folder: Path, *, download: bool) -> Path:
    """`search(False)`, a search on this machine; where it finds nothing and `download`, `search(True)`, which fetches files.

    Of several processes, one at a time fetches files to `folder`, and the others find them there.
    """
    try:
        return search(False)
    except NotFound:
        if not download:
            raise
    with one_at_a_time(folder):
        return search(True)


def first(what: str, attempts: Iterable[Attempt], remedy: str) -> Path:
    """The path from the first attempt that succeeds.

    After `Unavailable` or OSError (no network, no permission) the next place is tried. A UserError, such as a corrupt file in
    a folder that the user named, ends the search.

    Raises:
        NotFound: every attempt failed; the message lists all places with their reasons, and the remedy.
    """
    tried = []
    for attempt in attempts:
        try:
            return attempt.get()
        except (Unavailable, OSError) as error:
            tried.append(f"{attempt.place}: {error}")
    raise NotFound(f"{what} could not be found. Tried " + "; ".join(tried) + f". {remedy}")


# -- files and hashes ---------------------------------------------------------------------------------------------------


def check_hash(content: bytes | Path, name: str, **expected: str) -> None:
    """Raise Unavailable unless bytes or a file have the digest given as `sha256="…"` or `md5="…"`."""
    for algorithm, digest in expected.items():
        if isinstance(content, Path):
            found = file_digest(content, algorithm)
        else:
            found = hashlib.new(algorithm, content, usedforsecurity=False).hexdigest()
        if found != digest:
            raise Unavailable(
                f"{name} is not the published file ({algorithm} {found[:12]}… instead of {digest[:12]}…): "
                "truncated, corrupt or another version"
            )


def gunzip(path: Path, limit: int) -> bytes:
    """Uncompressed content of a .gz file; raises Unavailable when it is broken, or has more than `limit` bytes."""
    try:
        with gzip.open(path) as file:
            content = file.read(limit + 1)
    except (EOFError, OSError, zlib.error) as error:
        raise Unavailable(f"{path.name} is truncated or corrupt ({error})") from error
    if len(content) > limit:
        raise Unavailable(f"{path.name} unpacks to more than {limit:,} bytes, the size of the published file")
    return content


def download(url: str, target: Path, check: Callable[[Path], None], *, limit: int) -> Path:
    """Fetch `url` (http, https or file), run `check` on the file, and only then move it to `target`, atomically.

    The content is streamed to disk, so files of any size need little memory.

    Args:
        limit: the most bytes that the file can have; a server that sends more is not listened to any longer.

    Raises:
        Unavailable: the server refused, sent too much or next to nothing for a minute, the connection broke off, or `check`
            refused the content; the message says which.
    """
    request = urllib.request.Request(url, headers={"User-Agent": "glf_fast"})
    # urlopen reads the proxies once in a process: a proxy that has been mended since, or set, would not be seen.
    opener = urllib.request.build_opener()
    try:
        with opener.open(request, timeout=TIMEOUT_S) as response, atomic_write(target) as temporary:
            size, got, started = int(response.headers.get("Content-Length") or 0), 0, time.monotonic()
            with (
                temporary.open("wb") as file,
                tqdm(
                    total=size or None,
                    unit="B",
                    unit_scale=True,
                    desc=target.name,
                    disable=not sys.stderr.isatty(),
                    leave=False,
                ) as progress,
            ):
                while block := response.read(1 << 18):
                    got += file.write(block)
                    progress.update(len(block))
                    if got > limit:
                        raise Unavailable(f"sends more than {limit:,} bytes, the most that the file can have")
                    seconds = time.monotonic() - started
                    if seconds > 60 and got < SLOWEST * seconds:
                        raise Unavailable(f"sent {got:,} bytes in {seconds:.0f} seconds, which is too slow")
            if size and got != size:
                raise Unavailable(f"the connection broke off after {got:,} of {size:,} bytes")
            check(temporary)
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        raise Unavailable(str(getattr(error, "reason", None) or error)) from error
    return target


# -- package registries, through their own clients --------------------------------------------------------------------


def _run(command: list[str], cwd: Path) -> str:
    """Output of the command; raises Unavailable with the last line of the output when the command fails."""
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL, env={**os.environ, "LC_ALL": "C"}
    )
    if done.returncode:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise Unavailable(f"{Path(command[0]).name} failed: {lines[-1].strip() if lines else done.returncode}")
    return done.stdout


@contextmanager
def debian_package(name: str) -> Iterator[Path]:
    """The unpacked files of a Debian package in a temporary folder; works without root and without package lists.

    apt-get uses temporary folders for its lists and its cache, so the folders of the system are neither needed nor changed.
    """
    apt, dpkg = shutil.which("apt-get"), shutil.which("dpkg-deb")
    if not apt or not dpkg:
        raise Unavailable("apt-get and dpkg-deb are not on this machine")
    with tempfile.TemporaryDirectory(prefix="glf_fast-apt-") as folder:
        root = Path(folder)
        (root / "lists" / "partial").mkdir(parents=True)
        (root / "cache" / "archives" / "partial").mkdir(parents=True)
        options = [
            *("-o", f"Dir::State::Lists={root}/lists"),
            *("-o", f"Dir::Cache={root}/cache"),
            *("-o", "APT::Sandbox::User="),  # as root, apt would download as a user who may not write to this folder
            *("-o", "Debug::NoLocking=1"),  # the locks guard the system's folders, which are not used
            *("-o", "Acquire::Languages=none"),
            *("-o", f"Acquire::http::Timeout={TIMEOUT_S:.0f}"),
        ]
        _run([apt, *options, "--quiet", "update"], root)
        _run([apt, *options, "--quiet", "download", name], root)
        packages = list(root.glob("*.deb"))
        if len(packages) != 1:
            raise Unavailable(f"apt-get downloaded no package {name}")
        _run([dpkg, "--extract", str(packages[0]), str(root / "files")], root)
        yield root / "files"


@contextmanager
def python_file(project: str, name: str, sha256: str, *, limit: int) -> Iterator[Path]:
    """A file of a Python package from its index, in a temporary folder.

    pip itself would run the setup.py of a source archive, before anyone has looked at the archive's hash.
    The indexes that pip is configured with are tried in turn. Any of them will do, because the file's hash is known.
    """
    with tempfile.TemporaryDirectory(prefix="glf_fast-index-") as folder:
        root = Path(folder)
        settings = _run([sys.executable, "-m", "pip", "config", "list"], root)
        indexes = [url for urls in re.findall(r"\.(?:extra-)?index-url='(.*)'", settings) for url in urls.split()]
        if not re.search(r"\.index-url=", settings):
            indexes.insert(0, "https://pypi.org/simple")
        tried = []
        for index in indexes:
            page = f"{index.rstrip('/')}/{project}/" + ("index.html" if index.startswith("file:") else "")
            try:
                listing = download(page, root / "index.html", lambda file: None, limit=1 << 24).read_text(
                    errors="replace"
                )
                link = re.search(rf'href="((?:[^"#]*/)?{re.escape(name)})["#]', listing)
                if link is None:
                    raise Unavailable(f"has no {name}")
                url = urljoin(page, html.unescape(link[1]))
                file = download(url, root / name, lambda file: check_hash(file, name, sha256=sha256), limit=limit)
            except Unavailable as error:
                tried.append(f"{page}: {error}")
                continue
            yield file
            return
        raise Unavailable(", ".join(tried))
