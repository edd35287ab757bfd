"""Compiles every kernel as it is shipped, without a GPU, and fails where one takes more than it may.

    make gate                                    # all of them, for sm_80, 90 and 100, with both Triton versions
    python tools/compile_gate.py                 # the installed version alone; --triton DIR adds another
    python tools/compile_gate.py --every 24      # a spread of them; tests/kernels/test_compile.py does that

Prints registers a thread, spilled bytes a thread, bytes of shared memory a program. kernels/launch_table.json holds what every
kernel took when the launches were chosen, by Triton version: no version may spill more than SLACK bytes beyond that.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

from triton_resources import Compiler, Resources

from glf_fast.kernels import shipped

ARCHITECTURES = (80, 90, 100)
REGISTERS = 255  # of a thread
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes that one program can have
SLACK = 64  # bytes of spills by which a version of ptxas may differ from those in the table: assumed


def complaint(found: Resources | None, arch: int, spills: int) -> str:
    """What is wrong with these figures, or ""."""
    if found is None:
        return "does not compile"
    if found.registers > REGISTERS:
        return f"{found.registers} registers, more than a thread has"
    if found.shared > SHARED[arch]:
        return f"{found.shared} bytes of shared memory; sm_{arch} has {SHARED[arch]}"
    if found.spills > spills + SLACK:
        return f"{found.spills} bytes spilled; the launch was chosen at {spills}"
    return ""


def recorded() -> dict[str, dict[str, int]]:
    """Spilled bytes by architecture and name of a kernel: the most that any version took."""
    table = json.loads(Path(shipped.__file__).with_name("launch_table.json").read_text())
    return {
        arch: {key: max(spills for _, spills, _ in versions.values()) for key, versions in entries.items()}
        for arch, entries in table["resources"].items()
    }


def main() -> None:
    """Compile, print, and exit with 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, metavar="N", help="compile one kernel of N")
    parser.add_argument("--triton", action="append", default=[], help="folder with another Triton")
    arguments = parser.parse_args()
    bounds, wrong = recorded(), 0
    compilers = [Compiler(folder) for folder in (None, *arguments.triton)]
    print("registers, spilled bytes, shared bytes with Triton", " | ".join(c.version for c in compilers))
    everything = [(arch, spec) for arch in ARCHITECTURES for spec in shipped.shipped(arch)]
    for arch, spec in itertools.islice(everything, 0, None, arguments.every):
        for compiler in compilers:
            compiler.ask(spec, arch)
        answers = [compiler.answer() for compiler in compilers]
        # Kernels outside the launch table have no launch to choose: they spill nothing.
        whys = [complaint(found, arch, bounds[str(arch)].get(spec.name, 0)) for found in answers]
        wrong += any(whys)
        figures = " | ".join(" ".join(map(str, found or ("–",))) for found in answers)
        print(f"sm_{arch}  {spec.name:48} {figures}", *(f" WRONG: {why}" for why in whys if why), flush=True)
    for compiler in compilers:
        compiler.close()
    sys.exit(f"{wrong} kernels take more than they may" if wrong else 0)


if __name__ == "__main__":
    main()
