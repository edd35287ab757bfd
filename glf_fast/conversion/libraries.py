"""The libraries that are known, and which of them a flow comes from."""

from __future__ import annotations

from torch import nn

from glf_fast.conversion import freia, glow_modules, nflows, normflows, pyro, zuko
from glf_fast.conversion.layers import ConversionError
from glf_fast.conversion.library import Library

__all__ = ["NAMES", "host_of", "is_layer", "library_of"]

LIBRARIES: tuple[Library, ...] = (normflows.LIBRARY, nflows.LIBRARY, zuko.LIBRARY, pyro.LIBRARY, freia.LIBRARY)
NAMES = ", ".join(library.package for library in LIBRARIES[:-1]) + f" or {LIBRARIES[-1].package}"


def library_of(flow: nn.Module) -> Library:
    """The library that a flow comes from, if `convert` takes its class; else raises ConversionError."""
    name = type(flow).__name__
    for known in LIBRARIES:
        if known.host(flow, known.flows):
            return known
    library = next((known for known in LIBRARIES if any(map(known.owns, type(flow).__mro__))), None)
    if library is None:
        raise ConversionError(
            f"{type(flow).__module__}.{name} is no flow of {NAMES}: those libraries' flows are converted; for a flow inside "
            "another module there is glf_fast.accelerate"
        )
    wanted = " or ".join(f"{library.package}.{kind}" for kind in library.flows)
    in_place = host_of(flow) is not None
    raise ConversionError(
        f"{name} of {library.package} is not a flow from data to noise of one shape, with one density: convert takes a "
        f"{wanted}" + "; glf_fast.accelerate replaces its layers in place" * in_place
    )


def host_of(module: nn.Module) -> tuple[Library, type] | None:
    """A library and its class that `module` is an instance of, if `accelerate` replaces layers in those; None else."""
    for library in (*LIBRARIES, *glow_modules.LIBRARIES):
        kind = library.host(module, (*library.flows, *library.hosts))
        if kind is not None:
            return library, kind
    return None


def is_layer(module: nn.Module) -> bool:
    """True for a flow or a flow's layer of one of the libraries, not for its networks and distributions."""
    path = f".{type(module).__module__}."
    return any(f".{package}." in path for library in LIBRARIES for package in library.packages)
