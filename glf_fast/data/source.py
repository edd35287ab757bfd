"""Sources: descriptions of public data sets, and how their files are found and read.

A new data set is one `Source` in a file of its own, and a line in the registry of `glf_fast.data`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from glf_fast.data.dataset import Dataset, Kind
from glf_fast.data.fetch import Attempt, Unavailable, first, found_or_fetched
from glf_fast.data.routes import File, Route
from glf_fast.errors import UserError
from glf_fast.files import cache_dir

__all__ = ["Files", "Source"]


@dataclass(frozen=True)
class Source:
    """A public data set.

    Attributes:
        name: the name by which it is loaded.
        title: content of the data set, in a line.
        licence, citation: as the authors of the data set state them.
        kind: "images", "table" or "tokens".
        shape: shape of one item; the default shape if `resizes`.
        splits: number of items of each split.
        read: read(files, split, image_size) → data set.
        files: the published files with their hashes; empty for data that come with a library or are generated.
        routes: ways to fetch the files, in the order in which they are tried.
        by_hand: instruction for users without these routes, if "put them into a folder" is not enough.
        resizes: whether `image_size` is supported.
        folder: name of the folder for fetched files, if it is another set's, whose files this one is made of.
    """

    name: str
    title: str
    licence: str
    citation: str
    kind: Kind
    shape: tuple[int, ...]
    splits: Mapping[str, int]
    read: Callable[[Files, str, int | None], Dataset]
    files: tuple[File, ...] = ()
    routes: tuple[Route, ...] = ()
    by_hand: str = ""
    resizes: bool = False
    folder: str = ""

    @property
    def cache(self) -> Path:
        """Folder for fetched files."""
        return cache_dir() / "data" / (self.folder or self.name)

    def load(
        self, split: str, data_dir: Path | None = None, *, image_size: int | None = None, download: bool = True
    ) -> Dataset:
        """A split of the data set; its files are found or fetched first.

        Raises:
            UserError: missing or damaged files, no network, or an option that this data set does not have.
        """
        if data_dir is not None and not self.files:
            raise UserError(f"{self.name} has no files to look for in --data-dir {data_dir}; leave the option out")
        if image_size is not None and not self.resizes:
            raise UserError(
                f"{self.name} has its own image size; image_size is for folders and zips of images, and for CelebA"
            )
        return self.read(Files(self, data_dir, download), split, image_size)

    def find(self, data_dir: Path | None = None, download: bool = True) -> Path:
        """A folder with all files, verified. Raises NotFound, which lists every place tried."""
        names = ", ".join(file.name for file in self.files)
        by_hand = self.by_hand or f"Put {names}{' (or their .gz)' if self.files[0].gzipped else ''}"
        remedy = f"{by_hand} into a folder and pass --data-dir FOLDER, or into {self.cache}"
        return found_or_fetched(
            lambda online: first(f"the data set {self.name}", self._attempts(data_dir, online), remedy),
            self.cache,
            download=download,
        )

    def _attempts(self, data_dir: Path | None, download: bool) -> Iterator[Attempt]:
        if data_dir is not None:
            yield Attempt(f"--data-dir {data_dir}", lambda: self._given(data_dir))
        yield Attempt(f"the cache {self.cache}", lambda: self._verified(self.cache))
        for route in self.routes:
            if route.installed is not None:
                yield Attempt(str(route.installed), lambda route=route: self._verified(route.installed))  # type: ignore[misc]
        if not download:
            yield Attempt("the network", _not_allowed)
            return
        for route in self.routes:
            yield Attempt(route.place, lambda route=route: self._fetched(route))  # type: ignore[misc]

    def _given(self, folder: Path) -> Path:
        """The folder that the user named; a damaged file in it ends the search, because the user must replace it."""
        if not any(file.locate(folder) for file in self.files):
            raise Unavailable("has none of the files")
        try:
            return self._verified(folder)
        except Unavailable as error:
            raise UserError(
                f"--data-dir {folder}: {error}; download the file again, or leave --data-dir out"
            ) from error

    def _verified(self, folder: Path) -> Path:
        for file in self.files:
            file.check(file.found_in(folder))
        return folder

    def _fetched(self, route: Route) -> Path:
        route.fetch(self.files, self.cache)
        return self._verified(self.cache)


@dataclass(frozen=True)
class Files:
    """The files of a source for its reader. All files are found, fetched and verified at the first access."""

    source: Source
    data_dir: Path | None
    download: bool

    @cached_property
    def _folder(self) -> Path:
        return self.source.find(self.data_dir, self.download)

    def path(self, name: str) -> Path:
        """Path of a verified file."""
        return self._file(name).found_in(self._folder)

    def content(self, name: str) -> bytes:
        """Uncompressed content of a verified file."""
        return self._file(name).content(self.path(name))

    def _file(self, name: str) -> File:
        return next(file for file in self.source.files if file.name == name)


def _not_allowed() -> Path:
    raise Unavailable("not asked for")
