"""Files on disk: the cache folder, atomic writes, hashes, JSON, tensors."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors.torch import save
from torch import Tensor

from glf_fast.errors import UserError

__all__ = [
    "atomic_folder",
    "atomic_write",
    "cache_dir",
    "errors_name",
    "file_digest",
    "lock",
    "one_at_a_time",
    "parse_json",
    "read_json",
    "save_tensors",
    "sha256",
    "sweep",
    "write_json",
]


def cache_dir() -> Path:
    """Folder for fetched data, weights and reference statistics.

    `$GLF_FAST_CACHE` if set, else `$XDG_CACHE_HOME/glf_fast`, else `~/.cache/glf_fast`. This function does not create the
    folder.
    """
    chosen = os.environ.get("GLF_FAST_CACHE")
    path = Path(chosen or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "glf_fast"))
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise UserError(f"the cache folder {path} has no place ({error}); set GLF_FAST_CACHE to a folder") from error


# The mark of a file or folder that is being written. One that is older than an hour was left by a killed process.
_UNFINISHED = re.compile(r"\..+-[a-z0-9_]{8}\.partial(\.\w+)?")
_swept: set[Path] = set()
# Errors of a disk. A block that writes a file may also meet errors of a network, which are not the file's.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


@contextlib.contextmanager
def atomic_write(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`; if the block succeeds, flush the temporary file to disk and rename it to `path`.

    A reader sees the old file or the whole new file, never a part. If the block fails (exception, disk full), the temporary
    file is removed and `path` stays as it was. Parent folders are created. At the first write into a folder, a process removes
    the temporary files that killed processes left there more than an hour ago.
    """
    path = Path(path)
    _prepare(path.parent)
    # The suffix is kept last: some writers (numpy, Pillow) choose the format by it.
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=f".partial{path.suffix}", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        with errors_name(path):
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        _publish(temporary, 0o666)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; if the block succeeds, rename it to `path`, else remove it.

    `path` may be an empty folder; hidden files in it are kept. Leftovers of killed processes are removed as in `atomic_write`.
    Where the folder `path` cannot be replaced (a mount point, the working directory, a parent without write permission), the
    temporary folder is a hidden one in it, and its files are moved out of it at the end, one by one.
    """
    target = Path(os.path.realpath(path))
    fixed = target.is_dir() and (
        os.path.ismount(target) or target.samefile(Path.cwd()) or not os.access(target.parent, os.W_OK)
    )
    room = target if fixed else target.parent
    _prepare(room)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", suffix=".partial", dir=room))
    try:
        yield temporary
        if fixed:
            for file in sorted(temporary.iterdir()):
                file.replace(target / file.name)
            return
        if target.is_dir():
            for hidden in target.iterdir():
                hidden.replace(temporary / hidden.name)
            if os.name == "nt":  # no folder takes another's place there, not even an empty one's
                target.rmdir()
        _publish(temporary, 0o777)
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _prepare(folder: Path) -> None:
    """Create a folder; at its first use by this process, remove what killed processes left in it over an hour ago."""
    folder.mkdir(parents=True, exist_ok=True)
    if folder not in _swept:
        _swept.add(folder)
        sweep(folder, seconds=3600)


def _publish(temporary: Path, mode: int) -> None:
    """Give a temporary file or folder, which `tempfile` makes private, the permissions of any new one."""
    umask = os.umask(0)
    os.umask(umask)
    temporary.chmod(mode & ~umask)


@contextlib.contextmanager
def errors_name(path: Path) -> Iterator[None]:
    """Add the file's name to errors of the disk inside the block: those of writing say "No space left on device" alone."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in _DISK:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Make the folder, and lock it against training by other processes.

    Where the file system has no locks, a line says so, and the folder is not locked.

    Raises:
        UserError: another process is training in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held = FileLock(folder / ".lock", timeout=0)
    try:
        locks = _acquired(held)
    except Timeout:
        raise UserError(
            f"another process is training in {folder}; wait until it ends, or choose another --out"
        ) from None
    if not locks:
        print(f"{folder} is on a file system without locks: let no other process train in it", file=sys.stderr)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # the system releases the lock at the end of the process
            held.release()


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Make the folder, and wait until no other process is inside such a block for it.

    Where the folder cannot be made or locked (a read-only disk, a file system without locks), nobody waits.
    """
    held, told = FileLock(folder / ".lock", timeout=0), False
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _acquired(held)
        except Timeout:
            if not told:
                print(f"waiting for another process, which is preparing files in {folder}", file=sys.stderr)
            told = True
            time.sleep(0.1)
            continue
        except OSError:
            pass
        break
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            held.release()


def _acquired(held: FileLock) -> bool:
    """Take a lock; returns whether the file system has locks. Raises Timeout where another process has taken it."""
    try:
        with warnings.catch_warnings(record=True) as fallback:  # without flock, filelock 4 takes a weaker lock
            warnings.simplefilter("always")
            held.acquire()
        return not fallback
    except NotImplementedError:  # filelock 3 without flock
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        return False


def sweep(folder: Path, *, seconds: float = 60) -> None:
    """Remove what `atomic_write` and `atomic_folder` left in a folder when their process was killed.

    Younger files may be in use. Files that cannot be removed stay, because they do no harm.
    """
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            left = _UNFINISHED.fullmatch(path.name) and not path.is_symlink()
            if left and time.time() - path.stat().st_mtime > seconds:
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)


def sha256(path: Path | str) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    return file_digest(path, "sha256")


def file_digest(path: Path | str, algorithm: str) -> str:
    """Hexadecimal digest of a file's bytes by one of hashlib's algorithms, without holding the file in memory."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_json(path: Path | str, content: Any) -> None:
    """Write `content` as indented JSON, atomically; raises ValueError for NaN and infinities, which JSON does not have."""
    text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False)
    with atomic_write(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def save_tensors(path: Path | str, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, atomically; raises OSError when it cannot be written (disk full …)."""
    # channels_last weights are not contiguous, and safetensors refuses such tensors.
    content = save({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, metadata)
    # Not by save_file, which wraps the errors of the system, and writes to a hidden file of its own (.tmpXXXXXX) that stays
    # after a kill; the price is the content in memory.
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def read_json(path: Path | str) -> Any:
    """Read a JSON file; raises `UserError` naming the file when it is not JSON."""
    return parse_json(Path(path).read_bytes(), path)


def parse_json(content: bytes, path: Path | str) -> Any:
    """The JSON in the bytes of a file; raises `UserError` naming the file when they are not JSON."""
    try:
        return json.loads(content.decode("utf-8-sig"))  # editors of Windows begin files with a mark
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); delete it or restore it from a copy") from error
