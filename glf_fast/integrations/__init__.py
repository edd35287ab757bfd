"""Flows behind other libraries' interfaces: one file a library. Nothing here is imported until it is asked for."""

from importlib import import_module
from types import ModuleType

__all__ = ["nflows", "sbi", "zuko"]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return import_module(f"glf_fast.integrations.{name}")
    raise AttributeError(f"module 'glf_fast.integrations' has no attribute {name!r}")
