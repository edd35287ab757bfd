"""glf_fast's flows with the interfaces of other libraries, one file for each library, imported when it is first used."""

from importlib import import_module
from types import ModuleType

__all__ = ["nflows", "sbi", "zuko"]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return import_module(f"glf_fast.integrations.{name}")
    raise AttributeError(f"module 'glf_fast.integrations' has no attribute {name!r}")
