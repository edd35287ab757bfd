"""The libraries that are known, and which of them a flow comes from."""

from __future__ import annotations

from torch import nn

from glf_fast.conversion import freia, nflows, normflows, zuko
from glf_fast.conversion.layers import ConversionError
from glf_fast.conversion.library import Library

__all__ = ["NAMES", "host_of", "is_layer", "library_of"]

LIBRARIES: tuple[Library, ...] = (normflows.LIBRARY, nflows.LIBRARY, zuko.LIBRARY, freia.LIBRARY)
NAMES = ", ".join(library.package for library in LIBRARIES[:-1]) + f" or {LIBRARIES[-1].package}"


def library_of(flow: nn.Module) -> Library:
    """The library that a flow comes from, if `convert` takes its class; else raises ConversionError."""
    kinds = type(flow).__mro__
    library = next((library for library in LIBRARIES if any(map(library.owns, kinds))), None)
    name = type(flow).__name__
    if library is None:
        raise ConversionError(
            f"{type(flow).__module__}.{name} is no flow of {NAMES}: those libraries' flows are converted; for a flow inside "
            "another module there is glf_fast.accelerate"
        )
    if not any(library.owns(kind) and kind.__name__ in library.flows for kind in kinds):
        wanted = " or ".join(f"{library.package}.{kind}" for kind in library.flows)
        in_place = host_of(flow) is not None
        raise ConversionError(
            f"{name} of {library.package} is not a flow from data to noise of one shape, with one density: convert takes a "
            f"{wanted}" + "; glf_fast.accelerate replaces its layers in place" * in_place
        )
    return library


def host_of(module: nn.Module) -> tuple[Library, type] | None:
    """A library and its class that `module` is an instance of, if `accelerate` replaces layers in those; None else."""
    for kind in type(module).__mro__:
        for library in LIBRARIES:
            if library.owns(kind) and kind.__name__ in (*library.flows, *library.hosts):
                return library, kind
    return None


def is_layer(module: nn.Module) -> bool:
    """True for a flow or a flow's layer of one of the libraries, not for its networks and distributions."""
    package = ".".join(type(module).__module__.split(".")[:2])
    return any(package in library.packages for library in LIBRARIES)
