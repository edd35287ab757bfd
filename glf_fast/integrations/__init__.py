"""glf_fast's flows with the interfaces of other libraries, one file for each library, imported when it is first used.

`fast_splines` needs none of them: it replaces the splines of libraries whose flows stay as they are.
"""

from importlib import import_module
from types import ModuleType

from glf_fast.integrations.splines import fast_splines

__all__ = ["fast_splines", "madnis", "nflows", "zuko"]  # what needs no other package: `import *` imports all of it

NEED_THEIR_PACKAGE = ("aspire", "bayesflow", "nessai", "pocomc", "sbi")


def __getattr__(name: str) -> ModuleType:
    if name in (*__all__, *NEED_THEIR_PACKAGE):
        return import_module(f"glf_fast.integrations.{name}")
    raise AttributeError(f"module 'glf_fast.integrations' has no attribute {name!r}")
