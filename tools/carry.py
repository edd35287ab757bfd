"""What can be compiled without a GPU, in one archive for the machine with one: the extension's libraries and Triton's cache.

    python tools/carry.py unpack ARCHIVE     # also: tools/gpu_here.py unpack ARCHIVE
    python tools/carry.py here               # what this machine would run, as JSON

`unpack` puts the libraries into glf_fast/, wheels into wheels/ and the kernels into Triton's cache ($TRITON_CACHE_DIR, else
~/.triton/cache), and says how many. Kernels are taken where Triton is the same to the byte and Python's minor version is,
libraries where csrc/ is the same. What is not taken is said, and compiled as if there were no archive. `make gpu-here`
packs it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Manifest", "compiled", "here", "pack", "unpack"]

ROOT = Path(__file__).parent.parent
MANIFEST = "manifest.json"
GROUP = "__grp__"  # a file of Triton's cache that lists a kernel's other files, by their whole paths


class Manifest(NamedTuple):
    """What an archive's content was compiled with, or what there is to run it."""

    triton: str  # SHA-256 of Triton's own key
    torch: str
    python: str
    machine: str
    sources: str  # SHA-256 of csrc/


def here(root: Path = ROOT) -> Manifest:
    """That of this machine, and of the sources in a folder."""
    import torch
    from triton.runtime.cache import triton_key

    digest = hashlib.sha256()
    for path in sorted(path for path in (root / "csrc").rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return Manifest(
        triton=hashlib.sha256(triton_key().encode()).hexdigest(),
        torch=torch.__version__,
        python=".".join(platform.python_version_tuple()[:2]),
        machine=platform.machine(),
        sources=digest.hexdigest(),
    )


def compiled(cache: Path, names: frozenset[str]) -> dict[Path, dict[str, Any]]:
    """The folders of Triton's cache that hold one of these kernels, with what Triton noted about it."""
    found = {}
    for path in sorted(cache.glob("*/*.json")):
        if not path.name.startswith(GROUP) and (about := json.loads(path.read_text())).get("name") in names:
            found[path.parent] = about
    return found


def pack(
    archive: Path, libraries: list[Path], wheels: list[Path], cache: Path, names: frozenset[str], about: Manifest
) -> int:
    """Write an archive of files, and of the kernels of these names with all launchers; returns how many kernels."""
    kernels = compiled(cache, names)
    # Similar ones next to one another: that is what a compressor likes.
    order = sorted(
        kernels, key=lambda folder: (kernels[folder]["name"], str(kernels[folder].get("num_warps")), folder.name)
    )
    folders = [*order, *sorted({path.parent for path in cache.glob("*/*.so")})]
    archive.parent.mkdir(parents=True, exist_ok=True)
    new = archive.with_suffix(".new")
    with tarfile.open(new, "w:xz", preset=9) as tar:
        _add(tar, MANIFEST, json.dumps(about._asdict()).encode())
        for folder, files in (("libraries", libraries), ("wheels", wheels)):
            for path in files:
                _add(tar, f"{folder}/{path.name}", path.read_bytes())
        for path in (path for folder in folders for path in sorted(folder.iterdir())):
            name = f"cache/{path.parent.name}/{path.name}"
            if path.name.startswith(GROUP):
                files = json.loads(path.read_text())["child_paths"]
                _add(tar, name, json.dumps({"child_paths": dict.fromkeys(files, "")}).encode())
            elif path.suffix in (".cubin", ".json", ".so"):
                _add(tar, name, path.read_bytes())
    new.replace(archive)
    return len(kernels)


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    member.mode = 0o755 if name.endswith(".so") else 0o644
    tar.addfile(member, io.BytesIO(content))


def unpack(archive: Path, root: Path, cache: Path, present: Manifest) -> Iterator[str]:
    """Take what fits from an archive, and say what was taken and what was not, and why.

    What is there already stays. Each file, and each folder of the cache, appears whole or not at all.

    Raises:
        tarfile.TarError, ValueError: not such an archive, or one that reaches outside its folder.
    """
    cache.mkdir(parents=True, exist_ok=True)
    # Next to the cache, so that moving is renaming.
    with tempfile.TemporaryDirectory(dir=cache.parent) as name, tarfile.open(archive) as tar:
        first = tar.next()
        content = tar.extractfile(first) if first and first.name == MANIFEST else None
        if content is None:
            raise ValueError(f"{archive} does not begin with {MANIFEST}")
        packed = Manifest(**json.load(content))
        tar.extractall(name, filter="data")
        yield _take_libraries(Path(name) / "libraries", root / "glf_fast", packed, present)
        yield f"{_replace_all(Path(name) / 'wheels', root / 'wheels')} wheels taken"
        yield _take_kernels(Path(name) / "cache", cache, packed, present)


def _take_libraries(source: Path, target: Path, packed: Manifest, present: Manifest) -> str:
    if packed.machine != present.machine or packed.sources != present.sources:
        why = "csrc/ has changed" if packed.machine == present.machine else f"they are for {packed.machine}"
        return f"no libraries taken: {why}"
    return f"{_replace_all(source, target)} libraries taken"


def _replace_all(source: Path, target: Path) -> int:
    """Put a folder's files into another one, which may lie on another disk; returns how many."""
    files = sorted(source.glob("*"))
    for path in files:
        target.mkdir(exist_ok=True)
        temporary = target / f".{path.name}"
        shutil.copy2(path, temporary)
        temporary.replace(target / path.name)
    return len(files)


def _take_kernels(source: Path, target: Path, packed: Manifest, present: Manifest) -> str:
    for what in ("triton", "python", "machine"):
        if getattr(packed, what) != getattr(present, what):
            name = "Triton's key" if what == "triton" else what
            return (
                f"no kernels taken, so all are compiled: {name} is {getattr(present, what)}, "
                f"and the archive's {getattr(packed, what)}"
            )
    taken = kept = 0
    for folder in sorted(source.glob("*")):
        final = target / folder.name
        for path in folder.glob(f"{GROUP}*"):
            files = json.loads(path.read_text())["child_paths"]
            path.write_text(json.dumps({"child_paths": {child: str(final / child) for child in files}}))
        kernel = any(folder.glob("*.cubin"))
        try:
            folder.rename(final)
            taken += kernel
        except OSError:  # it is there, and not empty
            kept += kernel
    return f"{taken} kernels taken" + (f", {kept} were there already" if kept else "")


def main() -> None:
    """See the module's docstring."""
    if sys.argv[1:] == ["here"]:
        print(json.dumps(here()._asdict()))
        return
    if len(sys.argv) != 3 or sys.argv[1] != "unpack":
        sys.exit(__doc__)
    cache = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    try:
        for line in unpack(Path(sys.argv[2]), ROOT, cache, here()):
            print(line, flush=True)
    except (OSError, tarfile.TarError, ValueError) as error:
        print(f"{sys.argv[2]} is not used: {error}", flush=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
