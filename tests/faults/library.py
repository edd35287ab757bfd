"""The library that injects faults (injector.c), compiled: without torch, because the process that loads it comes later."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("injector.c")


def build(folder: Path) -> Path:
    """Compile injector.c into a folder; raises SystemExit with a line if there is no C compiler."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise SystemExit("error: faults are injected by a C library, and there is no C compiler (cc, gcc or $CC)")
    library = folder / "injector.so"
    command = [
        *compiler.split(),
        "-shared",
        "-fPIC",
        "-O1",
        "-U_FORTIFY_SOURCE",
        "-o",
        str(library),
        str(SOURCE),
        "-ldl",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(command)} failed:\n{done.stderr}")
    return library
