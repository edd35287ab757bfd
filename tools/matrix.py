"""`make matrix`: installs one wheel in empty environments, every Python with every torch, and runs it there.

    python tools/matrix.py [--pythons 3.10 3.11 …] [--torches 2.10.0 2.13.0] [--wheel FILE] [--folder build/matrix]

Builds the two files of a release (distributions.py), unless a wheel is given. Each environment holds the wheel and what it
depends on, no more; check_installation.py runs in it, in an empty folder. Last comes an installation without a compiler from
the source distribution, which must succeed and say what is missing.

uv makes the environments: files that several of them share lie on the disk once. A torch of PyPI brings CUDA's libraries, 4 GB
for each torch; UV_TORCH_BACKEND=cpu takes those of download.pytorch.org, which are small. A Python is a version that uv finds
or fetches, or the path of an interpreter. Every combination must pass: one that cannot be installed is an error, too.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import distributions
from distributions import ROOT

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
TORCHES = ("2.10.0", "2.13.0")  # the oldest that is accepted, and that of constraints.txt
COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++", "nvcc", "ninja")
CHECK = Path(__file__).with_name("check_installation.py")


def uv(*arguments: object) -> None:
    """Run uv. Raises subprocess.CalledProcessError when it fails."""
    subprocess.run([sys.executable, "-m", "uv", *map(str, arguments)], check=True)


def interpreter(environment: Path) -> Path:
    """The Python of a virtual environment."""
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def check(python: Path, folder: Path, *arguments: str) -> None:
    """Run check_installation.py in an empty folder, with an environment that names no other packages."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    script = Path(shutil.copy(CHECK, folder))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "GLF_FAST_"))}
    subprocess.run([python, script, folder / "work", *arguments], cwd=folder, env=environment, check=True)


def try_wheel(wheel: Path, python: str, torch: str, folder: Path) -> None:
    """Install a wheel beside a torch in a new environment, and check it there."""
    environment = folder / f"{python.strip('/').replace('/', '-')}-torch-{torch}"
    uv("venv", "--quiet", "--clear", "--python", python, environment)
    uv("pip", "install", "--quiet", "--python", interpreter(environment), wheel, f"torch=={torch}")
    check(interpreter(environment), environment / "check")


def try_without_compiler(sdist: Path, folder: Path) -> None:
    """Install from the sources with the torch of this environment, where every compiler's name is one that fails."""
    bare, site = folder / "bare", folder / "bare" / "site"
    shutil.rmtree(bare, ignore_errors=True)
    (bare / "bin").mkdir(parents=True)
    for name in COMPILERS:
        (bare / "bin" / name).write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
        (bare / "bin" / name).chmod(0o755)
    path = f"{bare / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-cache-dir"]
    subprocess.run(
        [*install, "--target", site, sdist], env={**os.environ, "PATH": path, "CC": "cc", "CXX": "c++"}, check=True
    )
    # A folder on the path, and before this environment's own packages, which may hold another glf_fast.
    shutil.copy(CHECK, bare)
    command = [sys.executable, str(bare / CHECK.name), str(bare / "work"), "--backend", "none"]
    subprocess.run(command, cwd=bare, env={**os.environ, "PYTHONPATH": str(site)}, check=True)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pythons", nargs="+", default=PYTHONS, help="versions, or paths of interpreters")
    parser.add_argument("--torches", nargs="+", default=TORCHES, help="versions of torch")
    parser.add_argument("--wheel", type=Path, help="a wheel that is there, with its source distribution beside it")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "matrix", help="where environments are made")
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if options.wheel:
        wheel = options.wheel.resolve()
        sdists = list(wheel.parent.glob(f"glf_fast-{wheel.name.split('-')[1]}.tar.gz"))
        if not wheel.is_file() or not sdists:
            parser.error(f"{wheel} is not a wheel with its source distribution beside it")
        made = distributions.Distributions(sdists[0], wheel)
    else:
        made = distributions.build(folder / "dist")
    failures = []
    for python in options.pythons:
        for torch in options.torches:
            try:
                try_wheel(made.wheel, python, torch, folder)
            except subprocess.CalledProcessError as error:
                failures.append(f"Python {python}, torch {torch}: {error}")
                print(failures[-1], file=sys.stderr, flush=True)
    try_without_compiler(made.sdist, folder)
    if failures:
        sys.exit(
            f"\n{len(failures)} of {len(options.pythons) * len(options.torches)} combinations failed:\n"
            + "\n".join(failures)
        )
    print(f"{made.wheel.name}: all combinations pass, and so does an installation without a compiler")


if __name__ == "__main__":
    main()
