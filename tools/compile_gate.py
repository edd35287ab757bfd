"""Compiles every kernel as it is shipped, without a GPU, and fails where one takes more than it may, or waits for its loads.

    make gate                                    # all of them, for sm_80, 90 and 100, with both Triton versions
    python tools/compile_gate.py                 # the installed version alone; --triton DIR adds another
    python tools/compile_gate.py --every 24      # a spread of them; tests/tools/test_compile_gate.py does that

Prints registers a thread, spilled bytes a thread, bytes of shared memory a program, buffers of loops.
kernels/launch_table.json holds what every kernel took when the launches were chosen, by Triton version: no version may spill
more than SLACK bytes beyond that. Loops that load tiles for their products must have two buffers, or the loads of one tile and
the products of the one before it do not overlap (pipelines.py); a launch that was measured to be the fastest may have one.
"""

from __future__ import annotations

import argparse
import itertools
import sys

import launch_file
import shipped
from triton_resources import Compilers, Resources

ARCHITECTURES = (80, 90, 100)
REGISTERS = 255  # of a thread
# Bytes that one program can have. Kernels for sm_80 also run on sm_86, 89 and 120, which have less than its 163 KB.
SHARED = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10}
SLACK = 64  # bytes of spills by which a version of ptxas may differ from those in the table: assumed
BUFFERS = 2


def complaint(found: Resources | None, arch: int, spills: int, measured: bool) -> str:
    """What is wrong with these figures, or ""."""
    if found is None:
        return "does not compile"
    if found.registers > REGISTERS:
        return f"{found.registers} registers, more than a thread has"
    if found.shared > SHARED[arch]:
        return f"{found.shared} bytes of shared memory; sm_{arch} has {SHARED[arch]}"
    if found.spills > spills + SLACK:
        return f"{found.spills} bytes spilled; the launch was chosen at {spills}"
    if found.buffers is not None and found.buffers < BUFFERS and not measured:
        return f"a loop has {found.buffers} buffers: its loads do not overlap its products"
    return ""


def main() -> None:
    """Compile, print, and exit with 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, metavar="N", help="compile one kernel of N")
    parser.add_argument("--triton", action="append", default=[], help="folder with another Triton")
    arguments = parser.parse_args()
    table, wrong = launch_file.read(), 0
    everything = [(arch, key, spec) for arch in ARCHITECTURES for key, spec in shipped.shipped(arch)]
    compilers = Compilers([None, *arguments.triton])
    print("registers, spilled bytes, shared bytes, buffers with Triton", " | ".join(compilers.versions))
    asked = [
        (arch, key, spec, compilers.submit(spec, arch))
        for arch, key, spec in itertools.islice(everything, 0, None, arguments.every)
    ]
    for arch, key, spec, futures in asked:
        answers = [future.result() for future in futures]
        # Kernels outside the launch table have no launch to choose: they spill nothing.
        recorded = table["resources"][str(arch)].get(spec.name, {})
        spills = max((spills for _, spills, *_ in recorded.values()), default=0)
        measured = key in table["microseconds"].get(str(arch), {})
        whys = [complaint(found, arch, spills, measured) for found in answers]
        wrong += any(whys)
        figures = " | ".join(" ".join("–" if n is None else str(n) for n in found or (None,)) for found in answers)
        print(f"sm_{arch}  {spec.name:48} {figures}", *(f" WRONG: {why}" for why in whys if why), flush=True)
    compilers.close()
    sys.exit(f"{wrong} kernels take more than they may, or wait" if wrong else 0)


if __name__ == "__main__":
    main()
