"""Reads and writes kernels/launch_table.json.

Its sections, by architecture: "made", how the launches were chosen; "launches", by key; "resources", what kernels took when
their launch was chosen, by name and Triton version (`triton_resources.Resources`); "microseconds" of the launches that were
measured, by key.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from glf_fast.files import atomic_write
from glf_fast.kernels import launch_table

__all__ = ["TABLE", "read", "write"]

TABLE = Path(launch_table.__file__).with_suffix(".json")
SECTIONS = ("made", "launches", "resources", "microseconds")


def read() -> dict[str, dict[str, Any]]:
    """The committed table, with all its sections."""
    return {name: {} for name in SECTIONS} | json.loads(TABLE.read_text())


def write(path: Path, table: dict[str, dict[str, Any]]) -> None:
    """The whole table, one entry a line; readers see the old one or the new one."""
    sections = []
    for name in SECTIONS:
        parts = []
        for arch, content in table[name].items():
            if isinstance(content, dict):
                rows = ",\n".join(f"   {json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
                parts.append(f"  {json.dumps(arch)}: {{\n{rows}\n  }}")
            else:
                parts.append(f"  {json.dumps(arch)}: {json.dumps(content)}")
        sections.append(f" {json.dumps(name)}: {{\n" + ",\n".join(parts) + "\n }")
    with atomic_write(path) as temporary:
        temporary.write_text("{\n" + ",\n".join(sections) + "\n}\n")
