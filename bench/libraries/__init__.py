"""Libraries whose flows are measured beside ours: the one list of them, a file each.

A library does the least that it offers for a flow of a case's size; where that is less than we do, it is said beside it.
"""

from bench.libraries.density import Density, Library
from bench.libraries.freia import FREIA
from bench.libraries.nflows import NFLOWS
from bench.libraries.normflows import NORMFLOWS
from bench.libraries.zuko import ZUKO

__all__ = ["IMAGE_KINDS", "KINDS", "LIBRARIES", "Density", "Library"]

LIBRARIES = {library.name: library for library in (NORMFLOWS, NFLOWS, ZUKO, FREIA)}
# Kinds of layers in docs/drop-in.md's table: the library and what it calls them → a flow of them at the size of a case.
KINDS = {f"{name} {kind}": make for name, library in LIBRARIES.items() for kind, make in library.kinds.items()}
IMAGE_KINDS = {
    f"{name} {kind}": make for name, library in LIBRARIES.items() for kind, make in library.image_kinds.items()
}
