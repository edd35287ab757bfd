"""Makes kernels/launch_table.json without a GPU: the launches that should be fastest, of those that compile well.

    python tools/choose_launches.py --triton DIR      # --only KEY: entries that contain this, such as 'medium bf16'

DIR holds another Triton than the installed one (pip install --no-deps --target DIR triton==…): launches are chosen over both.
Launches come in the order of their predicted times (flow_costs.py). Of those with different tiles the entry's own kernel is
compiled with the last version: the first one is taken that spills at most KEEP bytes, or, of TRIED, the cheapest, when SPILLED
bytes double the time (assumed). All kernels that it launches, those of the named flows too (shipped.py), must then
compile with all versions, fit into shared memory, and overlap loads and arithmetic in every loop. sm_80 and sm_100 keep what
sm_90 took where it spills at most KEEP bytes there: predictions are for sm_90, and the others differ less from it than
predictions err.

tools/tune_flow.py replaces what is chosen here by what is measured.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeGuard

import launch_file
from flow_candidates import case, ranked, shared_limit, tuned_keys
from flow_costs import clocks
from shipped import kernels, of_entry
from triton_resources import Compilers, Resources

from glf_fast.kernels.launch_table import Launch, keys

KEEP = 64  # bytes spilled that are good enough: versions of ptxas differ by as much
SPILLED = 256
TRIED = 12

Taken = dict[str, dict[str, Resources]]  # what kernels take, by name and Triton version


def acceptable(found: Resources | None, key: str, how: Launch, arch: str) -> TypeGuard[Resources]:
    """Whether a kernel compiles, fits, and overlaps loads and arithmetic in every loop that loads tiles."""
    return (
        found is not None
        and found.shared <= shared_limit(key, how, arch)
        and (found.buffers is None or found.buffers >= 2)
    )


def take(key: str, how: Launch, arch: str, compilers: Compilers) -> Taken | None:
    """What each kernel of a launch takes; None if one is not acceptable."""
    asked = [(spec, compilers.submit(spec, int(arch))) for spec in kernels(key, how, int(arch))]
    taken: Taken = {spec.name: {} for spec, _ in asked}
    for spec, futures in asked:
        for version, future in zip(compilers.versions, futures, strict=True):
            found = future.result()
            if not acceptable(found, key, how, arch):
                return None
            taken[spec.name][version] = found
    return taken


def screen(key: str, arch: str, present: Launch | None, compilers: Compilers) -> list[Launch]:
    """Launches whose own kernel compiles well, the cheapest first; those of the `present` launch before others.

    Of launches whose tiles have the same rows and columns, the best one is tried alone: what they spill differs little.
    """
    costs: list[tuple[float, Launch]] = []
    tried: set[tuple[int, int, bool, int]] = set()
    for how in ([present] if present else []) + ranked(key, arch):
        tile = (how.rows, how.columns, how.staged, how.num_warps)
        if tile in tried or how.num_stages == 2 or how.num_warps > 8:  # nothing overlaps; 128 registers a thread
            continue
        tried.add(tile)
        found = compilers.submit_last(of_entry(key, how), int(arch)).result()
        if acceptable(found, key, how, arch):
            costs.append((clocks(case(key), how) * (1 + found.spills / SPILLED), how))
            if found.spills <= KEEP:
                return [how, *(other for _, other in sorted(costs) if other != how)]
        if len(tried) >= TRIED and costs:
            break
    return [how for _, how in sorted(costs)]


def choose(key: str, arch: str, present: Launch | None, compilers: Compilers) -> tuple[Launch, Taken]:
    """The launch of a key, and what its kernels take."""
    for how in screen(key, arch, present, compilers):
        if taken := take(key, how, arch, compilers):
            return how, taken
    sys.exit(f"nothing fits for {key} on sm_{arch}")


def main() -> None:
    """Write the table, entry by entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--triton", action="append", default=[], help="folder with another Triton that must agree")
    parser.add_argument("--only", default="", metavar="KEY", help="only entries whose key contains this")
    parser.add_argument("--out", type=Path, default=launch_file.TABLE, help="where the table goes")
    arguments = parser.parse_args()
    table = launch_file.read()
    compilers = Compilers([None, *arguments.triton])
    chosen = [key for key in dict.fromkeys([*tuned_keys(), *keys()]) if arguments.only in key]
    for arch in ("90", "80", "100"):
        launches, resources, measured = (
            table[name].setdefault(arch, {}) for name in ("launches", "resources", "microseconds")
        )
        table["made"][arch] = f"compiled only, Triton {' and '.join(compilers.versions)}; not measured"

        def of(key: str, arch: str = arch) -> tuple[Launch, Taken]:
            present = None if arch == "90" else Launch(*table["launches"]["90"][key])
            return choose(key, arch, present, compilers)

        # Several keys at once keep the compilers busy where a candidate's kernels are fewer than these.
        with ThreadPoolExecutor(len(compilers.versions) + 1) as threads:
            for key, (how, taken) in zip(chosen, threads.map(of, chosen), strict=True):
                launches[key] = list(how)
                measured.pop(key, None)
                for name, by_version in taken.items():
                    resources[name] = {version: list(found) for version, found in by_version.items()}
                    print(f"sm_{arch}  {name:48} {list(how)} {resources[name]}", flush=True)
                launch_file.write(arguments.out, table)
    compilers.close()


if __name__ == "__main__":
    main()
